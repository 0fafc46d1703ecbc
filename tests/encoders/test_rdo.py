"""Rate-distortion rounding: thresholds are the best there are for their table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.archive import Archive, code, pack
from dither.coding import code_lengths
from dither.core import Encoded, SpecError
from dither.encoders import RateDistortion, rdo
from dither.encoders.rdo import SAMPLE, count, find_thresholds, sorted_sample
from dither.testing import check_encoder, same_bits


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def laplacian(size: int, scale: float, seed: int) -> rdo.Floats:
    return np.sort(np.random.default_rng(seed).laplace(size=size) * scale)


def choose(sample: rdo.Floats, found: rdo.Thresholds) -> rdo.Ints:
    return found.codes[np.searchsorted(found.edges, sample)]


def round_trip(encoded: Encoded) -> Encoded:
    return Archive.from_bytes(pack({"weight": encoded}).to_bytes()).encoded("weight")


@settings(max_examples=80)
@given(
    scale=st.floats(0.05, 20),
    strength=st.floats(0.001, 3),
    size=st.integers(2, 3000),
    seed=st.integers(0, 1000),
)
def test_thresholds_are_the_best_for_the_last_table(
    scale: float, strength: float, size: int, seed: int
) -> None:
    sample, tables, envelope = laplacian(size, scale, seed), [], rdo._envelope

    def remember(codes: rdo.Ints, heights: rdo.Floats) -> tuple[rdo.Ints, rdo.Floats]:
        tables.append((codes, heights))
        return envelope(codes, heights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rdo, "_envelope", remember)
        found = find_thresholds(sample, strength)
    if not tables:
        assert len(found.codes) > 1024
        return
    codes, heights = tables[-1]
    rate = heights - codes * codes
    costs = (sample[:, None] - codes) ** 2 + rate
    chosen = (sample - choose(sample, found)) ** 2 + rate[
        np.searchsorted(codes, choose(sample, found))
    ]
    np.testing.assert_allclose(chosen, costs.min(axis=1), atol=1e-9)


@settings(max_examples=30)
@given(scale=st.floats(0.2, 10), strength=st.floats(0.01, 0.5), seed=st.integers(0, 1000))
def test_thresholds_are_nearly_the_best_for_their_own_table(
    scale: float, strength: float, seed: int
) -> None:
    sample = laplacian(4000, scale, seed)
    found = find_thresholds(sample, strength)
    lengths = code_lengths(count(sample, found.edges))
    costs = (sample[:, None] - found.codes) ** 2 + strength * lengths
    chosen = np.take_along_axis(costs, np.searchsorted(found.edges, sample)[:, None], 1)
    assert chosen.sum() <= 1.05 * costs.min(axis=1).sum()


@settings(max_examples=100)
@given(
    rates=st.lists(st.floats(0, 50), min_size=1, max_size=12),
    first=st.integers(-9, 3),
    points=st.lists(st.floats(-15, 15), min_size=1, max_size=20),
)
def test_the_envelope(rates: list[float], first: int, points: list[float]) -> None:
    codes = np.arange(first, first + len(rates))
    heights = codes * codes + np.array(rates)
    kept, edges = rdo._envelope(codes, heights)
    assert (np.diff(edges) > 0).all()
    assert len(edges) == len(kept) - 1
    x = np.array(points)
    costs = (x[:, None] - codes) ** 2 + np.array(rates)
    chosen = np.searchsorted(codes, kept[np.searchsorted(edges, x)])
    np.testing.assert_allclose(costs[np.arange(len(x)), chosen], costs.min(axis=1), atol=1e-9)


def test_the_envelope_leaves_out_codes_that_are_never_best() -> None:
    codes = np.arange(-2, 3)
    kept, edges = rdo._envelope(codes, codes * codes + np.array([0.0, 9.0, 0.0, 9.0, 0.0]))
    assert kept.tolist() == [-2, 0, 2]
    assert edges.tolist() == [-1, 1]
    kept, edges = rdo._envelope(codes, codes * codes + np.array([99.0, 99.0, 0.0, 99.0, 99.0]))
    assert kept[[0, -1]].tolist() == [-2, 2]  # far away, even these are nearest
    alone = rdo._envelope(codes[:1], np.array([4.0]))
    assert (alone[0].tolist(), alone[1].tolist()) == ([-2], [])


def test_codes_that_are_never_best_are_not_used() -> None:
    # Where nearly all values are 0 or 6 steps, 1 to 5 are rare, hence long, hence rarer.
    sample = np.sort(np.r_[np.zeros(5000), np.full(5000, 6.0), np.linspace(0, 6, 9)])
    found = find_thresholds(sample, 3.0)
    assert set(found.codes.tolist()) < set(range(7))
    assert {0, 6} <= set(found.codes.tolist())
    weight = torch.from_numpy(sample).float()
    levels = RateDistortion(1.0, 3.0).encode(weight).codes["levels"].values
    assert set(levels.tolist()) <= set(found.codes.tolist())


@settings(max_examples=50)
@given(step=st.floats(0.01, 5), seed=st.integers(0, 1000), rows=st.booleans())
def test_strength_0_rounds_to_nearest(step: float, seed: int, rows: bool) -> None:
    weight = normal(17, 23, seed=seed)
    steps = torch.linspace(0.5, 2, 17) * step if rows else torch.tensor([step])
    scaled = weight / steps[:, None]
    encoded = RateDistortion(steps if rows else step, 0.0).encode(weight)
    codes = encoded.codes["levels"].values - encoded.codes["zero"].values
    is_tie = ((scaled - scaled.floor()) - 0.5).abs() < 1e-5
    assert torch.equal(codes[~is_tie], scaled.round().int()[~is_tie])


@pytest.mark.parametrize("step", [0.1, 0.5, 1.0, 2.0])
def test_bytes_fall_and_errors_rise_with_strength(step: float) -> None:
    weight = normal(150, 100)
    results = [RateDistortion(step, s).encode(weight) for s in (0, 0.03, 0.1, 0.3, 1.0)]
    sizes = [code(encoded).nbytes for encoded in results]
    errors = [float((encoded.decode() - weight).square().sum()) for encoded in results]
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert sizes[-1] < 0.95 * sizes[0]


def test_better_than_a_coarser_grid_of_the_same_size() -> None:
    weight = normal(300, 200) * normal(300, 200, seed=1).abs()
    thrifty = RateDistortion(0.5, 0.1).encode(weight)
    plain = next(
        encoded
        for step in (0.5, 0.505, 0.51, 0.515, 0.52, 0.53, 0.54, 0.55, 0.56)
        if code(encoded := RateDistortion(step, 0.0).encode(weight)).nbytes <= code(thrifty).nbytes
    )
    errors = [float((e.decode() - weight).square().sum()) for e in (thrifty, plain)]
    assert errors[0] < 0.99 * errors[1]


def test_a_sample_has_both_ends() -> None:
    weight = normal(SAMPLE * 3 + 5)
    weight[7], weight[11] = 99.0, -99.0
    sample = sorted_sample(weight)
    assert (sample[0], sample[-1]) == (-99, 99)
    assert (np.diff(sample) >= 0).all()
    assert SAMPLE / 2 < len(sample) <= SAMPLE + 2
    levels = RateDistortion(1.0).encode(weight).decode()
    assert [float(levels[7]), float(levels[11])] == [99, -99]


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    encoded = check_encoder(RateDistortion(0.5), torch.zeros(shape), None, round_trip)
    assert encoded.decode().shape == shape


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e300])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    for size in (60, SAMPLE + 1):
        weight = normal(size).double()
        weight[size // 2 + 1] = value
        with pytest.raises(SpecError, match=r"not finite, or is beyond float32; .*Raw\(\)"):
            RateDistortion(0.5).encode(weight)


def test_values_are_not_rounded_to_infinity() -> None:
    encoded = RateDistortion(2.2e38, 0.0).encode(torch.tensor([3.4e38, -3.4e38, 0.0]))
    assert (encoded.codes["levels"].values - encoded.codes["zero"].values).tolist() == [1, -1, 0]


def test_steps_that_do_not_fit_are_refused() -> None:
    for step in (1e-9, 1e-30):
        with pytest.raises(SpecError, match="too small"):
            RateDistortion(step).encode(torch.tensor([1e9, 1.0]))
    with pytest.raises(SpecError, match="3 steps do not fit"):
        RateDistortion(torch.ones(3)).encode(torch.ones(4, 3))


def test_the_weight_needs_no_layout() -> None:
    weight = normal(20, 30)
    view = torch.empty(30, 20).T.copy_(weight)
    assert same_bits(
        RateDistortion(0.3).encode(weight).decode(), RateDistortion(0.3).encode(view).decode()
    )
