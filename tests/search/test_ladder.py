"""Predictions are near what coding makes of them; exact grids are found; oddities are kept."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.archive import code
from dither.search.knowledge import Choice, Knowledge
from dither.search.ladder import Ladder
from dither.search.predict import GRID_INDEX_NBYTES, can_quantize, half_step, noise_of
from dither.search.priors import prior_gram
from dither.search.proposers import Grid, Stored
from dither.testing import awkward_weights, same_values


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread(*shape: int) -> Tensor:
    return normal(*shape) * normal(*shape, seed=1).abs().sqrt()


WEIGHTS = {
    "normal": normal(100, 60),
    "tiny": normal(100, 60) * 1e-9,
    "laplacian": spread(120, 90),
    "uniform": torch.rand(80, 80, generator=torch.Generator().manual_seed(0)) - 0.5,
    "kernels": normal(32, 20, 3, 3),
    "vector": normal(5000),
    "larger than the sample": spread(400, 200),
    "far from zero": normal(6000).abs() + 1,
    "outliers": normal(90, 90) ** 5,
    "half": normal(80, 80).half(),
}


def measured(choice: Choice, tensor: Knowledge) -> float:
    return code(choice.encode(tensor)).nbytes + (0 if choice.step is None else GRID_INDEX_NBYTES)


def grids(ladder: Ladder) -> list[Choice]:
    return [choice for choice in ladder.choices if choice.step is not None]


def check_convex(ladder: Ladder) -> None:
    choices = ladder.choices
    slopes = []
    for a, b in itertools.pairwise(choices):
        assert b.nbytes > a.nbytes
        assert b.loss < a.loss
        slopes.append((b.loss - a.loss) / (b.nbytes - a.nbytes))
    assert slopes == sorted(slopes)


@pytest.mark.parametrize("is_fed", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_predicted_bytes_are_near_the_coded_ones(name: str, is_fed: bool) -> None:
    value = WEIGHTS[name]
    tensor = Knowledge(value, 1.0, gram=prior_gram(value) if is_fed else None)
    ladder = Ladder.of(tensor)
    check_convex(ladder)
    rms = float(value.float().square().mean().sqrt())
    choices = [choice for choice in grids(ladder) if (choice.step or 0) <= 2 * rms]
    assert len(choices) > 50
    for choice in [*choices[:: len(choices) // 8], ladder.choices[-1]]:
        assert choice.nbytes == pytest.approx(measured(choice, tensor), rel=0.1)


@pytest.mark.parametrize("name", WEIGHTS)
def test_predicted_losses_are_near_the_real_ones(name: str) -> None:
    value = WEIGHTS[name]
    tensor = Knowledge(value, 3.0)
    energy = float(value.double().square().sum())
    # Dropping a tensor, and steps too coarse to be of use, count for more than their error.
    choices = [c for c in Ladder.of(tensor).choices if c.loss > 0 and (c.fed or c.step is None)]
    for choice in choices[:: len(choices) // 8]:
        error = (choice.encode(tensor).decode().double() - value.double()).square().sum()
        # Where the type itself is as coarse, its rounding comes on top.
        noise = noise_of(tensor, choice.loss, energy)
        assert noise == pytest.approx(float(error), rel=0.5 if name == "half" else 0.15)


def test_rows_have_steps_of_their_own() -> None:
    rows = torch.exp2(torch.linspace(-1, 1, 64).mul(4).round() / 4)
    tensor = Knowledge(normal(64, 200), 1.0, rows=rows)
    for choice in grids(Ladder.of(tensor))[10::40]:
        encoded = choice.encode(tensor)
        assert choice.step is not None
        torch.testing.assert_close(
            encoded.params["scale"].float(), choice.step * rows, rtol=0.01, atol=0
        )
        assert choice.nbytes == pytest.approx(measured(choice, tensor), rel=0.15)


def test_a_dropped_tensor_takes_next_to_nothing() -> None:
    tensor = Knowledge(normal(200, 100), 1.0)
    first = Ladder.of(tensor).choices[0]
    assert not first.encode(tensor).decode().any()
    assert first.nbytes == pytest.approx(measured(first, tensor), abs=8)


def test_a_dropped_tensor_with_error_feedback_takes_next_to_nothing() -> None:
    value = normal(200, 100)
    tensor = Knowledge(value, 1.0, gram=prior_gram(value))
    first = Ladder.of(tensor).choices[0]
    assert not first.encode(tensor).decode().any()
    assert first.nbytes == pytest.approx(measured(first, tensor), abs=8)


def ternary() -> Tensor:
    return normal(60, 50).sign() * (normal(60, 50, seed=1) > 0)


EXACT = {
    "ternary": ternary(),
    "scaled ternary": ternary() * 0.037,
    "signs": normal(40, 40).sign(),
    "mask": (normal(50, 30) > 0.3).float(),
    "int8 of a power of two": (normal(80, 80) * 30).round().clamp(-128, 127) * 2.0**-9,
    "counts": torch.arange(400.0),
    "int4 of any scale": (normal(80, 80) * 3).round().clamp(-8, 7) * 0.0123,
    "half": ternary().half(),
    "constant": torch.full((30, 30), 0.3),
    "not a multiple of anything less": torch.tensor([2.0, -4.0, 6.0] * 40),
    "on a line": torch.tensor([3.0, -6.0, 0.0] * 40).double(),
}


@pytest.mark.parametrize("is_fed", [False, True])
@pytest.mark.parametrize("name", EXACT)
def test_exact_grids_are_found(name: str, is_fed: bool) -> None:
    value = EXACT[name]
    tensor = Knowledge(value, 1.0, gram=prior_gram(value) if is_fed else None)
    ladder = Ladder.of(tensor)
    check_convex(ladder)
    choice = ladder.choices[-1]
    assert choice.loss == 0
    if name != "signs":  # stored raw, they take no more bytes than on a grid
        assert choice.step == pytest.approx(float(value[value != 0].abs().min()))
    assert torch.equal(choice.encode(tensor).decode(), value)
    assert measured(choice, tensor) < 0.4 * value.numel() * value.element_size()


def test_what_lies_on_no_grid_is_stored_as_it_is() -> None:
    for value in (normal(60, 50), torch.tensor([1.0, 2.0, 2.5] * 30), torch.tensor([0.1])):
        choice = Ladder.of(Knowledge(value, 1.0)).choices[-1]
        assert (choice.loss, choice.step, choice.proposer) == (0, None, Stored())
        assert torch.equal(choice.encode(Knowledge(value, 1.0)).decode(), value)


ODD = {
    "infinite": torch.tensor([1.0, math.inf, -math.inf] * 20),
    "not a number": torch.tensor([1.0, math.nan] * 20),
    "denormal": normal(20, 20) * 1e-40,
    "beyond float32": normal(50).double() * 1e300,
    "empty": torch.zeros(0, 7),
    "zeros": torch.zeros(30, 30),
    "integers": torch.arange(100),
    "truths": normal(40) > 0,
    "complex": torch.complex(normal(20), normal(20, seed=1)),
}


@pytest.mark.parametrize("name", ODD)
def test_what_cannot_be_rounded_is_stored_as_it_is(name: str) -> None:
    value = ODD[name]
    assert not can_quantize(value)
    (choice,) = Ladder.of(Knowledge(value, 1.0)).choices
    assert choice.loss == 0
    assert same_values(choice.encode(Knowledge(value, 1.0)).decode(), value)
    assert choice.nbytes <= value.numel() * value.element_size() + 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_option_of_awkward_weights_can_be_carried_out(dtype: torch.dtype) -> None:
    for name, value in awkward_weights(dtype).items():
        if name == "huge" and dtype != torch.float16:
            continue  # see below
        for gram in (None, prior_gram(value)):
            tensor = Knowledge(value, 1.0, gram=gram)
            ladder = Ladder.of(tensor)
            check_convex(ladder)
            assert ladder.choices[-1].loss == 0, name
            for choice in ladder.choices[:: max(1, len(ladder.choices) // 5)]:
                decoded = choice.encode(tensor).decode()
                assert bool(decoded.isfinite().all()), name
            assert same_values(ladder.choices[-1].encode(tensor).decode(), value), name


def test_weights_near_the_largest_number_can_be_dropped() -> None:
    tensor = Knowledge(awkward_weights()["huge"], 1.0)
    for choice in Ladder.of(tensor).choices:
        assert bool(choice.encode(tensor).decode().isfinite().all())


@settings(max_examples=40)
@given(exponent=st.integers(-60, 60), seed=st.integers(0, 99), is_spread=st.booleans())
def test_half_step_is_as_accurate_as_float16(exponent: int, seed: int, is_spread: bool) -> None:
    value = normal(3000, seed=seed)
    value = value * value.abs() if is_spread else value
    half = (value.half().double() - value.double()).square().mean()
    step = half_step(value * 2.0**exponent)
    assert (step * 2.0**-exponent) ** 2 / 12 == pytest.approx(float(half), rel=0.35)
    assert half_step(value * 2.0**exponent) == pytest.approx(
        half_step(value) * 2.0**exponent, rel=1e-6
    )


def test_half_step_of_few_values() -> None:
    assert half_step(torch.tensor(1.0)) == pytest.approx(math.sqrt(12) * 2.0**-13)
    assert half_step(torch.zeros(9)) == 0
    assert half_step(torch.full((4,), 1e30)) > 0


def test_corrections_interpolate_between_what_was_measured() -> None:
    ladder = Ladder(tuple(Choice(100.0 * k, 2.0 ** (9 - k), Grid(), 2.0**-k) for k in range(1, 8)))
    assert ladder.corrected({}) is ladder
    corrected = ladder.corrected({0.25: 220.0, 2.0**-6: 600.0})
    check_convex(corrected)
    assert corrected.predict(0.25) == pytest.approx(220)
    assert corrected.predict(2.0**-6) == pytest.approx(600)
    assert corrected.predict(2.0**-7) == pytest.approx(700)
    assert 400 < corrected.predict(2.0**-4) < 420


def test_raw_options_are_not_corrected() -> None:
    raw = Choice(900.0, 0.0, Stored())
    ladder = Ladder((Choice(100.0, 9.0, Grid(), 1.0), Choice(200.0, 1.0, Grid(), 0.5), raw))
    assert ladder.corrected({1.0: 150.0, 0.5: 250.0}).choices[-1] == raw
