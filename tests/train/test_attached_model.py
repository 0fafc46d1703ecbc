"""What others do to a model that is attached: save it, compress it, load into it."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dither import LSQ, Affine, SpecError, attach, compress, load_into
from dither.testing import same_bits


class Net(nn.Module):
    """Tied, and saved as other libraries save."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(self.table(tokens))
        return found

    def save_pretrained(self, path: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        torch.save(self.state_dict() if state_dict is None else state_dict, path)


TOKENS = torch.arange(6)


def finished() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model = Net()
    run = attach(model, {"*.weight": LSQ(3), "*.bias": Affine(4)})
    model(TOKENS).square().mean().backward()
    run.step()
    run.finish()
    with torch.no_grad():
        return model, model.eval()(TOKENS)


@pytest.mark.parametrize(
    "copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_save_pretrained_of_a_finished_model_writes_what_is_evaluated(
    copied: object, tmp_path: Path
) -> None:
    model, evaluated = finished()
    copied(model).save_pretrained(tmp_path / "model.pt")  # type: ignore[operator]
    state = torch.load(tmp_path / "model.pt")
    assert state["head.weight"].data_ptr() == state["table.weight"].data_ptr()
    fresh = Net()
    fresh.load_state_dict(state)
    assert same_bits(fresh.eval()(TOKENS), evaluated)


def test_in_training_it_writes_the_weights_in_training(tmp_path: Path) -> None:
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = attach(model, {"*.weight": LSQ(3)})
    model.save_pretrained(tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt")
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert type(run.detach()) is Net


def test_a_model_in_training_is_neither_compressed_nor_loaded_into() -> None:
    archive = compress(Net(), 420)
    for spec in (LSQ(3), Affine(4)):
        model = Net()
        run = attach(model, {"*.weight": spec})
        with pytest.raises(SpecError, match=r"compress: .*attached to a run.*run\.detach\(\)"):
            compress(model, 420)
        with pytest.raises(SpecError, match=r"load_into: .*attached to a run.*run\.detach\(\)"):
            load_into(model, archive)
        run.detach()
        assert load_into(model, archive).exact
        assert set(compress(model, 420)) == set(archive)


def test_the_state_of_a_model_in_training_is_not_compressed() -> None:
    model = Net()
    attach(model, {"*.weight": LSQ(3)})
    with pytest.raises(SpecError, match="attached to a run"):
        compress(model.state_dict(), 420)
