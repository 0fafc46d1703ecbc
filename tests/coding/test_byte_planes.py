"""Arrays of numbers come back exactly, and small or random ones cost nothing extra."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dither.coding import CodingError, decode_array, encode_array

TYPES = ("<f2", "<f4", "<f8", "<c16", "<i4", "<i8", "i1", "u1", "<u2")


def check(numbers: np.ndarray) -> tuple[str, bytes]:
    data = np.ascontiguousarray(numbers).reshape(-1).view(np.uint8)
    codec, payload = encode_array(data, numbers.itemsize)
    back = decode_array(codec, payload, data.size, numbers.itemsize)
    assert back.dtype == np.uint8
    assert np.array_equal(back, data)
    assert len(payload) <= data.size
    assert back.flags.writeable
    return codec, payload


@pytest.mark.parametrize("dtype", TYPES)
@given(count=st.integers(0, 2000), scale=st.floats(0, 100), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_round_trip(dtype: str, count: int, scale: float, seed: int) -> None:
    numbers = np.random.default_rng(seed).normal(size=count) * scale
    check(np.clip(numbers, 0 if "u" in dtype else -99, 99).astype(dtype))


def test_small_ones_are_raw() -> None:
    for count in range(8):
        numbers = np.random.default_rng(1).normal(size=count).astype("<f4")
        assert check(numbers) == ("raw", numbers.tobytes())


def test_noise_is_raw() -> None:
    noise = np.random.default_rng(2).integers(0, 256, 4000, np.uint8)
    assert encode_array(noise, 4) == ("raw", noise.tobytes())


@pytest.mark.parametrize(("dtype", "share"), [("<f4", 0.84), ("<f2", 0.86)])
def test_exponents_compress(dtype: str, share: float) -> None:
    numbers = np.random.default_rng(3).normal(size=5000).astype(dtype)
    assert len(check(numbers)[1]) < share * numbers.nbytes


def test_numbers_of_lower_precision_cost_what_they_hold() -> None:
    numbers = np.random.default_rng(4).normal(size=5000).astype("<f2")
    half, full = (len(check(n)[1]) for n in (numbers, numbers.astype("<f4")))
    assert full < half + 0.15 * numbers.nbytes


@pytest.mark.parametrize("itemsize", [0, 3, 5])
def test_impossible_requests(itemsize: int) -> None:
    with pytest.raises(ValueError, match=f"no array of {itemsize}-byte numbers"):
        encode_array(np.zeros(15, np.uint8), itemsize)
    with pytest.raises(CodingError, match=f"no array of {itemsize}-byte numbers"):
        decode_array("raw", bytes(15), 15, itemsize)


def test_wrong_sizes_and_codecs() -> None:
    with pytest.raises(CodingError, match="takes 8 bytes, not 7"):
        decode_array("raw", bytes(7), 8, 4)
    with pytest.raises(CodingError, match="codec 'bits'"):
        decode_array("bits", bytes(8), 8, 4)
    codec, payload = check(np.ones(100, "<f4"))
    for wrong in (payload + b"\0", payload[:-1], b""):
        with pytest.raises(CodingError):
            decode_array(codec, wrong, 400, 4)
