"""Arrays of numbers: raw bytes, or planes of bytes that are entropy-coded one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dither.coding.bits import CHUNK, BitReader, BitWriter
from dither.coding.errors import CodingError
from dither.coding.part_plan import encode_plain
from dither.coding.payload import decode_rans

Bytes = NDArray[np.uint8]

ITEMSIZES = (1, 2, 4, 8, 16)
"""Bytes of one number. A number of 16 bytes is a complex one, two of 8 bytes side by side."""


def _rotate(planes: list[Bytes]) -> list[Bytes]:
    """Move the top bit of every number to its bottom; planes are given lowest first."""
    return [np.bitwise_or(p << 1, planes[i - 1] >> 7, dtype=np.uint8) for i, p in enumerate(planes)]


def _rotate_back(numbers: Bytes) -> None:
    """The inverse of :func:`_rotate`, in place, of contiguous ``(numbers, planes)``."""
    size = numbers.shape[1]
    for begin in range(0, len(numbers), CHUNK):
        part = numbers[begin : begin + CHUNK]
        if size in (2, 4, 8):
            whole: NDArray[Any] = part.view(f"<u{size}")
            low = whole << whole.dtype.type(8 * size - 1)
            whole >>= whole.dtype.type(1)
            whole |= low
            continue
        above = np.roll(part, -1, axis=1)
        part >>= 1
        part |= above << 7


def _pack_planes(planes: list[Bytes], *, is_rotated: bool) -> bytes:
    head, pieces = BitWriter(), []
    head.write(is_rotated, 1)
    for plane in planes:
        codec, payload = encode_plain(plane, 256)
        head.write(codec == "rans", 1)
        if codec == "rans":
            head.gamma(len(payload))
        pieces.append(payload)
    return head.getvalue() + b"".join(pieces)


def encode_array(data: Bytes, itemsize: int) -> tuple[str, bytes]:
    r"""Compress the bytes of an array of numbers without loss.

    Args:
        data: ``(bytes,)``, little-endian numbers one after the other.
        itemsize: bytes of each number: 1, 2, 4, 8 or 16.

    Returns:
        Codec name, ``"raw"`` or ``"rans"``, and the payload, the smaller of the two.

    Raises:
        ValueError: not a whole number of items.

    >>> encode_array(np.array([1.0, 1.5], "<f4").view(np.uint8), 4)
    ('raw', b'\x00\x00\x80?\x00\x00\xc0?')
    >>> codec, payload = encode_array(np.ones(1000, "<f4").view(np.uint8), 4)
    >>> codec, len(payload)
    ('rans', 25)
    """
    if itemsize not in ITEMSIZES or data.dtype != np.uint8 or data.size % itemsize:
        raise ValueError(f"{data.size} x {data.dtype} is no array of {itemsize}-byte numbers")
    raw = data.tobytes()
    if len(raw) < 32:
        return "raw", raw
    columns = data.reshape(-1, itemsize)
    planes = [np.ascontiguousarray(columns[:, i]) for i in range(itemsize)]
    payload = _pack_planes(planes, is_rotated=False)
    if itemsize > 1:
        # With the sign moved to the other end the top byte of a float is its exponent alone.
        payload = min(payload, _pack_planes(_rotate(planes), is_rotated=True), key=len)
    return ("rans", payload) if len(payload) < len(raw) else ("raw", raw)


def decode_array(codec: str, payload: bytes | memoryview, nbytes: int, itemsize: int) -> Bytes:
    """The inverse of :func:`encode_array`.

    Args:
        codec: ``"raw"`` or ``"rans"``.
        payload: all of it and nothing else.
        nbytes: size of the array in bytes, a multiple of ``itemsize``.
        itemsize: bytes of each number: 1, 2, 4, 8 or 16.

    Returns:
        ``(nbytes,)``, writable.

    Raises:
        CodingError: a payload that is not exactly right, or an impossible request.
    """
    if itemsize not in ITEMSIZES or nbytes < 0 or nbytes % itemsize:
        raise CodingError(f"{nbytes} bytes are no array of {itemsize}-byte numbers")
    if codec == "raw":
        if len(payload) != nbytes:
            raise CodingError(f"raw data takes {nbytes} bytes, not {len(payload)}")
        return np.frombuffer(payload, np.uint8).copy()
    if codec != "rans" or nbytes == 0:
        raise CodingError(f"codec {codec!r} cannot hold {nbytes} bytes of numbers")
    head = BitReader(memoryview(payload))
    count = nbytes // itemsize
    is_rotated = head.read(1)
    sizes = [head.gamma() if head.read(1) else None for _ in range(itemsize)]
    rest = head.finish()
    if len(rest) != sum(count if size is None else size for size in sizes):
        raise CodingError("the planes do not have the length they should")
    out = np.empty((count, itemsize), np.uint8)
    for plane, size in zip(out.T, sizes, strict=True):
        piece, rest = rest[: size if size is not None else count], rest[size or count :]
        is_stored = size is None
        plane[:] = (
            np.frombuffer(piece, np.uint8)
            if is_stored
            else decode_rans(piece, (count,), 256, is_nested=True)
        )
    if is_rotated:
        _rotate_back(out)
    return out.reshape(-1)
