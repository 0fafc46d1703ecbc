"""Lane-interleaved integer rANS: 32-bit states, 16-bit words.

Symbol ``i`` belongs to lane ``i % lanes``, and one turn of the loop codes one symbol in every lane.
The encoder starts each lane at ``2**16 + tail``, where the 16 bits of ``tail`` hold the lane's last
few symbols at fixed width, so that starting a lane costs next to nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dither.coding import lanes_twin
from dither.coding.bits import width_of
from dither.coding.errors import CodingError
from dither.coding.lane_states import LOW, pack_states, unpack_states
from dither.coding.parity_contexts import Steering
from dither.coding.tables import Ints, Table

Symbols = NDArray[Any]

MAX_LANES_LOG2 = 15
MAX_ROWS = 1 << 16
"""Turns of the loop; a limit, so that many symbols must come in many lanes, which are fast."""

MAX_COUNT = MAX_ROWS << MAX_LANES_LOG2
"""The most symbols that rANS codes; more are packed as bits."""

SCALAR_LANES = 8
"""Up to so many lanes a loop over single symbols beats one over rows."""

_BLOCK = 1 << 16
"""Symbols whose table look-ups are done together; it bounds the temporary memory."""


def _state_type(lanes: int) -> type[np.int64 | np.uint32]:
    """The type to compute with: the index type saves conversions, but is slow in long rows."""
    return np.int64 if lanes <= 1024 else np.uint32


@dataclass(frozen=True)
class Geometry:
    """How symbols lie in lanes.

    Attributes:
        count: number of symbols.
        lanes: a power of two.
        width: bits of a rank, the place of a symbol among those that its table has.
    """

    count: int
    lanes: int
    width: int

    @classmethod
    def of(cls, count: int, lanes: int, tables: Sequence[Table]) -> Self:
        """The geometry for these tables, one of which has more than one symbol."""
        return cls(count, lanes, width_of(max(len(table.symbols) for table in tables)))

    @property
    def rows(self) -> int:
        """Turns, the last of which may be for the first lanes only."""
        return -(-self.count // self.lanes)

    @property
    def tail(self) -> int:
        """Last turns, whose symbols lie in the states that lanes begin with; at least one."""
        return min(16 // self.width, self.rows)

    @property
    def coded(self) -> int:
        """Symbols that are coded, a whole number of turns."""
        return (self.rows - self.tail) * self.lanes


def _pack_tail(ranks: Symbols, geometry: Geometry) -> NDArray[np.uint32]:
    state = np.full(geometry.lanes, LOW, np.uint32)
    for turn in range(geometry.tail):
        row = ranks[turn * geometry.lanes :][: geometry.lanes]
        state[: len(row)] |= row.astype(np.uint32) << np.uint32(turn * geometry.width)
    return state


def _unpack_tail(state: NDArray[Any], geometry: Geometry) -> NDArray[np.int64]:
    """Check that every lane ends as an encoder begins, and take the last ranks from it."""
    rest = state.astype(np.int64)
    if (rest >> 16 != 1).any():
        raise CodingError("the states do not end where an encoder begins")
    rest &= LOW - 1
    shifts = np.arange(geometry.tail)[:, None] * geometry.width
    ranks = ((rest >> shifts) & ((1 << geometry.width) - 1)).reshape(-1)
    used = geometry.count - geometry.coded
    if (rest >> geometry.tail * geometry.width).any() or ranks[used:].any():
        raise CodingError("the states do not end where an encoder begins")
    return ranks[:used]


def _encode_scalar(
    symbols: Symbols, states: NDArray[np.uint32], frequency: Ints, start: Ints, precision: int
) -> tuple[NDArray[np.uint32], NDArray[Any]]:
    current, shares, starts = states.tolist(), frequency.tolist(), start.tolist()
    words: list[int] = []
    mask, limit = len(current) - 1, 32 - precision
    index = len(symbols)
    for symbol in reversed(symbols.tolist()):
        index -= 1
        state, share = current[index & mask], shares[symbol]
        if state >> limit >= share:
            words.append(state & 0xFFFF)
            state >>= 16
        quotient, rest = divmod(state, share)
        current[index & mask] = (quotient << precision) + rest + starts[symbol]
    return np.array(current, np.uint32), np.array(words[::-1], np.uint16)


def _encode_rows(
    symbols: Symbols, states: NDArray[np.uint32], frequency: Ints, start: Ints, precision: int
) -> tuple[NDArray[np.uint32], NDArray[Any]]:
    lanes = len(states)
    kind: Any = _state_type(lanes)
    state, words = states.astype(kind), []
    shares, starts = frequency.astype(kind), start.astype(kind)
    limit, half, total = kind(32 - precision), kind(16), kind(1 << precision)
    block = max(_BLOCK // lanes, 1) * lanes
    for begin in range((len(symbols) - 1) // block * block, -1, -block):
        piece = symbols[begin : begin + block].reshape(-1, lanes)
        share_rows, start_rows = shares.take(piece), starts.take(piece)
        for share, low in zip(share_rows[::-1], start_rows[::-1], strict=True):
            # A limit of share << (32 - precision) may be 2**32, hence the shift of the state.
            full = ((state >> limit) >= share).nonzero()[0]
            if len(full):
                over = state[full]
                words.append(over.astype(np.uint16))
                state[full] = over >> half
            quotient = state // share
            quotient *= total - share
            state += quotient
            state += low
    return state.astype(np.uint32), np.concatenate(words[::-1]) if words else np.zeros(0, np.uint16)


def _rank_tables(tables: Sequence[Table], size: int) -> tuple[Ints, Ints, Ints]:
    """Rank, frequency and start of every symbol in every table, each ``(tables * size,)``."""
    rank, frequency, start = np.zeros((3, len(tables), size), np.int64)
    for index, table in enumerate(tables):
        rank[index, table.symbols] = np.arange(len(table.symbols))
        frequency[index, table.symbols] = table.frequencies
        start[index, table.symbols] = np.cumsum(table.frequencies) - table.frequencies
    return rank.reshape(-1), frequency.reshape(-1), start.reshape(-1)


def encode_lanes(
    symbols: Symbols,
    contexts: NDArray[np.uint8] | None,
    tables: Sequence[Table],
    precision: int,
    lanes: int,
) -> list[bytes | memoryview]:
    """Code symbols with known tables: pieces of the payload.

    Args:
        symbols: ``(n,)``, unsigned, each with a frequency in its table.
        contexts: ``(n,)``, the table of each symbol; None for the first one.
        tables: one or more, at least one of them with more than one symbol.
        precision: frequencies sum to ``2**precision``.
        lanes: a power of two.
    """
    geometry = Geometry.of(len(symbols), lanes, tables)
    if contexts is None and int(tables[0].symbols[-1]) > 1 << 16:
        # Symbols far apart: work with their ranks.
        symbols = np.searchsorted(tables[0].symbols, symbols)
        ranks = np.arange(len(tables[0].symbols), dtype=np.int64)
        tables = [Table(ranks, tables[0].frequencies)]
    size = 1 + max(int(table.symbols[-1]) for table in tables)
    rank, frequency, start = _rank_tables(tables, size)
    coded = geometry.coded
    tail = _joined(symbols[coded:], None if contexts is None else contexts[coded:], size)
    states = _pack_tail(rank.take(tail), geometry)
    done = lanes_twin.encoded(
        symbols[:coded], contexts, (frequency, start, size), states, precision
    )
    if done is None:
        code = _encode_scalar if lanes <= SCALAR_LANES else _encode_rows
        whole = _joined(symbols, contexts, size)[:coded]
        states, words = code(whole, states, frequency, start, precision)
        done = states, [words]
    states, pieces = done
    return [pack_states(states), *(words.astype("<u2", copy=False).data for words in pieces)]


def _joined(symbols: Symbols, contexts: NDArray[np.uint8] | None, size: int) -> Symbols:
    """One number for symbol and table."""
    if contexts is None:
        return symbols
    return symbols.astype(np.int32) + contexts.astype(np.int32) * np.int32(size)


def _decode_scalar(
    states: NDArray[np.uint32],
    words: NDArray[Any],
    contexts: NDArray[np.uint8] | None,
    tables: Sequence[Table],
    coded: int,
    precision: int,
) -> tuple[list[int], NDArray[np.int64]]:
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
    return out, np.array(current, np.int64)


def _slot_tables(
    tables: Sequence[Table], symbol_type: np.dtype[Any], kind: type[np.int64 | np.uint32]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Symbol, frequency and place within the symbol of every slot, table after table."""
    symbol_of, share_of, place_of = [], [], []
    for table in tables:
        shares = table.frequencies
        starts = np.repeat(np.cumsum(shares) - shares, shares)
        symbol_of.append(np.repeat(table.symbols, shares).astype(symbol_type))
        share_of.append(np.repeat(shares, shares).astype(kind))
        place_of.append((np.arange(len(starts)) - starts).astype(kind))
    return np.concatenate(symbol_of), np.concatenate(share_of), np.concatenate(place_of)


def _decode_rows(
    states: NDArray[np.uint32],
    words: NDArray[Any],
    contexts: NDArray[np.uint8] | None,
    tables: Sequence[Table],
    out: Symbols,
    precision: int,
) -> NDArray[Any]:
    """Decode whole turns into ``out``; the states at the end."""
    lanes = len(states)
    kind: Any = _state_type(lanes)
    symbol_of, share_of, place_of = _slot_tables(tables, out.dtype, kind)
    state = states.astype(kind)
    slot_mask, shift, half, low = kind((1 << precision) - 1), kind(precision), kind(16), kind(LOW)
    factor = np.empty(lanes, kind)
    block = max(_BLOCK // lanes, 1) * lanes
    slots = np.empty((block // lanes, lanes), np.intp)
    table_of: Any = None
    for begin in range(0, len(out), block):
        piece = out[begin : begin + block].reshape(-1, lanes)
        if contexts is not None:
            table_of = contexts[begin : begin + piece.size].astype(np.intp) << precision
            table_of = table_of.reshape(-1, lanes)
        source, at = words[: piece.size].astype(kind), 0
        for row in range(len(piece)):
            slot = np.bitwise_and(state, slot_mask, out=slots[row])
            if contexts is not None:
                np.add(slot, table_of[row], out=slot)
            state >>= shift
            # Slots are within bounds; mode "clip" only spares NumPy a copy.
            state *= share_of.take(slot, out=factor, mode="clip")
            state += place_of.take(slot, out=factor, mode="clip")
            empty = (state < low).nonzero()[0]
            taken = len(empty)
            if taken:
                if at + taken > len(source):
                    raise CodingError("the payload has too few words")
                state[empty] = (state[empty] << half) | source[at : at + taken]
                at += taken
        symbol_of.take(slots[: len(piece)], out=piece, mode="clip")
        words = words[at:]
    if len(words):
        raise CodingError("the payload has too many words")
    return state


def _decode_steered(
    states: NDArray[np.uint32],
    words: NDArray[Any],
    tables: Sequence[Table],
    out: Symbols,
    precision: int,
    steering: Steering,
) -> NDArray[Any]:
    """The same where the table of a symbol depends on those before."""
    found = steering.compiled(states, words.view(np.uint8), out, precision)
    if found is not None:
        return found
    if len(states) <= SCALAR_LANES:
        current = states.tolist()
        out[:] = steering.scalar(current, words.tolist(), len(out), precision)
        return np.array(current, np.int64)
    current_rows = states.astype(np.int64)
    slots = _slot_tables(tables, out.dtype, np.int64)
    steering.rows(current_rows, words, slots, out, precision)
    return current_rows


def decode_lanes(
    payload: memoryview,
    contexts: NDArray[np.uint8] | None,
    tables: Sequence[Table],
    precision: int,
    lanes: int,
    out: Symbols,
    steering: Steering | None = None,
) -> None:
    """The inverse of :func:`encode_lanes`.

    Args:
        payload: everything up to the end.
        contexts: ``(n,)``, the table of each symbol; None for the first one.
        tables: one or more, at least one of them with more than one symbol.
        precision: frequencies sum to ``2**precision``.
        lanes: a power of two.
        out: ``(n,)``, receives the symbols; of a type that holds them.
        steering: says which table instead of ``contexts``.

    Raises:
        CodingError: a payload that :func:`encode_lanes` does not write.
    """
    geometry = Geometry.of(len(out), lanes, tables)
    if geometry.rows > MAX_ROWS:
        raise CodingError(f"{len(out)} symbols in only {lanes} lanes")
    if lanes > len(out):
        raise CodingError(f"{lanes} lanes for only {len(out)} symbols")
    states, rest = unpack_states(payload, lanes)
    if len(rest) % 2:
        raise CodingError("the words have an odd number of bytes")
    words = np.frombuffer(rest, "<u2")
    coded = geometry.coded
    if len(words) > coded:  # no symbol takes two
        raise CodingError("the payload has too many words")
    if steering is not None:
        ends = _decode_steered(states, words, tables, out[:coded], precision, steering)
        steering.tail(_unpack_tail(ends, geometry), out)
        return
    whole = out[:coded]
    found = lanes_twin.decoded(states, words.view(np.uint8), contexts, tables, whole, precision)
    if found is not None:
        ends = found
    elif lanes <= SCALAR_LANES:
        whole[:], ends = _decode_scalar(states, words, contexts, tables, coded, precision)
    else:
        ends = _decode_rows(states, words, contexts, tables, whole, precision)
    ranks = _unpack_tail(ends, geometry)
    tail = out[coded:]
    for index, table in enumerate(tables):
        chosen = slice(None) if contexts is None else contexts[coded:] == index
        if (ranks[chosen] >= len(table.symbols)).any():
            raise CodingError("the last symbols are out of range")
        tail[chosen] = table.symbols[ranks[chosen]]
