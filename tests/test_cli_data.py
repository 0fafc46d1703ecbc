"""`dither compress --data`: the user's own model and samples, or text for a model folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from dither.archive import Archive
from dither.cli import app

PROGRAM = """
import torch
from torch import nn


def build():
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))


def samples():
    mix = torch.randn(24, 24, generator=torch.Generator().manual_seed(9))
    return [torch.randn(32, 24, generator=torch.Generator().manual_seed(i)) @ mix for i in range(4)]


loader = samples()


def score(model):
    return float(model(loader[0]).std())


number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"users_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(PROGRAM, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return name


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["compress", "model.safetensors", *arguments])
    return result.exit_code, result.stdout + result.stderr


@pytest.mark.parametrize("data", ["samples", "loader"])
def test_data_of_the_users_own(module: str, data: str) -> None:
    given = ["--data", f"{module}:{data}", "--model", f"{module}:build", "--size", "900"]
    code, text = run(*given, "--activations", "int8", "--json")
    assert code == 0, text
    document = json.loads(text)
    assert document["nbytes"] <= 900
    assert document["trials"][0]["stage"] == "data-free"
    assert document["trials"][-1]["stage"] == "activations int8, by token"
    with Archive.open("model.dither") as archive:
        assert set(archive.sites) == {"0@in", "2@in"}
    code, text = run(*given, "--evaluate", f"{module}:score")
    assert code == 0, text
    assert "calibrated, in sequence" in text
    assert "score" in text


def test_tuning_is_the_last_that_is_tried(module: str) -> None:
    given = ["--data", f"{module}:samples", "--model", f"{module}:build", "--size", "1500"]
    code, text = run(*given, "--tune", "--json")
    assert code == 0, text
    document = json.loads(text)
    assert document["nbytes"] <= 1500
    tuned = document["trials"][-1]
    assert tuned["stage"] == "tuned"
    code, text = run(*given, "--json")
    assert code == 0, text
    assert "tuned" not in {trial["stage"] for trial in json.loads(text)["trials"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "MODULE:samples"], "name the model: --model MODULE:FUNCTION"),
        (["--data", "MODULE:nothing", "--model", "MODULE:build"], "has no attribute 'nothing'"),
        (["--data", "nowhere:samples", "--model", "MODULE:build"], "No module named 'nowhere'"),
        (["--data", "lines.txt", "--model", "MODULE:build"], "there is no such file"),
        (["--data", "MODULE:samples", "--model", "build"], "write MODULE:NAME"),
        (["--data", "MODULE:samples", "--model", "MODULE:samples"], "not a torch module"),
        (
            ["--data", "MODULE:samples", "--model", "MODULE:build", "--evaluate", "MODULE:number"],
            "not a function",
        ),
        (["--activations", "int8"], "go with --data"),
        (["--tune"], "go with --data"),
    ],
)
def test_what_is_refused(module: str, arguments: list[str], message: str) -> None:
    code, text = run("--size", "900", *(a.replace("MODULE", module) for a in arguments))
    assert code == 2
    assert message in " ".join(text.split())


def test_weights_that_do_not_fit(module: str, tmp_path: Path) -> None:
    save_file({"0.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    code, text = run("--size", "900", "--data", f"{module}:loader", "--model", f"{module}:build")
    assert code == 2
    assert "does not fit the model" in text
