"""Modules that keep extra state which is no tensor: left out with a word, never in the way."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.checkpoint import read_checkpoint
from dither.model import collect


class Scaled(nn.Linear):
    """Keeps what it is told as its extra state."""

    extra: object = None

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        self.extra = state


def model(extra: object) -> nn.Module:
    torch.manual_seed(0)
    layers = Scaled(16, 24), Scaled(24, 8)
    for layer in layers:
        layer.extra = extra
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


EXTRA = [{"scale": 0.5}, None, b"x", io.BytesIO(b"state"), [1, 2]]


@pytest.mark.parametrize("extra", EXTRA, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("of", [lambda m: m, lambda m: m.state_dict()], ids=["model", "state"])
def test_compress_leaves_it_out_with_a_word(extra: object, of: Callable[..., object]) -> None:
    with pytest.warns(UserWarning, match=r"left out.*0\._extra_state, 2\._extra_state"):
        archive = dither.compress(of(model(extra)), size="1kB")  # type: ignore[arg-type]
    assert set(archive) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    again = model("its own")
    assert dither.load_into(again, archive).exact
    assert torch.equal(again.state_dict()["2.bias"], archive["2.bias"])
    assert again.state_dict()["0._extra_state"] == "its own"


@pytest.mark.filterwarnings("ignore:left out")
def test_attach_and_finish_leave_it_out() -> None:
    made = model({"scale": 0.5})
    with pytest.warns(UserWarning, match="left out"):
        run = dither.attach(made, budget=1200, steps=2)
    optimizer = torch.optim.SGD([*made.parameters()], 1e-3)
    for _ in range(2):
        loss = made(torch.ones(4, 16)).square().mean() + run.penalty()
        loss.backward()
        optimizer.step()
        run.step()
    assert run.finish() <= 1200
    archive = run.archive
    assert set(archive) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_with_data_it_is_left_out(tmp_path: Path) -> None:
    batches = [torch.randn(8, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    with pytest.warns(UserWarning, match="left out"):
        archive = dither.compress(model({"scale": 0.5}), size="1kB", data=batches)
    assert archive.nbytes <= 1000


@pytest.mark.parametrize("extra", EXTRA, ids=lambda e: type(e).__name__)
def test_checkpoints_leave_it_out(extra: object, tmp_path: Path) -> None:
    torch.save(model(extra).state_dict(), tmp_path / "a.pt")
    with pytest.warns(UserWarning, match="left out"):
        state = read_checkpoint(tmp_path / "a.pt")
    assert set(state) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_extra_state_that_is_a_tensor_is_kept() -> None:
    state: dict[str, Tensor] = model(torch.arange(3.0)).state_dict()
    found = collect(state)
    assert {*found.values, *found.aliases} == set(state)
    assert dither.compress(state, size="100%")["2._extra_state"].tolist() == [0, 1, 2]
