"""The states of lanes, as a stream begins with them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dither.coding.bits import pack_bits, packed_nbytes, unpack_bits
from dither.coding.errors import CodingError

LOW = 1 << 16
"""A state below this takes in the next word."""


def pack_states(states: NDArray[np.uint32]) -> bytes:
    """One state: 3 or 4 bytes. More: low halves, 4-bit lengths, and the rest of the high halves."""
    if len(states) == 1:
        state = int(states[0])
        return state.to_bytes(3 + (state >> 24 > 0), "little")
    high = (states >> np.uint32(16)).astype(np.int64)
    lengths = np.frexp(high.astype(np.float64))[1] - 1
    bits = (high[:, None] >> np.arange(16)) & 1
    used = np.arange(16) < lengths[:, None]
    rest = np.packbits(bits[used].astype(np.uint8), bitorder="little").tobytes()
    return (states & 0xFFFF).astype("<u2").tobytes() + pack_bits(lengths, 4) + rest


def unpack_states(payload: memoryview, lanes: int) -> tuple[NDArray[np.uint32], memoryview]:
    """The inverse of :func:`pack_states`, and what follows."""
    if lanes == 1:
        size = 3 + (len(payload) + 1) % 2
        state = int.from_bytes(payload[:size], "little")
        if len(payload) < size or state < (LOW if size == 3 else 1 << 24):
            raise CodingError("the state is missing or out of range")
        return np.array([state], np.uint32), payload[size:]
    begin = 2 * lanes + packed_nbytes(lanes, 4)
    if len(payload) < begin:
        raise CodingError("the payload ends within its states")
    low = np.frombuffer(payload[: 2 * lanes], "<u2").astype(np.uint32)
    lengths = unpack_bits(payload[2 * lanes : begin], lanes, 4)
    total = int(lengths.sum(dtype=np.int64))
    end = begin + packed_nbytes(total, 1)
    if len(payload) < end:
        raise CodingError("the payload ends within its states")
    rest = unpack_bits(payload[begin:end], total, 1)
    bits = np.zeros((lanes, 16), np.uint32)
    bits[np.arange(16) < lengths[:, None]] = rest
    high = (bits << np.arange(16, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
    high |= np.uint32(1) << lengths.astype(np.uint32)
    return (high << np.uint32(16)) | low, payload[end:]
