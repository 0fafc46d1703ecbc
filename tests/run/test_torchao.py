"""Models with weights as torchao's tensors: the archive's numbers, and close outputs."""

import copy
import sys

import pytest
import torch
from torch import Tensor, nn

from dither import Affine, CheckpointError, Codebook, Raw, Trellis
from dither.archive import Archive, load_into, pack
from dither.core import DitherError, Format
from dither.model import collect
from dither.run import to_torchao

pytest.importorskip("torchao", reason='pip install "dither[torchao]"')


class Layers(nn.Module):
    """Products of several sizes, a table, and a head that is the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(48, 64)
        self.first = nn.Linear(64, 96)
        self.second = nn.Linear(96, 64)
        self.head = nn.Linear(64, 48, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        made: Tensor = self.head(self.second(torch.relu(self.first(self.table(ids)))))
        return made


IDS = torch.arange(12).reshape(2, 6)


def layers() -> Layers:
    torch.manual_seed(0)
    return Layers().eval()


def packed(model: nn.Module, fmt: Format) -> Archive:
    tensors = collect(model)
    return pack(
        {n: (fmt if v.ndim > 1 else Raw()).encode(v) for n, v in tensors.values.items()},
        tensors.aliases,
    )


@pytest.mark.parametrize(
    ("fmt", "first", "second"),
    [
        (Affine(8), "int8", "int8"),
        (Affine(8, axis=0), "int8", "int8"),
        (Affine(None, axis=0), "int8", "int8"),
        (Trellis(axis=0), "int8", "int8"),
        (Affine(4, axis=0), "int4 in groups of 64", "int4 in groups of 32"),
        (Affine(3, group=32), "int4 in groups of 32", "int4 in groups of 32"),
        (Affine(4, group=16), "int8", "int8"),
        (Affine(8, group=32, grid="asymmetric"), "int8", "int8"),
        (Affine(8, axis=0, grid="asymmetric"), None, None),  # steps beyond -128 to 127
        (Affine(8, axis=1), None, None),
        (Affine(8, group=40), None, None),
        (Codebook(16), None, None),
    ],
    ids=repr,
)
def test_numbers_are_the_archives(fmt: Format, first: str | None, second: str | None) -> None:
    archive, model, dense = packed(layers(), fmt), layers(), layers()
    found = to_torchao(model, archive)
    load_into(dense, archive)
    wanted = {"first.weight": first, "second.weight": second}
    assert found.integers == {name: kind for name, kind in wanted.items() if kind is not None}
    assert set(found.dense) == {"head.weight", *(n for n, kind in wanted.items() if kind is None)}
    with torch.no_grad():
        output, expected_output = model(IDS), dense(IDS)
    assert float((output - expected_output).abs().max()) < 1e-6 * float(output.abs().max())
    for name, kind in found.integers.items():
        weight = model.get_parameter(name)
        inputs = archive[name].shape[1]
        with torch.no_grad():
            read = nn.functional.linear(torch.eye(inputs), weight).T
        if kind == "int8":
            assert torch.equal(weight.dequantize(), archive[name])
        assert torch.equal(read, archive[name])


def test_four_bits_may_take_eight() -> None:
    archive, model = packed(layers(), Affine(4, axis=0)), layers()
    found = to_torchao(model, archive, four_bits=False)
    assert set(found.integers.values()) == {"int8"}
    assert "dense, another layer has the same weight: head.weight" in str(found)


def test_copies_and_state_dicts() -> None:
    archive, model = packed(layers(), Affine(8, axis=0)), layers()
    to_torchao(model, archive)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(IDS), model(IDS))
        other = layers()
        other.load_state_dict(model.state_dict(), assign=True)
        assert torch.equal(other(IDS), model(IDS))


def test_what_does_not_fit_or_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    archive = packed(layers(), Affine(8))
    with pytest.raises(CheckpointError, match="does not fit"):
        to_torchao(nn.Linear(4, 4), archive)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(DitherError, match=r'torchao.*pip install "dither\[torchao\]"'):
        to_torchao(layers(), archive)
