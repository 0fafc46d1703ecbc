"""Models on the meta device, which have shapes and no values."""

import copy

import pytest
import torch
from torch import Tensor, nn

import dither
from dither import CheckpointError


class Model(nn.Module):
    """A tied head, a buffer, and a buffer that no state dict has."""

    def __init__(self, *, hidden: bool = False) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(12, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight
        self.norm.weight.requires_grad_(False)
        if hidden:
            self.register_buffer("turns", torch.ones(8), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(self.norm(self.table(tokens)))
        return found


def on_meta(*, hidden: bool = False) -> nn.Module:
    with torch.device("meta"):
        model = Model(hidden=hidden)
        model.head.weight = model.table.weight
    return model.eval()


TOKENS = torch.arange(12)


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, lambda m: m.half()])
def test_a_model_on_the_meta_device_is_given_values(wrap: object) -> None:
    assert callable(wrap)
    model = Model().eval()
    archive = dither.compress(model, 1500)
    expected = copy.deepcopy(model)
    dither.load_into(expected, archive)
    empty = on_meta()
    found = dither.load_into(wrap(empty), archive)
    dtype = empty.table.weight.dtype  # type: ignore[union-attr]
    assert found.exact == (dtype == torch.float32)
    assert empty.head.weight is empty.table.weight  # type: ignore[union-attr]
    assert not empty.norm.weight.requires_grad  # type: ignore[union-attr]
    if found.exact:
        assert torch.equal(empty(TOKENS), expected(TOKENS))
    assert not any(value.is_meta for value in empty.state_dict().values())


def test_values_of_their_own() -> None:
    archive = dither.compress(Model(), 1500)
    one, other = on_meta(), on_meta()
    dither.load_into(one, archive)
    dither.load_into(other, archive)
    with torch.no_grad():
        one.table.weight.zero_()  # type: ignore[union-attr,operator]
    assert other.table.weight.abs().sum() > 0  # type: ignore[union-attr,operator]


def test_what_no_file_has_is_missing() -> None:
    archive = dither.compress(Model(), 1500)
    with pytest.raises(CheckpointError, match="missing in the archive: turns"):
        dither.load_into(on_meta(hidden=True), archive)


def test_one_of_two_shapes_alike_is_missing() -> None:
    """Tensors on the meta device have no memory, and are not tied for all being at the same."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    archive = dither.compress({"0.weight": torch.randn(4, 4), "0.bias": torch.randn(4)}, 500)
    found = dither.load_into(model, archive, strict=False)
    assert found.missing == ("1.weight", "1.bias")
