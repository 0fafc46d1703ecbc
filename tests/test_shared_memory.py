"""Tensors that show a part of each other's memory: each is stored by itself, and comes back so."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.model import overlapping


class Held(nn.Module):
    """A layer, and tensors beside it."""

    def __init__(self, **beside: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)
        for name, value in beside.items():
            if name.startswith("b"):
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def shared(kind: str) -> Held:
    torch.manual_seed(0)
    if kind == "expanded":
        return Held(p=torch.randn(1, 6).expand(5, 6), b=torch.randn(4, 1).expand(4, 7))
    memory = torch.randn(100)
    if kind == "overlapping":
        return Held(p=memory[:60].view(6, 10), q=memory[30:90].view(10, 6), b=memory[80:])
    return Held(p=memory.as_strided((12, 5), (3, 1)), b=memory[60:])  # windows


KINDS = ["expanded", "overlapping", "windows"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_what_the_archive_holds(kind: str, tmp_path: Path) -> None:
    dither.compress(shared(kind), 1000).save(tmp_path / "a.dither")
    model = shared(kind)
    before = {name: id(value) for name, value in model.named_parameters()}
    found = dither.load_into(model, tmp_path / "a.dither")
    assert found.exact
    archive = dither.load(tmp_path / "a.dither")
    for name, value in model.state_dict().items():
        assert torch.equal(value, archive[name]), name
    assert {name: id(value) for name, value in model.named_parameters()} == before
    assert overlapping(model.state_dict()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_data_can_be_used_and_the_model_stays_as_it_was(kind: str) -> None:
    model = shared(kind)
    strides = {name: value.stride() for name, value in model.state_dict().items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    archive = dither.compress(model, 900, data=[torch.randn(16, 6)])
    assert [str(trial) for trial in archive.trials if "failed" in str(trial)] == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.stride() == strides[name]


@pytest.mark.parametrize("kind", KINDS)
def test_training_them_is_refused_by_name(kind: str) -> None:
    model = shared(kind)
    if kind == "windows":  # of the parameter only
        assert overlapping(dict(model.named_parameters())) == ["p"]
    with pytest.raises(dither.SpecError, match=r"p.*memory of its own"):
        dither.attach(model, budget="2x", steps=5)


def test_neighbours_and_ties_do_not_overlap() -> None:
    memory = torch.randn(40)
    columns = memory.view(4, 10)
    apart = {"a": memory[:20], "b": memory[20:], "tied": memory[:20], "none": memory[:0]}
    assert overlapping(apart) == []
    assert overlapping({"left": columns[:, :5], "right": columns[:, 5:]}) == []
    assert overlapping({"left": columns[:, :6], "right": columns[:, 5:]}) == ["left", "right"]
    assert overlapping({"meta": torch.empty(3, device="meta").expand(4, 3)}) == []
