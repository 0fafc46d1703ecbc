"""Codes with a machine: they come back, in fewer bytes, and damage is noticed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dither.coding import CodingError, decode_codes, encode_codes
from dither.coding.parity_contexts import Machine

POLYNOMIALS = (0o13, 0o4)


def steered(shape: tuple[int, ...], apart: float, seed: int = 0) -> tuple[NDArray[np.int64], int]:
    """Codes whose mean depends on the state of the machine, and their alphabet."""
    rng = np.random.default_rng(seed)
    following = Machine(*POLYNOMIALS).following()
    stride = shape[-1] if len(shape) > 1 else 1
    codes = np.zeros((int(np.prod(shape)) // stride, stride), np.int64)
    state = np.zeros(stride, np.int64)
    for row in codes:
        row[:] = np.rint(rng.normal(size=stride) * 1.5 + 12 + apart * (state & 1))
        state = following[2 * state + (row & 1)]
    return np.clip(codes, 0, 31).reshape(shape), 32


# One lane and many; lanes that fill the last axis, and not; vectors; several axes.
SHAPES = [(700,), (70, 9), (40, 30, 41), (300, 200), (3, 40_001), (20_000, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_machine_saves_bytes(shape: tuple[int, ...]) -> None:
    codes, alphabet = steered(shape, 2.0)
    codec, payload = encode_codes(codes, alphabet, POLYNOMIALS)
    assert payload[0] & 0x40
    assert len(payload) < len(encode_codes(codes, alphabet)[1])
    assert np.array_equal(decode_codes(codec, payload, shape, alphabet), codes)


def test_an_idle_machine_costs_nothing() -> None:
    codes, alphabet = steered((80, 50), 0.0)
    assert encode_codes(codes, alphabet, POLYNOMIALS) == encode_codes(codes, alphabet)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    apart=st.integers(0, 9),
    seed=st.integers(0, 99),
    machine=st.sampled_from([POLYNOMIALS, (0o5, 0o2), (0o515, 0o362), (0o3, 0o2)]),
)
def test_round_trip(shape: list[int], apart: int, seed: int, machine: tuple[int, int]) -> None:
    codes, alphabet = steered(tuple(shape), apart, seed)
    codec, payload = encode_codes(codes, alphabet, machine)
    assert np.array_equal(decode_codes(codec, payload, tuple(shape), alphabet), codes)


@pytest.mark.parametrize("shape", [(60, 9), (300, 200)])
def test_damage_is_noticed_or_decodes_to_codes(shape: tuple[int, ...]) -> None:
    codes, alphabet = steered(shape, 2.0)
    codec, payload = encode_codes(codes, alphabet, POLYNOMIALS)
    for place in [*range(30), *range(30, len(payload), max(1, len(payload) // 20))]:
        damaged = bytearray(payload)
        damaged[place] ^= 1 << place % 8
        for copy in (bytes(damaged), payload[:place]):
            try:
                found = decode_codes(codec, copy, shape, alphabet)
            except CodingError:
                continue
            assert found.shape == shape
            assert int(found.max()) < alphabet


@pytest.mark.parametrize(("divisor", "factor"), [(0, 2), (1, 2), (6, 2), (5, 3), (5, 8), (1025, 2)])
def test_what_is_no_machine(divisor: int, factor: int) -> None:
    with pytest.raises(CodingError, match="a machine cannot"):
        Machine(divisor, factor)
