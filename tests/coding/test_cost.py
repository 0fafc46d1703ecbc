"""Predicted sizes are near the real ones."""

import numpy as np
import pytest
from hypothesis import given, settings

from dither.coding import code_lengths, encode_codes, estimate_from_counts, estimate_nbytes
from dither.coding.part_plan import plan_part
from dither.coding.table_fit import fit_table, written_bits
from dither.coding.tables import Curve
from tests.coding.samples import ALPHABETS, KINDS, Codes, arrays, entropy_nbytes, sample


def check(codes: Codes, alphabet: int) -> None:
    real = len(encode_codes(codes, alphabet)[1])
    assert abs(estimate_nbytes(codes, alphabet) - real) <= max(0.01 * real, 5)


@given(arrays())
@settings(deadline=None, max_examples=150)
def test_estimates(given_codes: tuple[Codes, int]) -> None:
    check(*given_codes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_estimates_of_many_lanes(kind: str, alphabet: int) -> None:
    check(sample(kind, (301, 211), alphabet, 1), alphabet)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [16, 300, 5000, 60_000])
def test_from_counts(kind: str, count: int) -> None:
    codes = sample(kind, (count,), 50, 2)
    counts = np.bincount(codes, minlength=50)
    assert estimate_from_counts(counts) == pytest.approx(estimate_nbytes(codes, 50))


def test_contexts_that_never_occur_cost_no_symbols() -> None:
    # Four spreads three octaves apart: between the inner two lie contexts without a symbol.
    rng = np.random.default_rng(0)
    values = rng.normal(size=(64, 64)) * np.repeat([0.4, 3, 24, 192], 16)[:, None]
    codes = np.clip(np.rint(values) + 500, 0, 999).astype(np.int64)
    payload = encode_codes(codes, 1000)[1]
    assert len(payload) < 0.85 * len(encode_codes(codes.reshape(-1), 1000)[1])
    check(codes, 1000)
    plan = plan_part(codes.reshape(-1).astype(np.int16), codes.shape, 1000, is_thorough=False)
    assert plan.head.contexts is not None
    used = np.bincount(plan.head.contexts.of(codes.shape), minlength=len(plan.fits))
    assert [fit.symbol_bits for fit, n in zip(plan.fits, used, strict=True) if not n] == [0.0] * (
        int((used == 0).sum())
    )
    assert (used == 0).any()


def test_nothing_costs_nothing() -> None:
    assert estimate_nbytes(np.zeros((0, 3), int), 9) == 0
    assert estimate_nbytes(np.zeros((4, 3), int), 1) == 0
    assert estimate_from_counts(np.zeros(9, int)) == 0
    assert estimate_from_counts(np.array([9])) == 0


def test_code_lengths() -> None:
    codes = sample("peaked", (5000,), 60, 3)
    counts = np.bincount(codes, minlength=60)
    lengths = code_lengths(counts)
    assert lengths.shape == (60,)
    assert (counts * lengths).sum() / 8 == pytest.approx(entropy_nbytes(codes))
    assert np.isfinite(lengths).all()
    assert lengths[counts == 0].min() > lengths[counts > 0].max()
    assert np.exp2(-code_lengths(np.array([3.5, 0.25, 0.25]))).sum() == pytest.approx(1)
    assert code_lengths(np.zeros(8)).tolist() == [3.0] * 8


@given(arrays())
@settings(deadline=None, max_examples=60)
def test_tables_know_their_size(given_codes: tuple[Codes, int]) -> None:
    codes = given_codes[0] % 500
    if codes.size:
        counts = np.bincount(codes.reshape(-1), minlength=500)
        for has_escape in (False, True):
            fit = fit_table(counts, 12, has_escape=has_escape)
            is_curve = isinstance(fit.description, Curve)
            size = 500 - (has_escape and is_curve)
            assert written_bits(fit, size) == fit.head_bits
            assert int(fit.table.frequencies.sum()) == 1 << 12
            assert int(fit.table.frequencies.min()) >= 1
