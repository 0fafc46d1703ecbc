"""The benchmark of federated averaging: how images are dealt out, and what its messages hold."""

import pickle

import pytest
import torch

from benchmarks import federated
from benchmarks.federated import (
    CLIENTS,
    Data,
    Float32,
    Int8,
    Progress,
    Row,
    averaged,
    lenet,
    shares,
    wires,
)
from dither.integrations.rounds import State, moved
from dither.testing import same_bits


def state(seed: int) -> State:
    torch.manual_seed(seed)
    return {name: value.detach() for name, value in lenet().state_dict().items()}


def step(before: State, seed: int) -> State:
    """What a little training would make of it."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.01 * torch.randn(value.shape, generator=generator)
        for name, value in before.items()
    }


@pytest.mark.parametrize("seed", range(3))
def test_each_image_is_with_one_client_and_classes_are_skewed(seed: int) -> None:
    labels = torch.arange(5000) % 10
    held = shares(labels, seed)
    assert len(held) == CLIENTS
    assert sorted(torch.cat(held).tolist()) == list(range(5000))
    largest = [labels[mine].bincount(minlength=10).max() / max(len(mine), 1) for mine in held]
    assert sum(largest) / CLIENTS > 0.2  # 0.1 if all were alike


def test_a_round_draws_its_images_anew_and_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federated, "PER_ROUND", 1000)
    labels = torch.arange(5000) % 10
    data = Data(torch.zeros(5000, 1), labels, shares(labels, 0))
    for client, mine in enumerate(data.clients):
        first, again, later = (torch.cat(data.batches(client, number, 0)) for number in (1, 1, 2))
        assert torch.equal(first, again)
        assert len(first) == len(first.unique()) == max(1, round(len(mine) / 5))
        assert set(first.tolist()) <= set(mine.tolist())
        assert len(mine) < 10 or not torch.equal(first, later)


@pytest.mark.parametrize("name", ["float32", "int8", "dither 6,000"])
def test_both_ends_have_the_same_and_what_is_lost_comes_later(name: str) -> None:
    wire, model = wires()[name], state(0)
    sent, nbytes = wire.down(model)
    assert all(torch.equal(sent[key], model[key]) for key in model)  # the first is exact
    for number in range(2):
        before = model
        back, up = wire.up(sent, step(sent, number))
        model = moved(model, sent, averaged([back, back], [1, 2]))
        sent, down = wire.down(model)
        for nbytes in (up, down):
            if name == "float32":
                assert nbytes == 4 * 62_006
            elif name == "int8":
                assert nbytes == 62_006 + 4 * len(model)
            else:
                assert nbytes <= wire.size  # type: ignore[attr-defined]
        far = sum(float((model[k] - before[k]).square().sum()) for k in model)
        near = sum(float((model[k] - sent[k]).square().sum()) for k in model)
        assert near < far


def test_int8_is_off_by_half_a_step_at_most() -> None:
    before = state(0)
    after = step(before, 1)
    back, _ = Int8().up(before, after)
    exact, _ = Float32().up(before, after)
    for name, value in exact.items():
        largest = float((value - before[name]).abs().max())
        assert float((back[name] - value).abs().max()) <= largest / 127 * 0.51 + 1e-7


def test_weights_of_the_mean_are_shares_of_images() -> None:
    found = averaged([{"a": torch.tensor([1.0])}, {"a": torch.tensor([4.0])}], [30, 10])
    torch.testing.assert_close(found["a"], torch.tensor([1.75]))


@pytest.mark.parametrize(("name", "clients"), [("float32", 3), ("int8", 2), ("dither 6,000", 1)])
def test_a_training_that_was_stopped_goes_on_as_it_would_have(
    name: str, clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(federated, "CLIENTS", clients)
    monkeypatch.setattr(federated, "PER_ROUND", 100)
    torch.manual_seed(0)
    labels = torch.arange(100) % 10
    data = Data(torch.randn(100, 3, 32, 32), labels, shares(labels, 0))
    row = Row("mqat", name, 0)
    whole = Progress(state(0), wires()[name])
    whole.turn(data, row)
    stopped = pickle.loads(pickle.dumps(whole))
    for each in (whole, stopped):
        each.rounds.append({})
        each.turn(data, row)
    assert (whole.down, whole.up) == (stopped.down, stopped.up)
    assert all(same_bits(value, stopped.model[key]) for key, value in whole.model.items())


def test_rows_are_all_there_once_and_the_first_seed_comes_first() -> None:
    rows = federated.rows(range(3))
    assert len({row.key for row in rows}) == len(rows) == 3 * (5 + 3)
    assert all(row.seed == 0 for row in rows[:8])
