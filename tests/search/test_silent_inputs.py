"""Inputs that say nothing, or hardly anything, end no way of using data."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dither
from dither.calibrate.use_order import Keep
from dither.data import divergence, squared
from dither.model import evaluating
from dither.search import Trial
from dither.search.size import parse_size


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mlp(depth: int = 1, width: int = 80) -> nn.Sequential:
    torch.manual_seed(0)
    body = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), *body, nn.Linear(width, 5)).eval()


def dead_relu() -> nn.Module:
    model = mlp()
    nn.init.constant_(model[0].bias, -1e3)  # type: ignore[arg-type]
    return model


def dead_norm() -> nn.Module:
    norm = nn.BatchNorm1d(80)
    nn.init.zeros_(norm.weight)
    return nn.Sequential(nn.Linear(80, 80), norm, nn.Linear(80, 80), nn.Linear(80, 5)).eval()


class Query(nn.Module):
    """A learned query, the same for every input, as in DETR and Perceiver."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.project = nn.Parameter(normal(1, 64)), nn.Linear(64, 80)
        self.attention = nn.MultiheadAttention(80, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        query = self.project(self.query).expand(len(x), -1, -1)
        found: Tensor = self.attention(query, x[:, None], x[:, None])[0]
        return found


class Pooled(nn.Module):
    """A linear layer that sees one vector for each image."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.out = nn.Conv2d(3, channels, 3), nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.conv(x).relu().mean((2, 3)))
        return found


class Experts(nn.Module):
    """Two experts, of which the second is called only for inputs that no sample has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.idle, self.out = mlp(), mlp(), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.idle if bool((x > 100).all()) else self.first
        found: Tensor = self.out(chosen(x))
        return found


def zero_layer() -> nn.Module:
    """A branch that begins as 0, as in ControlNet, and a layer that sees nothing else."""
    model = mlp()
    for value in model[0].parameters():
        nn.init.zeros_(value)
    return model


def sentence() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    return nn.Sequential(nn.Embedding(50, 32), layer, nn.Linear(32, 50)).eval()


MANY = [normal(32, 80, seed=i) for i in range(4)]
# All but "idle expert" and "one sentence" once ended a way of using data; these two are controls.
CASES = {
    "dead relu": (dead_relu(), MANY),
    "dead norm": (dead_norm(), MANY),
    "learned query": (Query().eval(), MANY),
    "idle expert": (Experts().eval(), MANY),
    "zero layer": (zero_layer(), MANY),
    "one sample": (mlp(), [normal(1, 80)]),
    "one image": (Pooled().eval(), [normal(1, 3, 8, 8)]),
    "one sentence": (sentence(), [torch.arange(7)[None]]),
    "constant": (mlp(), [torch.ones(32, 80)]),
    "zeros": (mlp(), [torch.zeros(32, 80)]),
    "small": (mlp(), [1e-6 * batch for batch in MANY]),
    "far from zero": (mlp(), [1e4 + 0.1 * batch for batch in MANY]),
    "deep tanh": (mlp(28), MANY),
}


@pytest.mark.parametrize("name", CASES)
def test_every_way_of_using_data_ends_with_a_file(name: str) -> None:
    model, batches = CASES[name]
    archive = dither.compress(copy.deepcopy(model), "8x", data=batches)
    trials = [trial for trial in archive.trials if isinstance(trial, Trial)]
    assert [trial.error for trial in trials] == [""] * len(trials)
    assert "calibrated, in sequence" in [trial.stage for trial in trials]
    with torch.no_grad():
        wanted = [model(batch) for batch in batches]
        dither.load_into(copy.deepcopy(model), archive)
    assert all(bool(output.isfinite().all()) for output in wanted)
    assert min(trial.distance for trial in trials) < 0.5


def test_masked_scores_are_compared_where_they_are_finite() -> None:
    scores = normal(6, 5)
    scores[:, 3] = -torch.inf
    other = scores + 0.1 * normal(6, 5, seed=1)
    for distance in (squared, divergence):
        assert float(distance(scores, scores)) == 0
        assert 0 < float(distance(other, scores)) < 0.1
    other[0, 3] = 7.0
    assert not float(squared(other, scores)) < 0.1


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.body(x)
        return scores.masked_fill(torch.arange(5) == 2, -torch.inf)


def test_a_model_with_masked_scores_is_compressed() -> None:
    for distance in (squared, divergence):
        data = dither.Data(MANY, distance=distance)
        archive = dither.compress(Masked().eval(), "8x", data=data)
        trials = [trial for trial in archive.trials if isinstance(trial, Trial)]
        assert all(0 <= trial.distance < 1 for trial in trials)


def test_a_batch_that_is_no_number_is_named() -> None:
    broken = [MANY[0], MANY[1].clone().fill_(torch.nan)]
    with pytest.raises(dither.SpecError, match="output of batch 1 is not a number"):
        dither.compress(mlp(), "8x", data=broken)


@pytest.mark.parametrize("size", [np.int64(9_000_000), 9e6, np.float32(9e6), 9_000_000])
def test_whole_numbers_are_sizes(size: object) -> None:
    assert parse_size(size, 0) == 9_000_000  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [6.5, float("nan"), float("inf"), True, None, -3e6, 1 + 2j])
def test_other_numbers_are_none(size: object) -> None:
    with pytest.raises(dither.BudgetError):
        parse_size(size, 0)  # type: ignore[arg-type]


def test_evaluating_in_threads_leaves_the_fast_path_as_it_was() -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with evaluating(nn.Linear(1, 1)):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    with evaluating(nn.Linear(1, 1)):
        thread.start()
        entered.wait(10)
    assert not torch.backends.mha.get_fastpath_enabled()
    leave.set()
    thread.join()
    assert torch.backends.mha.get_fastpath_enabled()


class Catching(nn.Module):
    """Goes on after any ordinary exception of its body."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        try:
            found: Tensor = self.body(x)
        except Exception:  # noqa: BLE001
            found = torch.zeros(len(x), 5)
        return found


def test_a_model_that_catches_exceptions_does_not_run_on() -> None:
    model, reached = Catching().eval(), []
    model.body[-1].register_forward_hook(lambda *_: reached.append("last"))
    model.register_forward_hook(lambda *_: reached.append("output"))
    keep = Keep(model, ["body.0.weight"], most_calls=1)
    keep.run(dither.Data(MANY).forward, model, MANY[0])
    assert [name for name, _ in keep.kept] == ["body.0.weight"]
    assert not reached
