"""Damaged payloads raise CodingError or decode to valid codes; nothing else happens."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dither.coding import CodingError, decode_array, decode_codes, encode_array, encode_codes
from dither.coding.bits import BitWriter
from tests.coding.samples import sample

PARTS = {
    "small": sample("peaked", (120,), 30, 1),
    "one lane": sample("peaked", (2000,), 40, 1),
    "lanes": sample("peaked", (45_000,), 16, 1),
    "contexts": sample("rows", (40, 12, 3, 3), 40, 1),
    "contexts in lanes": sample("rows", (230, 200), 40, 1),
    "escapes": sample("outliers", (3000,), 60_000, 1),
    "low bits": sample("uniform", (2000,), 60_000, 1) // 2,
    "far symbols": sample("few", (1000,), 1 << 24, 1),
    "constant": sample("constant", (50, 60), 300, 1),
}
ALPHABETS = {"low bits": 60_000, "escapes": 60_000, "far symbols": 1 << 24, "constant": 300}
CODED = {
    name: (*encode_codes(codes, ALPHABETS.get(name, int(codes.max()) + 1)), codes)
    for name, codes in PARTS.items()
}


def attempt(name: str, payload: bytes, codec: str = "rans") -> bool:
    """Whether a payload decodes, to codes that are valid."""
    codes = PARTS[name]
    alphabet = ALPHABETS.get(name, int(codes.max()) + 1)
    try:
        found = decode_codes(codec, payload, codes.shape, alphabet)
    except CodingError:
        return False
    assert found.shape == codes.shape
    assert int(found.min()) >= 0
    assert int(found.max()) < alphabet
    return True


@pytest.mark.parametrize("name", PARTS)
def test_every_truncation_is_refused(name: str) -> None:
    codec, payload, _ = CODED[name]
    assert codec == "rans"
    lengths = range(len(payload))
    for length in lengths if len(payload) < 300 else [*lengths[:200], *lengths[200::97]]:
        # A cut within the words that leaves a whole number of them is found by their number.
        assert not attempt(name, payload[:length])


@pytest.mark.parametrize("name", PARTS)
def test_nothing_may_follow(name: str) -> None:
    _, payload, _ = CODED[name]
    for more in (b"\0", b"\0\0", b"\xff\xff", payload):
        assert not attempt(name, payload + more)


@pytest.mark.parametrize("name", PARTS)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_bit_flips(name: str, data: st.DataObject) -> None:
    _, payload, _ = CODED[name]
    near = data.draw(st.booleans())
    last = min(8 * len(payload), 400) if near else 8 * len(payload)
    for bit in data.draw(st.lists(st.integers(0, last - 1), min_size=1, max_size=4)):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        attempt(name, bytes(damaged))


@pytest.mark.parametrize("name", PARTS)
@given(payload=st.binary(max_size=80))
@settings(deadline=None, max_examples=60)
def test_noise(name: str, payload: bytes) -> None:
    attempt(name, payload)
    attempt(name, payload, "bits")
    # Without reserved flags, so that more of it is read.
    attempt(name, bytes([payload[0] & 0x7F]) + payload[1:] if payload else b"")


def test_every_flip_in_a_head_with_contexts() -> None:
    _, payload, _ = CODED["contexts"]
    for bit in range(8 * 40):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        attempt("contexts", bytes(damaged))


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_arrays(data: st.DataObject) -> None:
    numbers = np.random.default_rng(1).normal(size=500).astype("<f4")
    codec, payload = encode_array(numbers.view(np.uint8), 4)
    assert codec == "rans"
    damaged = bytearray(payload)
    for bit in data.draw(st.lists(st.integers(0, 8 * len(payload) - 1), min_size=1, max_size=3)):
        damaged[bit // 8] ^= 1 << bit % 8
    damaged = damaged[: data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))]
    try:
        assert decode_array(codec, bytes(damaged), 2000, 4).shape == (2000,)
    except CodingError:
        assert damaged != payload


def test_unknown_flags_are_refused() -> None:
    payload = bytearray(CODED["small"][1])
    payload[0] |= 0x80
    with pytest.raises(CodingError, match="unknown flags 0x80"):
        decode_codes("rans", bytes(payload), (120,), int(PARTS["small"].max()) + 1)


@pytest.mark.parametrize("codec", ["raw", "zip", ""])
def test_unknown_codecs(codec: str) -> None:
    with pytest.raises(CodingError, match=f"codec {codec!r} cannot hold 4 codes of 3 symbols"):
        decode_codes(codec, b"\0", (4,), 3)


@pytest.mark.parametrize(("shape", "alphabet"), [((4,), 0), ((4,), (1 << 24) + 1), ((-1,), 3)])
def test_impossible_requests(shape: tuple[int, ...], alphabet: int) -> None:
    with pytest.raises(CodingError, match="no codes have the shape"):
        decode_codes("bits", b"", shape, alphabet)


def one_symbol(symbol: int, alphabet: int) -> bytes:
    """The payload of a constant part."""
    head = BitWriter()
    head.write(0, 8)
    for value, width in ((1, 2), (0, 3), (0, 2), (0, 3)):
        head.write(value, width)
    head.gamma(symbol + 1)
    head.write(15, 4)
    if symbol < alphabet - 1:
        head.rice(0, 0)
        head.gamma(alphabet - 1 - symbol)
    return head.getvalue()


def test_a_constant_part_written_by_hand() -> None:
    found = decode_codes("rans", one_symbol(70, 100), (5, 2), 100)
    assert found.tolist() == [[70, 70]] * 5


def wide_coin(states: bytes) -> bytes:
    """Two symbols of equal frequency, one lane."""
    head = BitWriter()
    head.write(0, 8)
    for value, width in ((0, 2), (0, 3), (0, 2), (0, 3), (15, 4)):
        head.write(value, width)
    head.rice(0, 0)
    return head.getvalue() + states


def test_many_symbols_must_come_in_many_lanes() -> None:
    with pytest.raises(CodingError, match="100000 symbols in only 1 lanes"):
        decode_codes("rans", wide_coin(b"\0\0\1"), (100_000,), 2)


def test_small_payloads_that_claim_much_are_cheap() -> None:
    begin = time.perf_counter()
    tracemalloc.start()
    found = decode_codes("rans", one_symbol(1, 3), (10_000_000,), 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.nbytes == 10_000_000
    assert peak < 2.5 * found.nbytes
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("compiled", ["never", "always"])
@pytest.mark.parametrize("name", PARTS)
def test_memory_of_a_decoder(name: str, compiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITHER_COMPILED", compiled)
    _, payload, codes = CODED[name]
    attempt(name, payload)  # what is loaded and compiled is not counted
    tracemalloc.start()
    attempt(name, payload)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * codes.size + (4 << 20)
