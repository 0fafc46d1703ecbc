"""Lane-interleaved integer rANS: 32-bit states, 16-bit words.

Symbol ``i`` belongs to lane ``i % lanes``, and one turn of the loop codes one symbol in every lane.
The encoder starts each lane at ``2**16 + tail``, where the 16 bits of ``tail`` hold the lane's last
few symbols at fixed width, so that starting a lane costs next to nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dither.coding.bits import pack_bits, packed_nbytes, unpack_bits, width_of
from dither.coding.errors import CodingError
from dither.coding.tables import Table

Symbols = NDArray[Any]

LOW = 1 << 16
"""A state below this takes in the next word."""

MAX_LANES_LOG2 = 15
MAX_ROWS = 1 << 17
"""Turns of the loop: with it, the work of a decoder is bounded by the symbols it returns."""

SCALAR_LANES = 8
"""Up to so many lanes a loop over single symbols beats one over rows."""


@dataclass(frozen=True)
class Geometry:
    """How ``count`` symbols of an alphabet lie in lanes.

    Attributes:
        count: number of symbols.
        lanes: a power of two.
        width: bits of a symbol at fixed width.
    """

    count: int
    lanes: int
    width: int

    @property
    def rows(self) -> int:
        """Turns, the last ones perhaps only for the first lanes."""
        return -(-self.count // self.lanes)

    @property
    def tail(self) -> int:
        """Last turns whose symbols lie in the states that lanes begin with."""
        return min(16 // self.width, self.rows) if self.width else 0

    @property
    def coded(self) -> int:
        """Symbols that are coded, the others being tail."""
        return min(self.count, (self.rows - self.tail) * self.lanes)


def _pack_tail(symbols: Symbols, geometry: Geometry) -> NDArray[np.uint32]:
    state = np.full(geometry.lanes, LOW, np.uint32)
    for turn in range(geometry.tail):
        row = symbols[geometry.coded + turn * geometry.lanes :][: geometry.lanes]
        state[: len(row)] |= row.astype(np.uint32) << np.uint32(turn * geometry.width)
    return state


def _unpack_tail(state: NDArray[np.uint32], geometry: Geometry, out: Symbols, size: int) -> None:
    """Check that every lane ends as an encoder begins, and take the last symbols from it."""
    if (state >> np.uint32(16) != 1).any():
        raise CodingError("the states do not end where an encoder begins")
    rest = state & np.uint32(0xFFFF)
    for turn in range(geometry.tail):
        begin = geometry.coded + turn * geometry.lanes
        row = rest & np.uint32((1 << geometry.width) - 1)
        rest >>= np.uint32(geometry.width)
        length = min(geometry.lanes, geometry.count - begin)
        if (row[:length] >= size).any() or row[length:].any():
            raise CodingError("the last symbols are out of range")
        out[begin : begin + length] = row[:length]
    if rest.any():
        raise CodingError("the states do not end where an encoder begins")


def _encode_scalar(
    symbols: Symbols, geometry: Geometry, frequency: list[int], start: list[int], precision: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    states = _pack_tail(symbols, geometry).tolist()
    words: list[int] = []
    mask = geometry.lanes - 1
    for index in range(geometry.coded - 1, -1, -1):
        symbol = int(symbols[index])
        state, share = states[index & mask], frequency[symbol]
        if state >= share << (32 - precision):
            words.append(state & 0xFFFF)
            state >>= 16
        quotient, rest = divmod(state, share)
        states[index & mask] = (quotient << precision) + rest + start[symbol]
    return np.array(states, np.uint32), np.array(words[::-1], np.uint16)


def _encode_rows(
    symbols: Symbols, geometry: Geometry, frequency: Symbols, start: Symbols, precision: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    states = _pack_tail(symbols, geometry)
    words: list[NDArray[np.uint16]] = []
    lanes = geometry.lanes
    shift, up = np.uint32(precision), np.uint32(32 - precision)
    shares, starts = frequency.astype(np.uint32), start.astype(np.uint32)
    for begin in range((geometry.coded - 1) // lanes * lanes, -1, -lanes):
        row = symbols[begin : min(begin + lanes, geometry.coded)]
        state = states[: len(row)]
        share = shares[row]
        # The limit share << (32 - precision) may be 2**32, hence the shift of the state instead.
        full = np.flatnonzero(state >> up >= share)
        if len(full):
            over = state[full]
            words.append(over.astype(np.uint16))
            state[full] = over >> np.uint32(16)
        quotient = state // share
        state += quotient * ((np.uint32(1) << shift) - share)
        state += starts[row]
    return states, np.concatenate(words[::-1]) if words else np.zeros(0, np.uint16)


def _pack_states(states: NDArray[np.uint32]) -> bytes:
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


def _unpack_states(payload: memoryview, lanes: int) -> tuple[NDArray[np.uint32], memoryview]:
    """The inverse of :func:`_pack_states`, and what follows."""
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


def encode_lanes(
    symbols: Symbols,
    contexts: NDArray[np.uint8] | None,
    tables: Sequence[Table],
    size: int,
    precision: int,
    lanes: int,
) -> bytes:
    """Code symbols with known tables.

    Args:
        symbols: ``(n,)``, unsigned, each below ``size`` and with a frequency in its table.
        contexts: ``(n,)``, the table of each symbol; None for the first one.
        tables: one or more.
        size: number of symbols of the alphabet.
        precision: frequencies sum to ``2**precision``.
        lanes: a power of two.
    """
    geometry = Geometry(len(symbols), lanes, width_of(size))
    frequency = np.zeros((len(tables), size), np.int64)
    start = np.zeros((len(tables), size), np.int64)
    for index, table in enumerate(tables):
        frequency[index, table.symbols] = table.frequencies
        start[index, table.symbols] = np.cumsum(table.frequencies) - table.frequencies
    if contexts is not None:
        tail = symbols[geometry.coded :]
        symbols = symbols.astype(np.int32) + contexts.astype(np.int32) * size
        symbols[geometry.coded :] = tail
    flat_frequency, flat_start = frequency.reshape(-1), start.reshape(-1)
    if lanes <= SCALAR_LANES:
        states, words = _encode_scalar(
            symbols, geometry, flat_frequency.tolist(), flat_start.tolist(), precision
        )
    else:
        states, words = _encode_rows(symbols, geometry, flat_frequency, flat_start, precision)
    return _pack_states(states) + words.astype("<u2").tobytes()


def _decode_scalar(
    states: NDArray[np.uint32],
    words: NDArray[Any],
    contexts: NDArray[np.uint8] | None,
    tables: Sequence[Table],
    coded: int,
    precision: int,
) -> tuple[list[int], NDArray[np.uint32]]:
    lists = [
        (t.symbols.tolist(), t.frequencies.tolist(), np.cumsum(t.frequencies).tolist())
        for t in tables
    ]
    symbols, frequencies, ends = lists[0]
    choice = None if contexts is None else contexts[:coded].tolist()
    current, source = states.tolist(), words.tolist()
    lane_mask, slot_mask = len(current) - 1, (1 << precision) - 1
    out, at = [0] * coded, 0
    for index in range(coded):
        if choice is not None:
            symbols, frequencies, ends = lists[choice[index]]
        state = current[index & lane_mask]
        slot = state & slot_mask
        rank = bisect_right(ends, slot)
        out[index] = symbols[rank]
        share = frequencies[rank]
        state = share * (state >> precision) + slot - ends[rank] + share
        if state < LOW:
            if at == len(source):
                raise CodingError("the payload has too few words")
            state = (state << 16) | source[at]
            at += 1
        current[index & lane_mask] = state
    if at != len(source):
        raise CodingError("the payload has too many words")
    return out, np.array(current, np.uint32)


def _decode_rows(
    states: NDArray[np.uint32],
    words: NDArray[np.uint32],
    contexts: NDArray[np.uint8] | None,
    tables: Sequence[Table],
    out: Symbols,
    precision: int,
) -> None:
    """Decode ``len(out)`` symbols into ``out``; the states are changed in place."""
    symbol_of = np.concatenate([np.repeat(t.symbols, t.frequencies) for t in tables])
    symbol_of = symbol_of.astype(out.dtype)
    # Frequency and offset of every slot in one number; a frequency of 2**16 does not occur.
    packed_of = np.concatenate(
        [
            np.repeat(t.frequencies << 16, t.frequencies)
            + np.arange(1 << precision)
            - np.repeat(np.cumsum(t.frequencies) - t.frequencies, t.frequencies)
            for t in tables
        ]
    ).astype(np.uint32)
    lanes, at, available = len(states), 0, len(words)
    slot_mask, shift = np.uint32((1 << precision) - 1), np.uint32(precision)
    half, low_mask, low = np.uint32(16), np.uint32(0xFFFF), np.uint32(LOW)
    for begin in range(0, len(out), lanes):
        length = min(lanes, len(out) - begin)
        state = states[:length]
        slot = (state & slot_mask).astype(np.intp)
        if contexts is not None:
            slot += contexts[begin : begin + length].astype(np.intp) << precision
        out[begin : begin + length] = symbol_of[slot]
        packed = packed_of[slot]
        state >>= shift
        state *= packed >> half
        state += packed & low_mask
        empty = np.flatnonzero(state < low)
        if len(empty):
            if at + len(empty) > available:
                raise CodingError("the payload has too few words")
            state[empty] = (state[empty] << half) | words[at : at + len(empty)]
            at += len(empty)
    if at != available:
        raise CodingError("the payload has too many words")


def decode_lanes(
    payload: memoryview,
    contexts: NDArray[np.uint8] | None,
    tables: Sequence[Table],
    size: int,
    precision: int,
    lanes: int,
    out: Symbols,
) -> None:
    """The inverse of :func:`encode_lanes`.

    Args:
        payload: everything up to the end.
        contexts: ``(n,)``, the table of each symbol; None for the first one.
        tables: one or more.
        size: number of symbols of the alphabet.
        precision: frequencies sum to ``2**precision``.
        lanes: a power of two.
        out: ``(n,)``, receives the symbols; of a type that holds ``size - 1``.

    Raises:
        CodingError: a payload that :func:`encode_lanes` does not write.
    """
    geometry = Geometry(len(out), lanes, width_of(size))
    if geometry.rows > MAX_ROWS:
        raise CodingError(f"{len(out)} symbols in only {lanes} lanes")
    states, rest = _unpack_states(payload, lanes)
    if len(rest) % 2:
        raise CodingError("the words have an odd number of bytes")
    words = np.frombuffer(rest, "<u2")
    if lanes <= SCALAR_LANES:
        head, states = _decode_scalar(states, words, contexts, tables, geometry.coded, precision)
        out[: geometry.coded] = head
    else:
        body = out[: geometry.coded]
        _decode_rows(states, words.astype(np.uint32), contexts, tables, body, precision)
    _unpack_tail(states, geometry, out, size)
