"""Dead channels, values far apart, infinities: stored well, in memory and time that fit them."""

import math
import time
import tracemalloc

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.search.knowledge import Knowledge
from dither.search.ladder import Ladder
from dither.search.predict import predict_grids
from dither.train.fine_grid import Fine


def variances(dead: float, count: int = 14) -> Tensor:
    alive = torch.rand(31, generator=torch.Generator().manual_seed(0)) + 0.5
    return torch.cat([alive, torch.full((count,), dead)])


def with_a_dead_channel(dead: float) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 32, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    ).eval()
    with torch.no_grad():
        model.get_parameter("0.bias")[3] = -100  # behind the ReLU nothing is left
        model.get_buffer("2.running_var").uniform_(0.5, 2)[3] = dead
    return model


@pytest.mark.parametrize("dead", [5.6e-45, 1e-10, 0.0])
def test_a_dead_channel_takes_nothing_from_the_others(dead: float) -> None:
    model = with_a_dead_channel(dead)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    alive = model.get_buffer("2.running_var").clone()
    archive = dither.compress(model, "4x")
    assert archive.nbytes <= sum(v.numel() * 4 for v in model.state_dict().values()) / 4
    found = archive["2.running_var"]
    assert (found - alive).abs().max() < 0.02
    dither.load_into(model, archive)
    assert (model(x) - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("dead", [5.6e-45, 1e-30, 1e-10, 1e-8, 1e-6])
def test_few_values_take_little_memory_and_time(dead: float) -> None:
    state = {"w": torch.randn(32, 32), "running_var": variances(dead)}
    dither.compress({"w": state["w"]}, "4x")  # what is compiled or cached is not counted
    start = time.monotonic()
    tracemalloc.start()
    archive = dither.compress(state, "4x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6
    assert time.monotonic() - start < 20
    assert torch.allclose(archive["running_var"], state["running_var"], rtol=0.05, atol=1e-7)


@pytest.mark.parametrize("dead", [5.6e-45, 1e-10, 0.0])
def test_the_step_follows_the_values_that_count(dead: float) -> None:
    def finest(value: Tensor) -> float:
        found = dither.search.data_free({"v": value})["v"]
        return float(found.coarsest or 0.0)

    assert finest(variances(dead)) > finest(variances(1.0, 0)) / 2
    fine = Fine().encode(variances(dead))
    plain = Fine().encode(variances(1.0, 0))
    assert fine.params["scale"].item() > plain.params["scale"].item() / 2


@pytest.mark.parametrize("least", [1e-4, 1e-6, 1e-8])
def test_fine_keeps_every_variance_that_counts(least: float) -> None:
    value = torch.cat([torch.full((31,), 100.0), torch.tensor([least])])
    assert Fine().encode(value).decode()[-1].item() == pytest.approx(least, rel=0.5)


def test_predictions_of_values_far_apart_are_bounded() -> None:
    value = torch.logspace(-30, 20, 45)
    tracemalloc.start()
    for found in predict_grids(Knowledge(value, 1.0, coarsest=1e-30)):
        assert found.step > 1e20 / 2**21
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
    assert Ladder.of(Knowledge(value, 1.0)).choices[-1].step is None


FULL = torch.full((), math.inf)
EXTREME = {
    "a single infinity": FULL,
    "an infinity": torch.tensor([1.0, math.inf]),
    "minus infinity": torch.full((3,), -math.inf),
    "NaN": torch.tensor([1.0, math.nan]),
    "beyond float32": torch.tensor([1.0, 1e300], dtype=torch.float64),
    "a single one beyond float32": torch.tensor(1e300, dtype=torch.float64),
}


@pytest.mark.parametrize("value", EXTREME.values(), ids=EXTREME.keys())
def test_what_no_grid_holds_is_stored_exactly(value: Tensor) -> None:
    torch.manual_seed(0)
    state = {"w": torch.randn(64, 64), "b": torch.randn(64), "min_val": value}
    archive = dither.compress(state, "6x")
    assert torch.equal(archive["min_val"].nan_to_num(7.0), value.nan_to_num(7.0))
    assert archive["min_val"].dtype == value.dtype
    # Others are what they are without it.
    assert (archive["w"] - state["w"]).square().mean() < 0.02
    assert (archive["b"] - state["b"]).square().mean() < 0.01


@pytest.mark.parametrize(
    "value", [torch.randn(45) * 1e30, torch.rand(45) * 1e38], ids=["both signs", "positive"]
)
def test_squares_beyond_float32_are_no_trouble(value: Tensor) -> None:
    archive = dither.compress({"w": torch.randn(64, 64), "v": value}, "6x")
    assert (archive["v"].double() - value.double()).norm() < 0.02 * value.double().norm()


def test_a_matrix_with_nan_leaves_other_sensitivities_alone() -> None:
    torch.manual_seed(0)
    state = {"w": torch.randn(64, 64), "b": torch.randn(64), "bad": torch.full((8, 8), math.nan)}
    found = dither.search.data_free(state)
    plain = dither.search.data_free({name: state[name] for name in ("w", "b")})
    assert {n: found[n].sensitivity for n in plain} == {n: plain[n].sensitivity for n in plain}


@pytest.mark.parametrize("value", [-1.5, 0.0, 1e-40, -3e38])
def test_a_tensor_of_no_dimension_may_hold_any_number(value: float) -> None:
    state = {"w": torch.randn(20, 20), "scale": torch.tensor(value)}
    archive = dither.compress(state, 900)
    assert archive.nbytes <= 900
    assert float(archive["scale"]) == pytest.approx(value, rel=0.05)
