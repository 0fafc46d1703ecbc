"""Compiled twins of the loops of :mod:`dither.coding.rans`, one symbol after another.

What a slot stands for is looked up first, and then that symbol's frequency and start, sixteen bits
each of one number: both tables are so small that they stay near. All numbers are unsigned and of a
stated width: numba would otherwise look for negative indices, and compute with 64 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dither.coding.errors import CodingError
from dither.coding.tables import Ints, Table
from dither.compiled import Twin

U16, U32, U64 = np.uint16, np.uint32, np.uint64
NONE = np.zeros(0, np.uint8)
BLOCK = 1 << 20
"""Symbols that are encoded at a time; it bounds the temporary memory."""
_ROOM = 1 << 26
"""Words that there is room for at a time."""
_ENTRIES = 1 << 18
"""The most symbols of all tables, those among them that do not occur."""
_CALL = 1 << 24
"""Symbols that are decoded in one call: a tenth of a second."""


def seconds(count: int, lanes: int) -> float:
    """About what plain code takes for so many symbols."""
    return count * 4e-7 if lanes <= 8 else count * 3e-9 + count / lanes * 8e-6


def _looked_up(
    tables: Sequence[Table], kind: np.dtype[Any]
) -> tuple[NDArray[Any], NDArray[np.uint32], int] | None:
    """Symbols by table and slot, entries by table and symbol, and how many a table has of these.

    None where symbols are so far apart that entries would take much memory.
    """
    size = 1 + max(int(table.symbols[-1]) for table in tables)
    if size * len(tables) > _ENTRIES:
        return None
    entries = np.zeros((len(tables), size), np.uint32)
    for row, table in zip(entries, tables, strict=True):
        starts = np.cumsum(table.frequencies) - table.frequencies
        row[table.symbols] = (starts << 16) + table.frequencies
    slots = [np.repeat(table.symbols.astype(kind), table.frequencies) for table in tables]
    return np.concatenate(slots), entries.reshape(-1), size


def decode_loop(
    state: NDArray[np.uint32],
    words: NDArray[np.uint8],
    contexts: NDArray[np.uint8],
    slots: NDArray[Any],
    entries: NDArray[np.uint32],
    out: NDArray[Any],
    settings: NDArray[np.uint32],
) -> int:
    """Symbols into ``out``, a turn after the other, as long as there is a word for each lane.

    Returns how many words were taken. Settings are precision and entries of a table, and then how
    many symbols were decoded, which is written there.
    """
    shift, wide, size = settings[0], U64(settings[0]), U64(settings[1])
    lanes, mask = len(state), U32((U32(1) << shift) - U32(1))
    at, count = U64(0), U64(len(words) // 2)  # both, as numba makes floats of mixed types
    settings[2] = 0
    for begin in range(0, len(out), lanes):
        row = out[begin : begin + lanes]
        if at + U64(lanes) > count:
            break
        settings[2] = begin + lanes
        if len(contexts):
            chosen = contexts[begin : begin + lanes]
            for lane in range(lanes):
                old, table = state[lane], U64(chosen[lane])
                symbol = slots[(table << wide) + U64(old & mask)]
                entry = entries[table * size + U64(symbol)]
                row[lane] = symbol
                new = U32(U32(U16(entry)) * U32(old >> shift))
                new = U32(new + U32(U32(old & mask) - U32(entry >> U32(16))))
                word = U32(words[U64(2) * at]) | U32(U32(words[U64(2) * at + U64(1)]) << U32(8))
                is_low = new < U32(65536)
                state[lane] = U32(U32(new << U32(16)) | word) if is_low else new
                at += U64(is_low)
        else:
            for lane in range(lanes):
                old = state[lane]
                symbol = slots[U64(old & mask)]
                entry = entries[U64(symbol)]
                row[lane] = symbol
                new = U32(U32(U16(entry)) * U32(old >> shift))
                new = U32(new + U32(U32(old & mask) - U32(entry >> U32(16))))
                word = U32(words[U64(2) * at]) | U32(U32(words[U64(2) * at + U64(1)]) << U32(8))
                is_low = new < U32(65536)
                state[lane] = U32(U32(new << U32(16)) | word) if is_low else new
                at += U64(is_low)
    return int(at)


def steered_loop(
    state: NDArray[np.uint32],
    words: NDArray[np.uint8],
    contexts: NDArray[np.uint8],
    slots: NDArray[Any],
    entries: NDArray[np.uint32],
    out: NDArray[Any],
    machines: NDArray[np.uint8],
    settings: NDArray[np.uint32],
) -> int:
    """The same where machines choose between two halves of the tables; they are told on the way.

    ``settings`` are precision, entries of a table, 1 where symbol 0 is odd, and tables in a half;
    then the state of a machine after each state and parity.
    """
    shift, size, odd, half = settings[0], U64(settings[1]), U64(settings[2]), U64(settings[3])
    mask, wide, lanes = U32((U32(1) << shift) - U32(1)), U64(shift), U64(len(state))
    at, count, stride = U64(0), U64(len(words) // 2), U64(len(machines))
    place, lane, following = U64(0), U64(0), settings[4:]
    for index in range(len(out)):
        machine = U64(machines[place])
        table = half * (machine & U64(1))
        if len(contexts):
            table += U64(contexts[index])
        old = state[lane]
        symbol = U64(slots[(table << wide) + U64(old & mask)])
        entry = entries[table * size + symbol]
        out[index] = symbol
        machines[place] = following[U64(2) * machine + ((symbol ^ odd) & U64(1))]
        new = U32(U32(U16(entry)) * U32(old >> shift))
        new = U32(new + U32(U32(old & mask) - U32(entry >> U32(16))))
        if new < U32(65536):
            if at >= count:
                return int(count + U64(1))
            word = U32(words[U64(2) * at]) | U32(U32(words[U64(2) * at + U64(1)]) << U32(8))
            new = U32(U32(new << U32(16)) | word)
            at += U64(1)
        state[lane] = new
        place = place + U64(1) if place + U64(1) < stride else U64(0)
        lane = lane + U64(1) if lane + U64(1) < lanes else U64(0)
    return int(at)


def encode_loop(
    symbols: NDArray[Any],
    contexts: NDArray[np.uint8],
    entries: NDArray[np.uint64],
    state: NDArray[np.uint32],
    words: NDArray[np.uint16],
    settings: NDArray[np.uint32],
) -> int:
    """Whole turns of symbols, last first, into the end of ``words``; where they begin there.

    There are two entries for each symbol of each table. Sixteen bits of the first are the frequency
    ``f``, sixteen the start, 32 ``2**precision - f``. With the second, ``ceil(2**(32 + precision) /
    f)``, division is a multiplication (Granlund, Montgomery 1994), exact for all states that are
    divided. Settings are precision and symbols in a table. ``words`` has room for one more than
    there are symbols: every symbol writes one, and keeps its place only where the state was too
    large.
    """
    lanes, limit, size = U64(len(state)), U32(U32(32) - settings[0]), U64(settings[1])
    wide, at, begin = U64(settings[0]) + U64(32), U64(len(words) - 1), U64(len(symbols))
    while begin >= lanes:
        begin -= lanes
        lane = lanes
        while lane > U64(0):
            lane -= U64(1)
            which = U64(2) * U64(symbols[begin + lane])
            if len(contexts):
                which += U64(2) * size * U64(contexts[begin + lane])
            entry, inverse, old = entries[which], entries[which + U64(1)], state[lane]
            words[at] = U16(old)
            is_full = U32(old >> limit) >= U32(U16(entry))
            at -= U64(is_full)
            rest = U32(old >> U32(16)) if is_full else old
            quotient = U32((U64(rest) * inverse) >> wide)
            more = U32(quotient * U32(entry >> U64(32)))
            state[lane] = U32(more + U32(rest + U32(U16(entry >> U64(16)))))
    return int(at) + 1


def count_loop(values: NDArray[np.uint64], counts: NDArray[np.uint32]) -> None:
    """How often each byte occurs at each of the eight places in a number, ``(8 * 256,)``."""
    for index in range(len(values)):
        value = values[index]
        for place in range(8):
            counts[(U64(place) << U64(8)) + (value & U64(255))] += U32(1)
            value >>= U64(8)


def joint_loop(
    contexts: NDArray[Any],
    tokens: NDArray[Any],
    stride: int,
    size: int,
    counts: NDArray[np.int64],
) -> None:
    """How often each of ``size`` symbols occurs in each context, of every ``stride``-th."""
    end = U64(len(counts))
    for index in range(0, len(tokens), stride):
        which = U64(contexts[index]) * U64(size) + U64(tokens[index])
        if which < end:
            counts[which] += 1


DECODE, STEERED = Twin(decode_loop), Twin(steered_loop)
ENCODE, COUNT, JOINT = Twin(encode_loop), Twin(count_loop), Twin(joint_loop)


def _checked(taken: int, words: NDArray[np.uint8]) -> None:
    if 2 * taken != len(words):
        raise CodingError(
            f"the payload has too {'few' if 2 * taken > len(words) else 'many'} words"
        )


def decoded(
    states: NDArray[np.uint32],
    words: NDArray[np.uint8],
    contexts: NDArray[np.uint8] | None,
    tables: Sequence[Table],
    out: NDArray[Any],
    precision: int,
) -> NDArray[np.uint32] | None:
    """Decode whole turns into ``out``; the states at the end. None where plain code is to do it.

    Raises:
        CodingError: too few words, or too many.
    """
    run = DECODE.chosen(seconds(len(out), len(states)))
    if run is None:
        return None
    found, known = _looked_up(tables, out.dtype), None
    if found is None:  # then with their ranks among all
        known = np.unique(np.concatenate([table.symbols for table in tables]))
        ranked = [Table(np.searchsorted(known, t.symbols), t.frequencies) for t in tables]
        found = _looked_up(ranked, out.dtype)
    if found is None:
        return None
    (slots, entries, size), state, taken = found, states.copy(), 0
    settings = np.array([precision, size, 0], np.uint32)
    block = max(_CALL // len(states), 1) * len(states)
    for begin in range(0, len(out), block):  # in between, signals are answered
        part = out[begin : begin + block]
        chosen = NONE if contexts is None else contexts[begin : begin + len(part)]
        taken += run(state, words[2 * taken :], chosen, slots, entries, part, settings)
        done = int(settings[2])
        if done < len(part):  # few words are left: zeros behind them, which nobody may take
            rest = np.concatenate([words[2 * taken :], np.zeros(2 * len(states), np.uint8)])
            taken += run(state, rest, chosen[done:], slots, entries, part[done:], settings)
        if 2 * taken > len(words):
            break
        if known is not None:
            part[:] = known.take(part)
    _checked(taken, words)
    return state


def steered(
    states: NDArray[np.uint32],
    words: NDArray[np.uint8],
    contexts: NDArray[np.uint8] | None,
    tables: Sequence[Table],
    out: NDArray[Any],
    machines: NDArray[np.uint8],
    following: Ints,
    settings: tuple[int, int],
) -> NDArray[np.uint32] | None:
    """As :func:`decoded` with machines, which are run on; settings are precision and oddness.

    Raises:
        CodingError: too few words, or too many.
    """
    run = STEERED.chosen(4 * seconds(len(out), len(states)))
    found = None if run is None else _looked_up(tables, out.dtype)
    if run is None or found is None:
        return None
    (slots, entries, size), state = found, states.copy()
    chosen = NONE if contexts is None else contexts[: len(out)]
    first = [settings[0], size, settings[1], len(tables) // 2]
    numbers = np.concatenate([first, following]).astype(np.uint32)
    _checked(run(state, words, chosen, slots, entries, out, machines, numbers), words)
    return state


def encoded(
    symbols: NDArray[Any],
    contexts: NDArray[np.uint8] | None,
    entries: tuple[Ints, Ints, int],
    states: NDArray[np.uint32],
    precision: int,
) -> tuple[NDArray[np.uint32], list[NDArray[np.uint16]]] | None:
    """Code whole turns: states, and pieces of the words. None where plain code is to do it.

    Args:
        symbols: whole turns of them.
        contexts: the table of each, None for the first one.
        entries: frequency and start by table and symbol, and symbols in a table.
        states: what lanes begin with.
        precision: frequencies sum to ``2**precision``.

    Raises:
        IndexError: a symbol that is of no table.
    """
    run = ENCODE.chosen(seconds(len(symbols), len(states)))
    if run is None:
        return None
    frequency, start, size = entries
    last = 0 if contexts is None or not len(symbols) else int(contexts[: len(symbols)].max())
    if len(symbols) and (int(symbols.max()) >= size or (last + 1) * size > len(frequency)):
        raise IndexError("a symbol is of no table")
    wide = np.int64(1) << (32 + precision)
    rest = (1 << precision) - frequency
    table = (rest << 32) | (start << 16) | frequency
    kept = np.stack([table, -(-wide // np.maximum(frequency, 1))], axis=1).astype(np.uint64)
    settings, state = np.array([precision, size], np.uint32), states.copy()
    symbols = symbols if symbols.dtype == np.uint8 else symbols.astype(np.uint32, copy=False)
    block = max(BLOCK // len(states), 1) * len(states)
    room, pieces = np.empty(0, np.uint16), list[NDArray[np.uint16]]()
    for begin in range((len(symbols) - 1) // block * block, -1, -block):
        part = slice(begin, begin + block)
        if len(room) <= block:  # pages that nothing is written to take no memory
            room = np.empty(min(begin + block, _ROOM) + 1, np.uint16)
        chosen = NONE if contexts is None else contexts[: len(symbols)][part]
        first = run(symbols[part], chosen, kept.reshape(-1), state, room, settings)
        pieces.append(room[first:])
        room = room[:first]
    return state, pieces[::-1]


def counted(values: NDArray[np.uint8]) -> Ints | None:
    """How often each byte occurs, ``(256,)``. None where plain code is to count.

    Args:
        values: contiguous, less than 2**35 of them.
    """
    run = COUNT.chosen(len(values) * 2e-9)
    if run is None:
        return None
    even, counts = len(values) // 8 * 8, np.zeros(8 * 256, np.uint32)
    run(values[:even].view(np.uint64), counts)
    rest = np.bincount(values[even:], minlength=256)
    return np.asarray(counts.reshape(8, 256).sum(axis=0, dtype=np.int64) + rest)


def counted_jointly(
    contexts: NDArray[Any], tokens: NDArray[Any], tables: int, size: int, stride: int
) -> Ints | None:
    """How often each symbol occurs in each context, ``(tables, size)``, of every stride-th.

    None where plain code is to count.

    Args:
        contexts: less than ``tables`` each.
        tokens: less than ``size`` each, as many.
        tables: number of contexts.
        size: number of symbols.
        stride: how far those that are looked at are apart.
    """
    run = JOINT.chosen(len(tokens) // stride * 6e-9)
    if run is None:
        return None
    counts = np.zeros(tables * size, np.int64)
    run(contexts, tokens, stride, size, counts)
    return counts.reshape(tables, size)
