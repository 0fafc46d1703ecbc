"""Whole layers: dropped at random, shared, left out."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from dither import Affine, QuantNoise, SpecError, attach
from dither.train import LayerDrop, Ramp, drop_layers, share_layers


class Stack(nn.Module):
    def __init__(self, count: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def through(model: Stack, x: Tensor, indices: list[int]) -> Tensor:
    for index in indices:
        x = x + torch.tanh(model.layers[index](x))
    return x


def test_dropped_layers_are_the_identity_and_all_are_there_in_evaluation() -> None:
    model, x = Stack(), torch.randn(3, 6)
    names = list(model.state_dict())
    whole = model(x)
    drop = LayerDrop(model.layers, 0.5, seed=1)
    run = attach(model, {"*.weight": Affine(16)}, steps=20, schedules=[drop])
    seen = set()
    for _ in range(20):
        kept = [n for n in range(8) if n not in drop.dropped]
        seen.add(tuple(kept))
        assert torch.equal(model(x), through(model, x, kept))
        run.step()
    assert len(seen) > 10
    run.detach()
    assert torch.equal(model.eval()(x), whole)
    assert list(model.state_dict()) == names
    drop.detach()
    assert type(model.layers) is nn.ModuleList
    assert torch.equal(model.train()(x), whole)


def test_the_rate_is_met_and_draws_follow_seed_and_step() -> None:
    def draws(seed: int) -> list[list[int]]:
        model = Stack()
        drop = LayerDrop(model.layers, 0.2, seed=seed)
        run = attach(model, {"*.weight": Affine(4)}, schedules=[drop])
        found = []
        for _ in range(300):
            found.append(drop.dropped)
            run.step()
        return found

    first = draws(0)
    assert first == draws(0) != draws(1)
    share = sum(map(len, first)) / (300 * 8)
    assert abs(share - 0.2) < 4.5 * (0.16 / 2400) ** 0.5


def test_resuming_draws_the_same() -> None:
    def begin() -> tuple[Stack, LayerDrop]:
        model = Stack()
        return model, LayerDrop(model.layers, Ramp(0.1, 0.9))

    model, drop = begin()
    run = attach(model, {"*.weight": Affine(4)}, steps=10, schedules=[drop])
    for _ in range(7):
        run.step()
    other, again = begin()
    resumed = attach(other, {"*.weight": Affine(4)}, steps=10, schedules=[again])
    resumed.load_state_dict(run.state_dict())
    for _ in range(3):
        assert again.dropped == drop.dropped
        run.step()
        resumed.step()


def test_chunks_fall_together_and_slices_and_copies_keep_what_fell() -> None:
    model = Stack()
    drop = LayerDrop(model.layers, 0.5, chunk=2, seed=3)
    assert drop.dropped
    assert all((n ^ 1) in drop.dropped for n in drop.dropped)
    kept = [id(layer) for layer in model.layers]
    assert [id(layer) for layer in model.layers[:]] == kept
    assert [id(layer) for layer in model.layers[2:]] == [
        id(model.layers[n]) for n in range(2, 8) if n not in drop.dropped
    ]
    assert len(model.layers) == 8
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(list(copied.layers)) == len(kept)
        assert len(list(copied.eval().layers)) == 8


def test_sequentials_and_noise_combine() -> None:
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(6)))
    drop = LayerDrop(model, 0.5, seed=2)
    noise = QuantNoise(Affine(4), p=0.3, kind="proxy")
    run = attach(model, {"*.weight": noise}, schedules=[drop])
    assert 0 < len(drop.dropped) < 6
    x = torch.randn(2, 6)
    wanted = x
    for index in range(6):
        if index not in drop.dropped:
            wanted = model[index](wanted)
    assert torch.equal(model(x), wanted)
    run.detach()
    assert not torch.equal(model(x), wanted)  # without the noise


def test_shared_layers_are_stored_once() -> None:
    model = Stack()
    share_layers(model.layers)
    run = attach(model, {"*.weight": Affine(8)})
    assert len(run.surrogates) == 4
    run.finish()
    shared = run.archive.nbytes
    other = Stack()
    run = attach(other, {"*.weight": Affine(8)})
    run.finish()
    assert shared < 0.75 * run.archive.nbytes
    first, second = (model.layers[n].get_parameter("weight") for n in (0, 1))
    before = first.detach().clone()
    model.train()(torch.randn(3, 6)).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert torch.equal(first, second)
    assert not torch.equal(first, before)


def test_every_other_chunk_is_left_out() -> None:
    model, x = Stack(), torch.randn(2, 6)
    share_layers(model.layers)
    wanted = through(model, x, [0, 1, 4, 5])
    assert drop_layers(model.layers, chunk=2) == [0, 1, 4, 5]
    assert torch.equal(model(x), wanted)
    assert [name for name, _ in model.layers.named_children()] == ["0", "1", "2", "3"]


def test_nonsense_is_refused() -> None:
    model = Stack(4)
    with pytest.raises(SpecError, match="0 to 1"):
        LayerDrop(model.layers, 1.5)
    with pytest.raises(SpecError, match="ModuleList"):
        LayerDrop(model, 0.1)
    model.layers[1] = nn.Linear(6, 7)
    with pytest.raises(SpecError, match="differs in"):
        share_layers(model.layers)
    run = attach(model, {"*.weight": Affine(4)})
    for change in (share_layers, drop_layers):
        with pytest.raises(SpecError, match="before attaching"):
            change(model.layers)
    run.detach()
