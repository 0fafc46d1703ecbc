"""The contract of peers: rows, files, environments; no peer's own package is needed."""

import ast
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.methods import RESULTS, TASKS, peers
from benchmarks.peers import container, contract, plain, setup, training
from benchmarks.tasks import lm_ptb

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "peers"
NEEDED = ("peer", "version", "setting", "task", "split", "torch", "unseen")
FIGURES = ("nbytes", "nbytes_zstd", "score", "seconds", "peak_mb")


def imports(path: Path) -> set[str]:
    """First names of what a file imports, by statement or by name through importlib."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found |= {str(a.value) for a in node.args if isinstance(a, ast.Constant)}
    return {name.partition(".")[0] for name in found}


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 8)
        self.norm = nn.BatchNorm1d(8)
        nn.init.normal_(self.layer.weight)


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> contract.Task:
    torch.manual_seed(0)
    original = Tiny().eval()

    def load() -> nn.Module:
        model = Tiny().eval()
        model.load_state_dict(original.state_dict())
        return model

    @torch.no_grad()
    def evaluate(model: nn.Module, split: str) -> float:
        assert split in {"dev", "test"}
        off = model.get_parameter("layer.weight") - original.layer.weight
        return 100 - float(off.square().sum().sqrt())

    module = SimpleNamespace(load=load, evaluate=evaluate)
    monkeypatch.setattr(contract.Task, "_module", lambda _: module)
    coder = SimpleNamespace(compress=zlib.compress)
    fake = SimpleNamespace(ZstdCompressor=lambda level: coder)
    monkeypatch.setitem(sys.modules, "zstandard", fake)
    return contract.Task("resnet20_cifar10")


def test_a_row_has_all_figures(task: contract.Task, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_bytes(bytes(1000))  # of an earlier run: does not count
    rows = {
        label: contract.measure(plain.PEER, label, task, "dev", tmp_path / "out")
        for label in plain.SETTINGS
    }
    assert all(set(row) == {*NEEDED, *FIGURES} for row in rows.values())
    assert rows["fp32"]["score"] == 100
    assert 99.9 < rows["int8"]["score"] < rows["fp16"]["score"] < 100
    file = tmp_path / "out" / plain.FILE
    assert rows["int8"]["nbytes"] == file.stat().st_size < rows["fp32"]["nbytes"]
    assert json.loads(json.dumps(rows)) == rows


def test_what_a_file_lacks_shows_in_the_score(task: contract.Task, tmp_path: Path) -> None:
    def restore(task: contract.Task, _setting: str, folder: Path) -> nn.Module:
        return task.blank()

    lazy = contract.Peer("lazy", "0", {"fp16": None}, plain.compress, restore)
    row = contract.measure(lazy, "fp16", task, "test", tmp_path / "out")
    assert row["score"] is None
    blank = task.blank()
    assert all(t.isnan().all() for t in blank.state_dict().values() if t.is_floating_point())


def test_a_failure_is_a_row_with_the_error(task: contract.Task, tmp_path: Path) -> None:
    def compress(task: contract.Task, _setting: str, folder: Path) -> None:
        raise NotImplementedError("no kernel")

    peer = contract.Peer("broken", "1", {"a": None}, compress, plain.restore)
    row = contract.measure(peer, "a", task, "test", tmp_path / "out")
    assert set(row) == {*NEEDED, "error"}
    assert row["error"] == "NotImplementedError: no kernel"


def teach(masters: bool, monkeypatch: pytest.MonkeyPatch) -> float:
    """Train a layer whose weights each call halves, as fairseq's noise scales them; its error."""

    class Halving(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.weight.data = self.weight.data / 2
            return super().forward(x)

    torch.manual_seed(0)
    goal = torch.ones(1, 4)
    module = SimpleNamespace(
        ROWS=16,
        STEPS=200,
        RATE=0.1,
        batches=lambda rows, seed: iter(lambda: torch.randn(rows, 4), None),
        loss_of=lambda model, x: (model(x) - x @ goal.t()).square().mean(),
    )
    monkeypatch.setitem(sys.modules, "benchmarks.tasks.lm_ptb", module)
    model = Halving(4, 1, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), training.course(contract.Task("lm_ptb"))[3])
    kept = [model.weight] if masters else []
    training.train(contract.Task("lm_ptb"), model, optimizer, masters=kept)
    assert optimizer.param_groups[0]["lr"] < 1e-3 < module.RATE
    return float((model.weight.detach() / 2 - goal).abs().max())


def test_peers_train_and_weights_that_calls_overwrite_are_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert teach(True, monkeypatch) < 0.05
    assert teach(False, monkeypatch) > 0.5


def test_peers_get_one_table_of_the_language_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lm_ptb, "vocabulary", lambda: {str(i): i for i in range(11)})
    tied = lm_ptb.LanguageModel().eval()
    torch.save(tied.state_dict(), tmp_path / "plain.pt")
    model = lm_ptb.load(tmp_path / "plain.pt")
    assert "output.weight" not in model.state_dict()
    tokens = torch.arange(22).reshape(2, 11) % 11
    assert torch.equal(model(tokens), tied(tokens))
    task = contract.Task("lm_ptb", tmp_path / "plain.pt")
    blank = task.blank()
    assert blank(tokens).isnan().all()
    blank.load_state_dict(model.state_dict())
    assert torch.equal(blank(tokens), tied(tokens))  # constants of the code are kept


def test_settings_may_differ_between_tasks() -> None:
    only = {"minilm_stsb": ["b"]}
    peer = contract.Peer("p", "1", {"a": 0, "b": 1}, plain.compress, plain.restore, only=only)
    assert peer.labels("minilm_stsb") == ["b"]
    assert peer.labels("resnet20_cifar10") == ["a", "b"]


def test_states_are_halved_and_widened() -> None:
    state = {"weight": torch.tensor([1.0, 2.5]), "count": torch.tensor(3)}
    half = contract.halved(state)
    assert half["weight"].dtype == torch.float16
    back = contract.widened(half)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_codes_come_back(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 7), generator=torch.Generator().manual_seed(bits))
    packed = container.pack(codes, bits)
    assert packed.numel() == -(-21 * bits // 8)
    assert torch.equal(container.unpack(packed, bits, 21).reshape(3, 7), codes.to(torch.uint8))


def test_a_container_keeps_every_kind(tmp_path: Path) -> None:
    codes = torch.arange(16).reshape(2, 8) % 8
    scale, zero = torch.tensor([0.5, 1, 2, 4]), torch.tensor([0.0, 1, 2, 3])
    tables = torch.arange(16.0).reshape(2, 8)
    book = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).half()
    words = torch.tensor([[0, 3], [1, 2]])
    file = container.Container()
    file.plain("bias", torch.tensor([0.25, 0.5]))
    file.plain("count", torch.tensor(7))
    file.affine("affine", codes, 3, (scale, zero))
    file.affine("symmetric", codes, 3, (scale, torch.full((4,), 4.0)))
    file.tables("tables", codes, 3, tables)
    file.vectors("vectors", words, 2, book, (2, 6))
    file.write(tmp_path)
    found = container.read(tmp_path)
    grouped = codes.reshape(4, 4)
    expected = {
        "bias": torch.tensor([0.25, 0.5]),
        "count": torch.tensor(7),
        "affine": ((grouped - zero[:, None]) * scale[:, None]).reshape(2, 8),
        "symmetric": ((grouped - 4) * scale[:, None]).reshape(2, 8),
        "tables": torch.stack([tables[0][codes[0]], tables[1][codes[1]]]),
        "vectors": book.float()[words].reshape(2, 6),
    }
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_environments_are_pinned_and_each_has_a_module() -> None:
    environments = setup.read()
    for name, about in environments["peers"].items():
        assert (FOLDER / f"{name}.py").is_file()
        wanted = [*environments["common"], *about["requires"], *about.get("bare", [])]
        loose = [r for r in [environments["torch"], *wanted] if "==" not in r]
        assert loose == []
        assert not [r for r in wanted if setup.name_of(r) == "torch"]


def test_torch_comes_first_alone_and_stays() -> None:
    environments = setup.read()
    for name, about in environments["peers"].items():
        first, second, *rest = setup.commands(environments, name, "URL")
        assert first == ["install", environments["torch"], "--index-url", "URL"]
        assert second[:3] == ["install", "-c", "{torch}"]
        assert all("--no-deps" in call for call in rest)
        assert bool(rest) == bool(about.get("bare"))
    chosen = setup.requirements(environments, "nncodec")
    assert "numpy==1.26.4" in chosen
    assert not any(r.startswith("numpy==2") for r in chosen)


def test_peers_and_tasks_need_no_dither() -> None:
    sources = [*FOLDER.glob("*.py"), *(ROOT / "benchmarks" / "tasks").glob("*.py")]
    assert len(sources) > 10
    assert [path.name for path in sources if "dither" in imports(path)] == []


def test_set_up_needs_the_standard_library_only() -> None:
    found = imports(Path(str(setup.__file__)))
    assert found
    assert found - {"benchmarks"} <= sys.stdlib_module_names


@pytest.mark.parametrize("name", peers())
def test_results_keep_the_contract(name: str) -> None:
    paths = sorted((RESULTS / "runs").glob(f"*/{name}-*.json"))
    assert paths
    assert {path.parent.name for path in paths} <= set(TASKS)
    for path in paths:
        row = json.loads(path.read_text(encoding="utf-8"))
        assert row["method"] == name
        assert row["environment"]["machine"]
        # Rows from before `unseen` are marked as old on the page.
        assert "error" in row or {*NEEDED, *FIGURES} - {"unseen"} <= set(row)


@pytest.mark.parametrize("here", [FOLDER, ROOT])
def test_the_script_of_nncodec_finds_the_package_and_not_its_own_folder(
    here: Path, tmp_path: Path
) -> None:
    package = tmp_path / "nncodec"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nn.py").write_text("raise SystemExit('the package itself')")
    script = (FOLDER / "nncodec_peer.py").relative_to(here)
    done = subprocess.run(
        [sys.executable, str(script), "decode", "a.nnc", "a.safetensors"],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.endswith("the package itself\n")
