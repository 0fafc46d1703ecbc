"""Sensitivities measured at the output: what matters is kept, and the model is left alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.core import Stats
from dither.search import calibrated, data_free, divergence, squared
from dither.search.calibrated import Measured, blended, with_moments
from dither.search.options import Weighted
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
def test_bytes_go_where_the_output_needs_them(distance: object) -> None:
    assert distance is squared or distance is divergence
    model = network()
    before = copy.deepcopy(model.state_dict())
    found = calibrated(model, iter(LOADER), 900, distance=distance)
    assert all(same_bits(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    weights = found(model.state_dict())
    ratio = weights["loud.weight"].sensitivity / weights["quiet.weight"].sensitivity
    assert 300 < ratio < 30_000  # the square of 100, but for luck and the prior
    wanted = model.eval()(LOADER[0]).detach()
    errors = []
    for sensitivity in (data_free, found):
        archive = dither.compress(model, 900, sensitivity=sensitivity)
        assert 900 - 64 <= archive.nbytes <= 900
        changed = network().eval()
        dither.load_into(changed, archive)
        errors.append(float(squared(changed(LOADER[0]), wanted).detach()))
    assert errors[1] < 0.5 * errors[0]


def test_what_no_budget_was_measured_for() -> None:
    found = calibrated(network(), LOADER, "25%", batches=2)
    with pytest.raises(dither.SpecError, match=r"\['other'\] are no tensors of the model"):
        found({"other": normal(3, 3)})
    with pytest.raises(dither.SpecError, match="no batch"):
        calibrated(network(), [], "25%")


def test_the_model_is_put_back_after_an_error() -> None:
    model, calls = network(), []
    before = copy.deepcopy(model.state_dict())

    def forward(given: nn.Module, batch: Tensor) -> object:
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("enough")
        return given(batch)

    with pytest.raises(RuntimeError, match="enough"):
        calibrated(model, LOADER[:1], 900, forward=forward)
    assert all(same_bits(v, before[k]) for k, v in model.state_dict().items())


def test_moments_lean_towards_the_prior_where_samples_are_few() -> None:
    weighted = data_free({"w": normal(6, 20)})["w"]
    assert weighted.gram is not None
    gram = 7 * torch.eye(20)
    many, few = (with_moments(weighted, Stats(gram=gram, samples=n)) for n in (10**7, 1))
    assert many.gram is not None
    assert few.gram is not None
    assert torch.allclose(many.gram, torch.eye(20), atol=1e-3)
    assert torch.allclose(few.gram, weighted.gram, atol=0.01)
    assert with_moments(weighted, None) is weighted
    assert with_moments(weighted, Stats(gram=torch.zeros(20, 20), samples=9)) is weighted
    groups = Stats(gram=torch.stack([gram, 3 * gram]), samples=10**7)
    assert with_moments(weighted, groups).gram is not None
    assert with_moments(weighted, groups).gram.shape == (20, 20)  # type: ignore[union-attr]


def test_sure_measurements_count_more() -> None:
    tensors = {name: Weighted(normal(4, 4), 1.0) for name in "abcde"}
    sure, unsure = torch.full((8,), 100.0), torch.tensor([0.0] * 7 + [800.0])
    measured = {
        "a": Measured(torch.ones(8), 1.0),
        "b": Measured(sure, 1.0),
        "c": Measured(torch.ones(8), 1.0),
        "d": Measured(unsure, 1.0),
        "e": Measured(torch.ones(8), 1.0),
    }
    found = {name: w.sensitivity for name, w in blended(tensors, measured).items()}
    assert found["b"] == pytest.approx(100)
    assert found["a"] < found["d"] < found["b"]
    assert blended(tensors, {}) == tensors


def test_distances() -> None:
    wanted, other = normal(5, 4), normal(5, 4, seed=1)
    assert float(squared({"x": (2 * wanted,), "y": torch.arange(3)}, [wanted])) == pytest.approx(1)
    expected = nn.functional.kl_div(
        other.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert math.isclose(float(divergence(other, wanted)), float(expected), rel_tol=1e-5)
    for distance in (squared, divergence):
        assert float(distance(wanted, wanted)) == 0
        with pytest.raises(dither.SpecError, match="no floating-point tensor"):
            distance(None, None)
