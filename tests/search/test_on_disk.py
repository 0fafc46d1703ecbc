"""Models whose weights are on a disk: the bytes are those of a model in memory."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from itertools import count as numbers
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dither
from dither.archive import Archive
from dither.calibrate import spill
from dither.disk import Disk, disk_of, on_disk
from dither.search import Trial


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Convolutions(nn.Module):
    """With batch norms, of which one takes up shifts of means, and pairs that can be equalized."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.second, self.deep = nn.Conv2d(24, 48, 3), nn.Conv2d(48, 48, 3, groups=48)
        self.head = nn.Linear(48, 10)

    def forward(self, values: Tensor) -> Tensor:
        values = self.norm(self.first(values)).relu()
        values = self.deep(self.second(values).relu()).relu()
        out: Tensor = self.head(values.mean((2, 3)))
        return out


class Tokens(nn.Module):
    """A table that is tied to the head, attention of torch's own, and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.attention = nn.Embedding(96, 32), nn.MultiheadAttention(32, 4)
        self.norm, self.gru = nn.LayerNorm(32), nn.GRU(32, 32, batch_first=True)
        self.head = nn.Linear(32, 96, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        values = self.table(ids)
        values = self.norm(values + self.attention(values, values, values)[0])
        out: Tensor = self.head(self.gru(values)[0])
        return out


class Experts(nn.Module):
    """A stack of matrices, of which each token takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(32, 4), nn.Parameter(torch.randn(4, 64, 32) / 6)
        self.down = nn.Linear(64, 32)

    def forward(self, values: Tensor) -> Tensor:
        chosen = self.gate(values).argmax(-1)
        made = values.new_zeros(len(values), 64)
        for number in range(4):
            made[chosen == number] = functional.linear(values[chosen == number], self.up[number])
        out: Tensor = self.down(made.relu())
        return out


CASES: dict[str, tuple[Callable[[], nn.Module], list[Tensor]]] = {
    "convolutions": (Convolutions, [drawn(4, 3, 12, 12, seed=n) for n in range(3)]),
    "tokens": (
        Tokens,
        [torch.randint(96, (3, 9), generator=torch.Generator().manual_seed(n)) for n in range(3)],
    ),
    "experts": (Experts, [drawn(48, 32, seed=n) for n in range(3)]),
}


def build(case: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[case][0]().eval()


def told(trial: object) -> tuple[str, int, float, str]:
    assert isinstance(trial, Trial)
    return trial.stage, trial.nbytes, trial.distance, trial.error


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_are_those_of_a_model_in_memory(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "_SMALL", 1)
    data, state = CASES[case][1], build(case).state_dict()
    with dither.compress_to(tmp_path / "plain", build(case), "5x", data=data) as plain:
        stages = [told(trial) for trial in plain.trials]
    with on_disk(tmp_path, room=0) as disk:
        model = build(case)
    disk.peak = 0
    with dither.compress_to(tmp_path / "disk", model, "5x", data=data) as made:
        assert [told(trial) for trial in made.trials] == stages
        assert {"data-free", "calibrated", "calibrated, in sequence"} <= {t[0] for t in stages}
        assert not any(t[3] for t in stages)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "disk").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "plain"]
    assert all(disk_of(p) is disk for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def resident(folder: Path) -> int:
    """Bytes of files of a folder, without names, that are in this process's memory."""
    found, is_own = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.partition(" ")[0]:
            is_own = f"{folder}/" in line and line.endswith("(deleted)")
        elif is_own and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


def test_no_more_is_in_memory_at_once_than_a_few_layers(tmp_path: Path) -> None:
    """What the system says is there, whenever anything is reported, and what the disk was told."""
    torch.manual_seed(0)
    room, width, count = 1 << 16, 128, 6
    with on_disk(tmp_path, room=room) as disk:
        model = nn.Sequential(
            *(part for _ in range(count) for part in (nn.Linear(width, width), nn.ReLU()))
        )
    disk.peak, layer = 0, 4 * width * width  # as large as its moments
    data, seen, times = [drawn(64, width, seed=n) for n in range(2)], dict[str, int](), numbers()

    def look(stage: str, *_: object) -> None:
        stage = stage.rpartition(" ")[0]  # without the name of a tensor
        if stage not in seen or next(times) % 6 == 0:
            seen[stage] = max(seen.get(stage, 0), resident(tmp_path))

    path = tmp_path / "file"
    dither.compress_to(path, model, "6x", data=data, progress=look).close()
    assert disk.nbytes > 4 * count * layer  # there were copies of all
    assert room < disk.peak <= 2 * layer + 4 * width  # a copy reads one and writes one
    assert any("equalized" in stage for stage in seen)
    if Path("/proc/self/smaps").is_file():
        assert 0 < max(seen.values()) <= 6 * layer, max(seen, key=lambda stage: seen[stage])


def test_a_job_that_is_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dither.search.journal.PATIENCE", 0.0)
    data, path = CASES["tokens"][1], tmp_path / "file"
    with on_disk(tmp_path, room=0):
        model = build("tokens")
    with dither.compress_to(tmp_path / "plain", build("tokens"), "5x", data=data):
        pass
    stop = "calibrated, in sequence: encoding in sequence"
    seen: list[str] = []

    def interrupt(stage: str, share: float, *_: Any) -> None:
        seen.append(stage)
        if "encoding in sequence" in stage and share > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dither.compress_to(path, model, "5x", data=data, progress=interrupt)
    assert any("in sequence" in stage for stage in seen), (stop, seen)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.journal", "plain"]
    assert all(
        torch.equal(*pair)
        for pair in zip(
            model.state_dict().values(), build("tokens").state_dict().values(), strict=True
        )
    )
    stages: list[str] = []
    dither.compress_to(
        path, model, "5x", data=data, progress=lambda s, *_: stages.append(s)
    ).close()
    assert stages[0].startswith("going on from")
    assert path.read_bytes() == (tmp_path / "plain").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "plain"]


FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 2, "intermediate_size": 64}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "bert": ("BertModel", {"intermediate_size": 64, "max_position_embeddings": 64}),
    "mixtral": (
        "MixtralForCausalLM",
        {"num_local_experts": 3, "intermediate_size": 32, "num_key_value_heads": 2},
    ),
}
"""Of rotary angles that no file has, weights that are transposed, and experts that are joined."""

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}


def folder(case: str, place: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    name, settings = FOLDERS[case]
    base = name.removesuffix("ForCausalLM").removesuffix("LMHeadModel").removesuffix("Model")
    torch.manual_seed(0)
    sizes = {**(SIZES if case != "gpt2" else {"vocab_size": 96}), **settings}
    config = getattr(transformers, f"{base}Config")(**sizes, bos_token_id=0, eos_token_id=0)
    model = getattr(transformers, name)(config).to(torch.bfloat16)
    model.save_pretrained(place / case, max_shard_size="40kB")
    assert len(list((place / case).glob("*.safetensors"))) > 1
    return place / case


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_of_shards_is_the_same_model(case: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from dither.archive import load_weights
    from dither.cli.data import model_of
    from dither.cli.folders import folder_model

    source = folder(case, tmp_path)
    plain = folder_model(source)
    made = model_of(None, source, load_weights(source), tmp_path)
    assert type(made) is type(plain)
    assert not made.training
    for (name, one), (other, two) in zip(
        [*plain.named_parameters(), *plain.named_buffers()],
        [*made.named_parameters(), *made.named_buffers()],
        strict=True,
    ):
        assert name == other
        assert one.dtype == two.dtype
        assert torch.equal(one, two), name
    homes = {disk_of(p) for p in made.parameters()}
    assert len(homes) == 1
    (home,) = homes
    assert isinstance(home, Disk)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids)[0], made(input_ids=ids)[0])
    assert len(list(made.parameters())) == len(list(plain.parameters()))  # ties


PROGRAM = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))

made = build()

def samples():
    return [torch.randn(16, 24, generator=torch.Generator().manual_seed(i)) for i in range(4)]

def ids():
    draw = [torch.Generator().manual_seed(i) for i in range(3)]
    return [{"input_ids": torch.randint(96, (4, 12), generator=one)} for one in draw]
"""


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"users_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(PROGRAM, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def run(*arguments: str) -> tuple[int, str]:
    from typer.testing import CliRunner

    from dither.cli import app

    result = CliRunner().invoke(app, ["compress", *arguments])
    return result.exit_code, result.stdout + ("" if "--json" in arguments else result.stderr)


@pytest.mark.parametrize("case", ["llama", "own"])
def test_the_command_line_takes_either(case: str, users: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    if case == "own":
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))
        save_file(model.state_dict(), tmp_path / "own.safetensors")
        given = ["own.safetensors", "--data", f"{users}:samples", "--model", f"{users}:build"]
    else:
        given = [str(folder(case, tmp_path)), "--data", f"{users}:ids"]
    for where in ("--on-disk", "--in-memory"):
        code, text = run(*given, where, "--size", "4x", "-o", f"file{where}", "--json")
        assert code == 0, text
        assert "calibrated" in {trial["stage"] for trial in json.loads(text)["trials"]}
    assert (tmp_path / "file--on-disk").read_bytes() == (tmp_path / "file--in-memory").read_bytes()


def test_what_is_large_goes_to_disk_by_itself(
    users: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    seen: list[object] = []

    def noted(output: object, source: nn.Module, *rest: Any, **how: Any) -> Archive:
        seen.append(disk_of(next(source.parameters())))
        return dither.compress_to(output, source, *rest, **how)  # type: ignore[arg-type]

    monkeypatch.setattr("dither.cli.work.compress_to", noted)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    given = ["own.safetensors", "--data", f"{users}:samples", "--model", f"{users}:build"]
    for memory in (1 << 40, 4000):
        monkeypatch.setattr("dither.cli.work.memory_nbytes", lambda memory=memory: memory)
        code, text = run(*given, "--size", "4x", "-o", "file")
        assert code == 0, text
    assert seen[0] is None
    assert isinstance(seen[1], Disk)


def test_a_model_that_is_in_memory_cannot_go_to_disk(users: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    importlib.import_module(users)
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "own.safetensors")
    given = ["own.safetensors", "--data", f"{users}:samples", "--model", f"{users}:made"]
    code, text = run(*given, "--on-disk", "--size", "4x")
    assert code == 2
    assert "name a function" in " ".join(text.split())
    code, text = run("own.safetensors", "--on-disk", "--size", "4x")
    assert code == 2
    assert "go with --data" in " ".join(text.split())
