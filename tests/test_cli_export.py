"""`dither export`: archives as ONNX files, from the command line."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import dither
from dither import Activation
from dither.activations import apply, observe
from dither.archive import load_into, pack
from dither.cli import app
from dither.model import collect

ort = pytest.importorskip("onnxruntime", reason='pip install "dither[onnx]"')
pytest.importorskip("onnxscript", reason='pip install "dither[onnx]"')

PROGRAM = """
import torch
from torch import nn


def build():
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))


def samples():
    return [(torch.ones(2, 24), torch.zeros(2))]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"exported_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(PROGRAM, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    sites = observe(model, {"2@in": Activation(8)}, [torch.randn(9, 24)])
    tensors = {n: dither.Affine(8).encode(v) for n, v in collect(model).values.items()}
    pack(tensors, sites=sites.to_json()).save("small.dither")
    return name


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["export", *arguments])
    return result.exit_code, result.stdout if not result.exit_code else result.stderr


def test_a_model_of_the_users_own(module: str) -> None:
    given = ["small.dither", "--model", f"{module}:build", "--data", f"{module}:samples"]
    code, text = run(*given, "--to", "onnx")
    assert code == 0, text
    assert "int8, computed with integers: 2.weight" in text
    assert "wrote small.onnx" in text
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    with dither.open("small.dither") as archive:
        apply(model, archive.sites)
        load_into(model, archive)
    batch = torch.randn(5, 24)
    made = ort.InferenceSession("small.onnx").run(None, {"input": batch.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(made), model(batch), rtol=1e-4, atol=1e-5)
    code, text = run(*given, "-o", "deep/other.onnx", "--kernels", "standard", "--json")
    assert code == 0, text
    document = json.loads(text)
    assert document["path"] == "deep/other.onnx"
    assert document["nbytes"] == Path("deep/other.onnx").stat().st_size
    assert document["sites"] == {"2@in": True}
    assert document["difference"] < 1e-5
    assert {one["name"]: one["form"] for one in document["tensors"]}["0.weight"] == "int8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "tflite"], "--to 'tflite': expected onnx"),
        ([], "does not say which model it is of: give --model FOLDER"),
        (["--model", "MODULE:build"], "a batch for Sequential is needed"),
        (["-o", "small.pt"], "has the suffix '.pt'; expected .onnx"),
        (["--model", "MODULE:build", "--data", "MODULE:samples", "--kernels", "x"], "kernels='x'"),
    ],
)
def test_what_cannot_be_exported(module: str, arguments: list[str], message: str) -> None:
    code, text = run("small.dither", *(a.replace("MODULE", module) for a in arguments))
    assert code == 2
    assert message in text
    assert not list(Path().glob("*.onnx"))


@pytest.mark.parametrize("where", ["folder", "file"])
def test_a_model_folder(tmp_path: Path, where: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    folder, small, out = tmp_path / "model", tmp_path / "small", tmp_path / "small.onnx"
    model.save_pretrained(folder)
    if where == "folder":
        made = CliRunner().invoke(app, ["compress", str(folder), "--size", "8x", "-o", f"{small}/"])
        given = [str(small)]
    else:
        small = tmp_path / "small.dither"
        made = CliRunner().invoke(app, ["compress", str(folder), "--size", "8x", "-o", str(small)])
        given = [str(small), "--model", str(folder)]
    assert made.exit_code == 0, made.output
    code, text = run(*given, "-o", str(out), "--json")
    assert code == 0, text
    assert json.loads(text)["difference"] < 1e-4
    session = ort.InferenceSession(str(out))
    assert [one.name for one in session.get_inputs()] == ["input_ids", "attention_mask"]
    load_into(model, small if where == "file" else next(small.glob("*.safetensors")))
    ids = torch.arange(15).reshape(3, 5)
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    fed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    made_output = torch.from_numpy(session.run(["last_hidden_state"], fed)[0])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(made_output, expected, rtol=1e-3, atol=1e-4)
