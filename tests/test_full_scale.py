"""The full-scale scripts from end to end on tiny models: resumed, in two processes, shipped."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dither
from dither.recipes import ipq
from examples.full_scale.language_model import LanguageModel, Shape

FOLDER = Path(__file__).parents[1] / "examples" / "full_scale"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Runner":
    return Runner(monkeypatch, capsys)


class Runner:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, script: str, out: Path, *arguments: str) -> str:
        given = [script, "--tiny", "--out", str(out), *arguments]
        self.monkeypatch.setattr(sys, "argv", given)
        self.monkeypatch.setattr(sys, "path", list(sys.path))
        runpy.run_path(str(FOLDER / script), run_name="__main__")
        return self.capsys.readouterr().out


def score(printed: str) -> float:
    return float(printed.partition("score ")[2].partition(":")[0])


def test_the_language_model_has_the_published_size() -> None:
    with torch.device("meta"):
        model = LanguageModel(Shape())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(246.7, abs=0.3)
    assert 4 * count / 2**20 == pytest.approx(942, abs=0.5)
    vectors = 4 * sum(p.numel() for p in model.parameters() if p.ndim == 1) / 2**20
    # 37.84 MiB without biases and norms, for codebooks of q, k and v by themselves.
    assert ipq.size_mib(model, ipq.plan(model)) - vectors == pytest.approx(37.84, abs=0.1)


def test_a_language_models_losses_are_those_of_one_distribution() -> None:
    torch.manual_seed(0)
    shape = Shape(30, (10, 20), layers=1, width=16, inner=32, heads=2, factor=2, dropout=0.0)
    model = LanguageModel(shape).eval()
    with torch.no_grad():
        states = torch.randn(1, 16).expand(30, 16)
        losses = model.embed(states, torch.arange(30))
        assert float((-losses).exp().sum()) == pytest.approx(1, abs=1e-5)
        words = torch.randint(30, (2, 12))
        whole = model(words).view(2, 11)
        assert torch.allclose(model(words, skip=4).view(2, 7), whole[:, 4:], atol=1e-6)
        changed = words.clone()
        changed[:, 6] = (changed[:, 6] + 1) % 30
        assert torch.allclose(model(changed).view(2, 11)[:, :5], whole[:, :5], atol=1e-6)


@pytest.mark.parametrize("method", ["quant-noise", "diffq"])
def test_resuming_changes_nothing(method: str, run: Runner, tmp_path: Path) -> None:
    once = run("wikitext.py", tmp_path / "once", "--method", method, "--steps", "12")
    run("wikitext.py", tmp_path / "twice", "--method", method, "--steps", "12", "--stop", "5")
    assert not (tmp_path / "twice" / "model.dither").exists()
    twice = run("wikitext.py", tmp_path / "twice", "--method", method, "--steps", "12")
    files = [(tmp_path / name / "model.dither").read_bytes() for name in ("once", "twice")]
    assert files[0] == files[1]
    assert score(once) == score(twice) < 100


def test_diffq_learns_the_made_up_language(run: Runner, tmp_path: Path) -> None:
    settings = ("--method", "diffq", "--penalty", "10", "--layerdrop", "0", "--steps", "60")
    printed = run("wikitext.py", tmp_path, *settings)
    assert score(printed) < 15  # of 60 words, three of which can follow
    assert (tmp_path / "model.dither").stat().st_size < 20_000


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(FOLDER / "wikitext.py"), "--tiny"),
            *("--method", "diffq", "--steps", "4", "--out", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "step 4 of 4" in done.stdout
    dither.verify(tmp_path / "model.dither")
    assert score(done.stdout) < 100


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("roberta_mnli.py", ("--steps", "40")),
        ("imagenet.py", ("--model", "deit", "--method", "ipq", "--steps", "30")),
        ("imagenet.py", ("--model", "efficientnet", "--method", "diffq", "--steps", "3")),
        ("imagenet.py", ("--model", "deit", "--method", "quant-noise", "--steps", "30")),
    ],
)
def test_models_of_transformers_train_and_ship(
    script: str, arguments: tuple[str, ...], run: Runner, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    printed = run(script, tmp_path, *arguments)
    dither.verify(tmp_path / "model.dither")
    chance = {"roberta_mnli.py": 100 / 3, "imagenet.py": 25}[script]
    # Three steps teach nothing, but all of it runs.
    assert score(printed) > chance + 15 or "efficientnet" in arguments


def test_without_data_or_packages_the_scripts_say_so(run: Runner, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run.monkeypatch.setattr(sys, "argv", ["imagenet.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="--data"):
        runpy.run_path(str(FOLDER / "imagenet.py"), run_name="__main__")
    names = runpy.run_path(str(FOLDER / "imagenet.py"))
    with pytest.raises(SystemExit, match="pip install no_such_package"):
        names["optional"]("no_such_package", "this test")
