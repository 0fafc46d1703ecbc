"""Whole models as ONNX files, run by onnxruntime, against the model that was evaluated."""

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dither import Activation, Affine, Archive, CheckpointError, Codebook, Raw, SpecError, Trellis
from dither.activations import Encodings, apply, observe, placed
from dither.archive import load_into, pack
from dither.core import DitherError, Format
from dither.model import collect
from dither.run import Exported, to_onnx

onnx = pytest.importorskip("onnx", reason='pip install "dither[onnx]"')
ort = pytest.importorskip("onnxruntime", reason='pip install "dither[onnx]"')


class Reader(nn.Module):
    """A table, a convolution, a recurrent layer, a Linear and a head that is the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.conv = nn.Conv1d(32, 16, 3, padding=1)
        self.norm = nn.BatchNorm1d(16)
        self.gru = nn.GRU(16, 12, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(24, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        read = self.norm(self.conv(self.table(ids).mT)).mT
        made: Tensor = self.head(torch.relu(self.linear(self.gru(read)[0])))
        return made


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.last = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.relu6(self.norm(self.first(x)))
        return torch.relu(self.last(self.second(inner)) + x)


class Seer(nn.Module):
    """A block and two products, the first of which has three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.first = nn.Linear(8, 32)
        self.second = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        tokens = self.first(self.block(image).flatten(2).mT)
        return {"tokens": tokens, "logits": self.second(torch.relu(tokens.mean(1)))}


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 1)
            nn.init.normal_(module.bias)
            assert module.running_var is not None
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def packed(
    model: nn.Module, formats: Mapping[str, Format] | Format, sites: Encodings | None = None
) -> Archive:
    """Matrices in formats by name, the rest raw."""
    tensors = collect(model)
    table = formats if isinstance(formats, Mapping) else {}
    encoded = {}
    for name, value in tensors.values.items():
        fmt = table.get(name, Raw()) if isinstance(formats, Mapping) else formats
        encoded[name] = (fmt if value.ndim > 1 else Raw()).encode(value)
    return pack(encoded, tensors.aliases, sites=None if sites is None else sites.to_json())


def operators(found: Exported) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(found.path).graph.node)


def form_of(found: Exported, name: str) -> str:
    return next(one.form for one in found.tensors if one.name == name)


def run(path: Path, **fed: Tensor) -> list[Tensor]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {name: value.numpy() for name, value in fed.items()})
    return [torch.from_numpy(output) for output in outputs]


IDS = torch.arange(14).reshape(2, 7)


def test_layers_of_every_kind_in_formats_of_every_kind(tmp_path: Path) -> None:
    model, path = made(Reader), tmp_path / "reader.onnx"
    formats = {
        "table.weight": Affine(8, axis=0),
        "conv.weight": Affine(4, group=20, grid="asymmetric"),
        "gru.weight_ih_l0": Trellis(axis=0),
        "gru.weight_hh_l0": Affine(4, axis=0),
        "gru.weight_ih_l0_reverse": Affine(8),
        "gru.weight_hh_l0_reverse": Codebook(16),
        "linear.weight": Affine(4, group=16),
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    archive = packed(model, formats)
    found = to_onnx(model, archive, IDS, path)
    assert found.difference is not None
    assert found.difference < 1e-5 * found.largest
    assert [one.name for one in found.decoded] == ["gru.weight_hh_l0_reverse"]
    assert "decoded, having no form of integers (codebook)" in str(found)
    assert form_of(found, "gru.weight_hh_l0_reverse") == "float16"  # its centroids are
    assert form_of(found, "linear.weight") == "4 bits in blocks of 16"
    assert form_of(found, "conv.weight") == "uint4, restored at load"
    assert form_of(found, "table.weight") == "int8, restored at load"
    assert sum(one.name == "table.weight" for one in found.tensors) == 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    load_into(model, archive)
    for count in (1, 5):  # lengths that the sample has not
        ids = torch.randint(50, (count, 7), generator=torch.Generator().manual_seed(count))
        torch.testing.assert_close(run(path, ids=ids)[0], model(ids), rtol=1e-4, atol=1e-5)


def test_bytes_are_those_of_the_integers(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.linear = nn.Embedding(999, 256), nn.Linear(256, 512)

        def forward(self, ids: Tensor) -> Tensor:
            made: Tensor = self.linear(self.table(ids))
            return made

    model = made(Wide)
    sizes = {}
    for bits in (4, 8):
        archive = packed(model, Affine(bits, axis=0))
        found = to_onnx(model, archive, IDS, tmp_path / "wide.onnx")
        assert found.nbytes == found.path.stat().st_size
        sizes[bits] = found.nbytes
        assert found.difference is not None
        assert found.difference < 1e-5
        assert {form_of(found, "table.weight"), form_of(found, "linear.weight")} == (
            {"4 bits in blocks of 256"} if bits == 4 else {"int8", "int8, restored at load"}
        )
    weights = (999 + 512) * 256
    scales = 4 * (999 + 512 + 512)  # and the bias
    assert all(0 < sizes[bits] - weights * bits // 8 - scales < 4000 for bits in sizes)


@pytest.mark.parametrize("fmt", [Affine(8, axis=0), Affine(4), Trellis(axis=0)], ids=repr)
def test_between_quantized_activations_all_is_computed_with_integers(
    tmp_path: Path, fmt: Format
) -> None:
    model = made(Seer)
    image = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    names = ["block.first@in", "block.second@in", "block.last@out", "block@out"]
    plan = dict.fromkeys([*names, "first@in", "second@in"], Activation(8))
    archive = packed(model, fmt, observe(model, plan, [image]))
    found = to_onnx(model, archive, image, tmp_path / "seer.onnx")
    weights = [one for one in found.tensors if one.name.endswith(("first.weight", "second.weight"))]
    assert len(weights) == 4
    assert all(one.form.endswith("computed with integers") for one in weights)
    assert all(found.sites.values())
    session = ort.InferenceSession(str(_optimized(found.path)))
    assert [one.name for one in session.get_outputs()] == ["tokens", "logits"]
    seen = Counter(node.op_type for node in onnx.load(_optimized(found.path)).graph.node)
    assert seen["QLinearConv"] == 2
    assert seen["MatMulIntegerToFloat"] == 2
    assert seen["Conv"] == seen["MatMul"] == seen["BatchNormalization"] == seen["Clip"] == 0
    # A code that falls on the other side of a half moves the rest by a step or so.
    assert found.difference is not None
    assert found.difference < 0.02 * found.largest
    assert placed(model) == {}


def _optimized(path: Path) -> Path:
    """The graph that onnxruntime runs, as a file."""
    options, out = ort.SessionOptions(), path.with_suffix(".optimized")
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(out)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return out


@pytest.mark.parametrize(
    ("spec", "pairs"),
    [
        (Activation(8, symmetric=True), True),
        (Activation(5), True),
        (Activation(12), True),
        (Activation(8, per="token"), False),
        (Activation(8, dynamic=True), False),
        (Activation(8, groups=4), False),
    ],
    ids=repr,
)
def test_activations_of_every_kind(tmp_path: Path, spec: Activation, pairs: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    batch = torch.randn(3, 8)
    sites = observe(model, {"2@in": spec}, [batch])
    found = to_onnx(model, packed(model, Affine(8, axis=0), sites), batch, tmp_path / "m.onnx")
    assert found.sites == {"2@in": pairs}
    assert (operators(found)["QuantizeLinear"] == 1) == pairs
    assert ("rounded in floating point: 2@in" in str(found)) != pairs
    assert found.difference is not None
    assert found.difference < 1e-5
    is_whole = pairs and spec.bits <= 8
    assert ("computed with integers" in form_of(found, "2.weight")) == is_whole


def test_sites_of_functions(tmp_path: Path) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.layer(x) + x.softmax(-1)
            return made

    model, batch = made(Residual), torch.randn(3, 8)
    plan = {"@add": Activation(8), "@softmax": Activation(8), "layer@out": Activation(4)}
    archive = packed(model, Affine(8), observe(model, plan, [batch]))
    found = to_onnx(model, archive, batch, tmp_path / "m.onnx")
    assert found.sites == dict.fromkeys(["@softmax", "@add", "layer@out"], True)
    assert operators(found)["QuantizeLinear"] == 3
    apply(model, archive.sites)
    load_into(model, archive)
    torch.testing.assert_close(run(found.path, x=batch)[0], model(batch))


def test_a_model_with_its_sites_in_place_and_a_batch_of_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4)).eval()
    batch = torch.randn(1, 8)
    plan = {"0@in": Activation(8), "@out": Activation(8)}  # Sequential calls what is put into it
    sites = observe(model, plan, [batch])
    apply(model, sites)
    found = to_onnx(
        model, packed(nn.Sequential(model[0]), Affine(8), sites), [batch, 1], tmp_path / "m.onnx"
    )
    assert operators(found)["QuantizeLinear"] == 2
    assert set(placed(model)) == {"0@in", "@out"}
    assert run(found.path, input=torch.zeros(4, 8))[0].shape == (4, 4)


def test_what_cannot_be_exported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, path = nn.Linear(4, 4), torch.zeros(2, 4), tmp_path / "m.onnx"
    archive = packed(model, Affine(8))
    with pytest.raises(SpecError, match=r"kernels='best'.*'exact', 'fast', 'standard'"):
        to_onnx(model, archive, batch, path, kernels="best")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        to_onnx(nn.Linear(4, 5), archive, batch, path)

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.layer(x)
            return made if float(made.sum()) > 0 else -made

    branching = Branching()
    with pytest.raises(DitherError, match=r"torch\.onnx\.export refuses this Branching"):
        to_onnx(branching, packed(branching, Affine(8)), batch, path)
    assert not path.exists()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(DitherError, match=r'onnxscript.*pip install "dither\[onnx\]"'):
        to_onnx(model, archive, batch, path)


def test_without_onnxruntime_nothing_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    model = nn.Linear(4, 4)
    found = to_onnx(model, packed(model, Affine(8)), torch.zeros(2, 4), tmp_path / "m.onnx")
    assert found.difference is None
    assert "onnxruntime is not installed" in str(found)
