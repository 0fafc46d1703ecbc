"""Bit packing: every width, exact lengths, zero padding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dither.coding import CodingError, crc32, decode_codes
from dither.coding.bits import BitReader, BitWriter, pack_bits, unpack_bits


@pytest.mark.parametrize("width", range(25))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000, (1 << 17) + 3])
def test_round_trip(width: int, count: int) -> None:
    values = np.random.default_rng(width).integers(0, 1 << width, count)
    packed = pack_bits(values, width)
    assert len(packed) == (count * width + 7) // 8
    assert np.array_equal(unpack_bits(packed, count, width), values)


@pytest.mark.parametrize("width", range(1, 25))
def test_the_order_of_bits(width: int) -> None:
    values = np.random.default_rng(width).integers(0, 1 << width, 21)
    number = sum(int(v) << (i * width) for i, v in enumerate(values))
    assert pack_bits(values, width) == number.to_bytes((21 * width + 7) // 8, "little")


@pytest.mark.parametrize("width", [w for w in range(1, 25) if w % 8])
def test_padding_must_be_zero(width: int) -> None:
    packed = bytearray(pack_bits(np.zeros(3, np.int64), width))
    if 3 * width % 8:
        packed[-1] |= 0x80
        with pytest.raises(CodingError, match="not zero"):
            unpack_bits(bytes(packed), 3, width)


@pytest.mark.parametrize("change", [-1, 1])
def test_length_must_be_exact(change: int) -> None:
    with pytest.raises(CodingError, match="10 codes of 3 bits take 4 bytes"):
        decode_codes("bits", bytes(4 + change), (10,), 5)


def test_codes_must_be_below_the_alphabet() -> None:
    with pytest.raises(CodingError, match="not below 5"):
        decode_codes("bits", pack_bits(np.array([0, 5]), 3), (2,), 5)


fields = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 40)).flatmap(
        lambda f: st.tuples(st.just("write"), st.integers(0, (1 << f[1]) - 1), st.just(f[1]))
    ),
    st.tuples(st.just("gamma"), st.integers(1, 1 << 32), st.just(0)),
    st.tuples(st.just("rice"), st.integers(0, 600), st.integers(0, 7)),
)


@given(st.lists(fields, max_size=60))
def test_heads(sequence: list[tuple[str, int, int]]) -> None:
    writer = BitWriter()
    for kind, value, width in sequence:
        getattr(writer, kind)(*((value,) if kind == "gamma" else (value, width)))
    data = writer.getvalue()
    assert len(data) == (len(writer) + 7) // 8
    reader = BitReader(memoryview(data + b"end"))
    for kind, value, width in sequence:
        if kind == "write":
            found = reader.read(width)
        else:
            found = reader.gamma() if kind == "gamma" else reader.rice(width, 600)
        assert found == value
    assert bytes(reader.finish()) == b"end"


def test_heads_that_end_early_or_run_away() -> None:
    with pytest.raises(CodingError, match="ends within"):
        BitReader(memoryview(b"\0")).read(9)
    with pytest.raises(CodingError, match="ends within"):
        BitReader(memoryview(bytes(3))).gamma()
    with pytest.raises(CodingError, match="out of range"):
        BitReader(memoryview(bytes(30))).gamma()
    with pytest.raises(CodingError, match="out of range"):
        BitReader(memoryview(b"\xf0\xff")).rice(2, 5)
    reader = BitReader(memoryview(b"\xf0"))
    reader.read(1)
    with pytest.raises(CodingError, match="not zero"):
        reader.finish()


def test_checksum() -> None:
    assert crc32(b"123456789") == 0xCBF43926
    numbers = np.arange(6, dtype="<f4").reshape(2, 3)
    assert crc32(numbers) == crc32(numbers.tobytes())
    assert crc32(numbers.T) == crc32(numbers.T.tobytes())
