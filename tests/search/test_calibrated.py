"""Sensitivities measured at the output: what matters is kept, and the model is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.core import Stats
from dither.data import Data, Distance, divergence, squared
from dither.search import Knowledge, calibrated, data_free
from dither.search.calibrated import (
    TRUST,
    _project_logits,
    _project_squares,
    blended,
    with_stats,
)
from dither.testing import same_bits


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TwoBranches(nn.Module):
    """Two layers alike, of which one hardly reaches the output."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Linear(24, 24), nn.Linear(24, 24)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(torch.relu(self.loud(x)))
        output: Tensor = hidden + 0.01 * torch.relu(self.quiet(x))
        return output


def network() -> TwoBranches:
    torch.manual_seed(0)
    return TwoBranches()


LOADER = [normal(32, 24, seed=i) @ normal(24, 24, seed=9) for i in range(4)]


@pytest.mark.parametrize("distance", [squared, divergence])
def test_bytes_go_where_the_output_needs_them(distance: Distance) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    found = calibrated(model, Data(iter(LOADER), distance=distance))
    assert all(same_bits(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    weights = found(model.state_dict())
    ratio = weights["loud.weight"].sensitivity / weights["quiet.weight"].sensitivity
    assert 8 < ratio < 40  # the square of 100 to the power of 0.3, but for luck
    wanted = model.eval()(LOADER[0]).detach()
    errors = []
    for sensitivity in (data_free, found):
        archive = dither.compress(model, 900, sensitivity=sensitivity)
        assert 900 - 64 <= archive.nbytes <= 900
        changed = network().eval()
        dither.load_into(changed, archive)
        errors.append(float(squared(changed(LOADER[0]), wanted).detach()))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize(
    ("distance", "project"), [(squared, _project_squares), (divergence, _project_logits)]
)
def test_projections_have_the_curvature_of_distances(
    distance: Distance, project: Callable[[object, torch.Generator], Tensor]
) -> None:
    logits, change = 2 * normal(6, 5), 1e-3 * normal(6, 5, seed=1)
    found, generator = [], torch.Generator().manual_seed(0)
    for _ in range(20_000):
        output = logits.clone().requires_grad_()
        project(output, generator).backward()
        assert output.grad is not None
        found.append((output.grad * change).sum().square())
    expected = float(distance((logits + change).double(), logits.double()))
    scale = 1.0 if distance is squared else 2 * len(logits)  # a divergence begins with a half
    assert float(torch.stack(found).mean()) == pytest.approx(scale * expected, rel=0.05)


def test_a_distance_of_ones_own_keeps_the_prior() -> None:
    def largest(output: Tensor, original: Tensor) -> Tensor:
        return (output - original).abs().max()

    state = network().state_dict()
    found = calibrated(network(), Data(LOADER, distance=largest))(state)
    prior = data_free(state)
    assert {n: w.sensitivity for n, w in found.items()} == {
        n: w.sensitivity for n, w in prior.items()
    }
    assert found["loud.weight"].gram is not prior["loud.weight"].gram


def test_no_data() -> None:
    with pytest.raises(dither.SpecError, match="no batch"):
        calibrated(network(), [])


def test_moments_lean_towards_the_prior_where_samples_are_few() -> None:
    weighted = data_free({"w": normal(6, 20)})["w"]
    assert weighted.gram is not None
    gram = 7 * torch.eye(20)
    many, few = (with_stats(weighted, Stats(gram=gram, samples=n)) for n in (10**7, 1))
    assert many.gram is not None
    assert few.gram is not None
    assert torch.allclose(many.gram, torch.eye(20), atol=1e-3)
    assert torch.allclose(few.gram, weighted.gram, atol=0.01)
    assert with_stats(weighted, None) is weighted
    assert with_stats(weighted, Stats(gram=torch.zeros(20, 20), samples=9)) is weighted
    groups = Stats(gram=torch.stack([gram, 3 * gram]), samples=10**7)
    assert with_stats(weighted, groups).gram is not None
    assert with_stats(weighted, groups).gram.shape == (20, 20)  # type: ignore[union-attr]


def test_measured_sensitivities_have_their_share() -> None:
    tensors = {name: Knowledge(normal(4, 4), 1.0) for name in "abc"}
    measured = {
        name: Stats(importance=torch.full((4, 4), value), gram=torch.eye(4))
        for name, value in {"a": 1.0, "b": 10_000.0}.items()
    }
    found = {name: w.sensitivity for name, w in blended(tensors, measured).items()}
    assert found["b"] / found["a"] == pytest.approx(10_000**TRUST)
    assert found["a"] * found["b"] == pytest.approx(1)
    assert found["c"] == 1
    assert blended(tensors, {}) == tensors


def test_tables_follow_what_was_read() -> None:
    table = normal(4096, 8)
    model = nn.Sequential(nn.Embedding(4096, 8), nn.Linear(8, 3))
    model[0].weight = nn.Parameter(table)
    read = torch.cat([torch.arange(64), torch.full((500,), 4000)])
    rows = calibrated(model, [read])({"0.weight": table, "token.weight": table})["0.weight"].rows
    assert rows is None  # no token table by its name
    named = nn.ModuleDict({"tokens": model[0], "out": model[1]})
    samples = Data([read], forward=lambda _, batch: model(batch))
    rows = calibrated(named, samples)(named.state_dict())["tokens.weight"].rows
    assert rows is not None
    assert rows[4000] < rows[3999]
    assert rows[64] < rows[3000]
