"""Bit packing: fixed-width fields in bulk, and single fields of a payload's head.

Both write bits in little-endian order: the first bit is the lowest bit of the first byte, and the
lowest bit of every field comes first. Unused bits of the last byte are zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dither.coding import bits_twin
from dither.coding.errors import CodingError

MAX_WIDTH = 24
"""The widest field, in bits."""

CHUNK = 1 << 17
"""Values handled at a time, a multiple of 8: it bounds the temporary memory."""

_AHEAD = 32
"""Bytes of a head that are looked at together."""

_FEW = 32
"""Up to so many fields are read one by one."""


def width_of(alphabet: int) -> int:
    """Bits of one fixed-width field for the codes ``0 .. alphabet - 1``.

    >>> [width_of(a) for a in (1, 2, 3, 256, 257)]
    [0, 1, 2, 8, 9]
    """
    return (alphabet - 1).bit_length()


def packed_nbytes(count: int, width: int) -> int:
    """Bytes of ``count`` fields of ``width`` bits."""
    return (count * width + 7) // 8


def code_dtype(alphabet: int) -> np.dtype[Any]:
    """The canonical type of codes: uint8 up to 256 symbols, int16 up to 32,768, else int32."""
    if alphabet <= 1 << 8:
        return np.dtype(np.uint8)
    return np.dtype(np.int16 if alphabet <= 1 << 15 else np.int32)


def _spans(width: int) -> list[tuple[int, int, int]]:
    """Where 8 fields of ``width`` bits meet ``width`` bytes: (byte, field, left shift)."""
    return [
        (byte, field, field * width - byte * 8)
        for byte in range(width)
        for field in range(8)
        if field * width < byte * 8 + 8 and (field + 1) * width > byte * 8
    ]


def pack_bits(values: NDArray[Any], width: int) -> bytes:
    """Pack non-negative integers below ``2**width`` into ``packed_nbytes`` bytes.

    Args:
        values: any shape, any integer type; taken in C order. Not checked.
        width: bits per value, 0 to 24.

    >>> pack_bits(np.array([1, 2, 3]), 3).hex()
    'd100'
    """
    flat = values.reshape(-1)
    if width == 0:
        return b""
    if width == 8:
        return flat.astype(np.uint8).tobytes()
    if width == 16:
        return flat.astype("<u2").tobytes()
    found = bits_twin.packed(flat, width, packed_nbytes(len(flat), width))
    if found is not None:
        return found.tobytes()
    spans = _spans(width)
    pieces = []
    for begin in range(0, len(flat), CHUNK):
        chunk = flat[begin : begin + CHUNK]
        fields = np.zeros((8, -(-len(chunk) // 8)), np.uint32)
        for field in range(8):
            column = chunk[field::8]
            fields[field, : len(column)] = column
        packed = np.zeros((width, fields.shape[1]), np.uint8)
        for byte, field, shift in spans:
            moved = fields[field] << np.uint32(shift) if shift >= 0 else fields[field] >> -shift
            packed[byte] |= moved.astype(np.uint8)
        pieces.append(packed.T.tobytes())
    return b"".join(pieces)[: packed_nbytes(len(flat), width)]


def unpack_bits(payload: bytes | memoryview, count: int, width: int) -> NDArray[Any]:
    """The inverse of :func:`pack_bits`.

    Args:
        payload: exactly ``packed_nbytes(count, width)`` bytes.
        count: number of values.
        width: bits per value, 0 to 24.

    Returns:
        Values of shape ``(count,)``: uint8 up to 8 bits, int16 up to 15, else int32.

    Raises:
        CodingError: wrong length, or unused bits that are not zero.

    >>> unpack_bits(bytes.fromhex("d100"), 3, 3)
    array([1, 2, 3], dtype=uint8)
    """
    expected, mask = packed_nbytes(count, width), (1 << width) - 1
    if len(payload) != expected:
        raise CodingError(
            f"{count} fields of {width} bits take {expected} bytes, not {len(payload)}"
        )
    out = np.zeros(count, code_dtype(1 << width))
    if expected == 0:
        return out
    source = np.frombuffer(payload, np.uint8)
    used = (count * width) % 8
    if used and int(source[-1]) >> used:
        raise CodingError("unused bits of the last byte are not zero")
    if width in (8, 16):
        out[:] = np.frombuffer(payload, "u1" if width == 8 else "<u2")
        return out
    if count <= _FEW:
        number = int.from_bytes(payload, "little")
        out[:] = [number >> index * width & mask for index in range(count)]
        return out
    if 8 % width == 0 and count <= CHUNK:
        columns = source[:, None] >> np.arange(0, 8, width, dtype=np.uint8)
        np.bitwise_and(columns.reshape(-1)[:count], mask, out=out)
        return out
    if bits_twin.unpacked(source, width, out):
        return out
    spans = _spans(width)
    for begin in range(0, count, CHUNK):
        length = min(CHUNK, count - begin)
        groups = -(-length // 8)
        packed = np.zeros(groups * width, np.uint8)
        piece = source[begin // 8 * width :][: groups * width]
        packed[: len(piece)] = piece
        packed_bytes = np.ascontiguousarray(packed.reshape(groups, width).T)
        fields = np.zeros((groups, 8), out.dtype)
        for field in range(8):
            whole = np.zeros(groups, np.uint32)
            for byte, owner, shift in spans:
                if owner == field:
                    moved = packed_bytes[byte].astype(np.uint32)
                    whole |= moved >> shift if shift >= 0 else moved << np.uint32(-shift)
            fields[:, field] = whole & mask
        out[begin : begin + length] = fields.reshape(-1)[:length]
    return out


class BitWriter:
    """Fields of a head, gathered one by one."""

    def __init__(self) -> None:
        self._done = bytearray()
        self._pending = 0
        self._count = 0

    def __len__(self) -> int:
        """Bits written so far."""
        return 8 * len(self._done) + self._count

    def write(self, value: int, width: int) -> None:
        """Append ``width`` bits of ``value``, lowest first."""
        self._pending |= value << self._count
        self._count += width
        if self._count >= 256:
            whole = self._count // 8
            self._done += (self._pending & ((1 << 8 * whole) - 1)).to_bytes(whole, "little")
            self._pending >>= 8 * whole
            self._count -= 8 * whole

    def gamma(self, value: int) -> None:
        """Append a number >= 1: its bit length less one as that many 0 bits and a 1, its rest."""
        rest = value.bit_length() - 1
        self.write(1 << rest, rest + 1)
        self.write(value - (1 << rest), rest)

    def rice(self, value: int, low: int) -> None:
        """Append a number >= 0: ``value >> low`` as 0 bits and a 1, then ``low`` low bits."""
        self.write(1 << (value >> low), (value >> low) + 1)
        self.write(value & ((1 << low) - 1), low)

    def getvalue(self) -> bytes:
        """The bits, filled up with zeros to whole bytes."""
        return bytes(self._done) + self._pending.to_bytes((self._count + 7) // 8, "little")


class BitReader:
    """Reads what :class:`BitWriter` wrote; every method raises CodingError at the end."""

    def __init__(self, payload: memoryview) -> None:
        self._payload = payload
        self._next, self._window, self._held = 0, 0, 0  # bits that were read and not yet taken

    def _fill(self) -> None:
        piece = self._payload[self._next : self._next + _AHEAD]
        if not len(piece):
            raise CodingError("the payload ends within its head")
        self._window |= int.from_bytes(piece, "little") << self._held
        self._next += len(piece)
        self._held += 8 * len(piece)

    def read(self, width: int) -> int:
        """The next ``width`` bits as a number."""
        while width > self._held:
            self._fill()
        value = self._window & ((1 << width) - 1)
        self._window >>= width
        self._held -= width
        return value

    def unary(self, limit: int) -> int:
        """The number of 0 bits before the next 1 bit, refused above ``limit``."""
        zeros = 0
        while not self._window:
            zeros, self._held = zeros + self._held, 0
            if zeros > limit:
                break
            self._fill()
        zeros += max((self._window & -self._window).bit_length() - 1, 0)
        if zeros > limit:
            raise CodingError(f"a number in the head is out of range (more than {limit} zeros)")
        self.read((self._window & -self._window).bit_length())
        return zeros

    def gamma(self) -> int:
        """A number from 1 to 2**33 - 1 written by :meth:`BitWriter.gamma`."""
        rest = self.unary(32)
        return (1 << rest) | self.read(rest)

    def rice(self, low: int, limit: int) -> int:
        """A number written by :meth:`BitWriter.rice`, refused above ``limit``."""
        window = self._window
        stop = (window & -window).bit_length()
        if 0 < stop <= self._held - low:  # as nearly always
            value = ((stop - 1) << low) | ((window >> stop) & ((1 << low) - 1))
            self._window = window >> (stop + low)
            self._held -= stop + low
        else:
            high = self.unary(limit >> low)
            value = (high << low) | self.read(low)
        if value > limit:
            raise CodingError(f"a number in the head is out of range: {value}, limit {limit}")
        return value

    def finish(self) -> memoryview:
        """Skip the zero bits that fill the last byte; the payload after the head."""
        if self.read(self._held % 8):
            raise CodingError("unused bits of the head are not zero")
        return self._payload[self._next - self._held // 8 :]
