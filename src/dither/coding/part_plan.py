"""How the encoder codes a part: window, tables, contexts and lanes, chosen by exact cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dither.coding.bits import code_dtype, pack_bits, packed_nbytes, width_of
from dither.coding.contexts import Contexts, clip, propose
from dither.coding.histograms import joint_counts, pairs_of
from dither.coding.parity_contexts import Machine
from dither.coding.payload import Head, Window, stride_of
from dither.coding.rans import MAX_COUNT, MAX_LANES_LOG2, MAX_ROWS, encode_lanes
from dither.coding.refine import refine
from dither.coding.table_fit import Fit, entropy_bits, fit_table
from dither.coding.tables import MAX_PRECISION, MIN_PRECISION, Ints

LANES_SHARE = 0.006
"""Share of a part that lanes may cost: about 0.2 % more bytes halve the time of decoding."""

ONE_LANE = 40_000
"""Up to so many symbols one lane is decoded fast enough."""

_PIECE = 1 << 22
_SAMPLE = 1 << 20
"""About so many symbols of a part are looked at to compare contexts."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything about a payload but its stream.

    Attributes:
        head: see :class:`~dither.coding.payload.Head`.
        fits: the chosen tables and their costs.
        head_bytes: the head as written, with the classes.
        nbytes: predicted size of the payload.
    """

    head: Head
    fits: Sequence[Fit]
    head_bytes: bytes
    nbytes: float


def _fold(symbols: Ints, counts: Ints, shift: int) -> tuple[Ints, Ints]:
    high = symbols >> shift
    first = np.flatnonzero(np.diff(high, prepend=-1))
    return high[first], np.add.reduceat(counts, first)


def _rough_bits(symbols: Ints, counts: Ints) -> float:
    """About the bits of symbols and a gapped table."""
    gaps = np.diff(symbols) - 1
    runs = gaps[gaps > 0].astype(np.float64)
    return entropy_bits(counts) + 3.5 * len(symbols) + float((2 * np.log2(runs) + 2).sum())


def _whole(shift: int, highs: int) -> Window:
    return Window(shift, 0, highs, 0)


def _trim(symbols: Ints, counts: Ints, shift: int, highs: int) -> list[Window]:
    """The window without escapes, and the most promising one with escapes."""
    total = int(counts.sum())
    span = int(symbols[-1] - symbols[0]) + 1
    # A narrow range is named, because runs of absent symbols at its ends rule out curves.
    whole = Window(shift, int(symbols[0]), span, 0) if 2 * span < highs else _whole(shift, highs)
    if len(symbols) < 9:
        return [whole]
    cumulated = np.cumsum(counts)
    best = (_rough_bits(symbols, counts), whole)
    width = width_of(highs)
    for share in (0.0003, 0.001, 0.003, 0.01, 0.03):
        cut = max(int(total * share), 1)
        low = int(np.searchsorted(cumulated, cut, side="right"))
        high = int(np.searchsorted(cumulated, total - cut, side="left"))
        if high <= low:
            continue
        inside = counts[low : high + 1]
        escapes = total - int(inside.sum())
        if escapes:
            bits = _rough_bits(symbols[low : high + 1], np.append(inside, escapes))
            size = int(symbols[high] - symbols[low]) + 1
            window = Window(shift, int(symbols[low]), size, escapes)
            best = min(best, (bits + escapes * width, window), key=lambda item: item[0])
    return [whole] if best[1] == whole else [whole, best[1]]


def windows_for(symbols: Ints, counts: Ints, alphabet: int) -> list[Window]:
    """Windows worth an exact look, from the pairs of :func:`pairs_of`."""
    total = int(counts.sum())
    shift = 0
    if len(symbols) > 64:
        costs = []
        for candidate in range(width_of(alphabet)):
            folded = _fold(symbols, counts, candidate)
            if len(folded[0]) <= 1 << (MAX_PRECISION - 1):
                costs.append((_rough_bits(*folded) + total * candidate, candidate))
        shift = min(costs)[1]
    return _trim(*_fold(symbols, counts, shift), shift, -(-alphabet >> shift))


def window_counts(symbols: Ints, counts: Ints, window: Window) -> Ints:
    """The histogram of the window's symbols, the escape symbol last."""
    high, folded = _fold(symbols, counts, window.shift)
    out = np.zeros(window.symbols, np.int64)
    inside = (high >= window.begin) & (high < window.begin + window.size)
    out[high[inside] - window.begin] = folded[inside]
    if window.escapes:
        out[-1] = window.escapes
    return out


def precisions_for(total: int, present: int) -> list[int]:
    """Precisions worth an exact look."""
    least = max(MIN_PRECISION, min(present.bit_length() + 2, MAX_PRECISION))
    usual = max(least, min(total.bit_length(), 12))
    return [usual, max(usual, 14)] if total > 1 << 16 and usual < 14 else [usual]


def lanes_for(total: int, bits: float, symbols: int) -> tuple[int, float]:
    """log2 of the number of lanes, and about how many bits they cost.

    Args:
        total: number of symbols.
        bits: what they cost without lanes.
        symbols: of the alphabet of the tables.
    """
    width = width_of(symbols)
    free = min(16 // width, total) * min(bits / total, width) if width else 0.0
    each = 16 - free + 4
    if total <= ONE_LANE:
        return 0, each
    affordable = int(LANES_SHARE * bits / each).bit_length() - 1
    least = max(4, (total // 8192).bit_length())
    lanes_log2 = min(max(affordable, least, 4), MAX_LANES_LOG2 - 1)
    if total > MAX_ROWS << lanes_log2:
        lanes_log2 = MAX_LANES_LOG2
    return lanes_log2, each * (1 << lanes_log2)


def best_fit(counts: Ints, *, has_escape: bool) -> tuple[int, Fit]:
    """Precision and table of a histogram."""
    total, present = int(counts.sum()), int((counts > 0).sum())
    found = [
        (p, fit_table(counts, p, has_escape=has_escape)) for p in precisions_for(total, present)
    ]
    # A larger table must be worth its slower look-up.
    return min(found, key=lambda item: item[1].bits * (1 + 0.0005 * (item[0] > 12)))


def split(values: NDArray[Any], window: Window) -> tuple[NDArray[Any], NDArray[Any]]:
    """Symbols of the tables, and the high values that escape."""
    kind: Any = np.uint8 if window.symbols <= 256 else np.uint32
    high = values >> window.shift if window.shift else values
    if not window.escapes:
        inside = high - window.begin if window.begin else high
        return inside.astype(kind, copy=False), high[:0]
    tokens, escaped = np.empty(len(high), kind), [high[:0].astype(np.int64)]
    for start in range(0, len(high), _PIECE):
        part = high[start : start + _PIECE].astype(np.int64)
        outside = (part < window.begin) | (part >= window.begin + window.size)
        tokens[start : start + _PIECE] = np.where(outside, window.size, part - window.begin)
        escaped.append(part[outside])
    return tokens, np.concatenate(escaped)


def _finish(
    head: Head, fits: Sequence[Fit], total: int, ndim: int, alphabet: int, extra: int
) -> Plan:
    """Write the head and add up the size; ``extra`` bytes are low bits and escapes."""
    head_bytes = head.write(ndim, alphabet)
    nbytes: float = len(head_bytes) + extra
    if any(len(fit.table.symbols) > 1 for fit in fits):
        bits = sum(fit.symbol_bits for fit in fits)
        _, lane_bits = lanes_for(total, bits, head.window.symbols)
        nbytes += max((bits + lane_bits) / 8, 3)
    return Plan(head, fits, head_bytes, nbytes)


def _extra(total: int, window: Window, alphabet: int) -> int:
    width = width_of(-(-alphabet >> window.shift))
    return packed_nbytes(total, window.shift) + packed_nbytes(window.escapes, width)


def plan_counts(symbols: Ints, counts: Ints, alphabet: int, ndim: int) -> Plan:
    """The best plan without contexts, from the pairs of :func:`pairs_of`."""
    total = int(counts.sum())
    plans = []
    for window in windows_for(symbols, counts, alphabet):
        precision, fit = best_fit(
            window_counts(symbols, counts, window), has_escape=window.escapes > 0
        )
        is_constant = len(fit.table.symbols) == 1
        lanes = 0 if is_constant else lanes_for(total, fit.symbol_bits, window.symbols)[0]
        head = Head(precision, lanes, window, None, [fit.description], [])
        plans.append(_finish(head, [fit], total, ndim, alphabet, _extra(total, window, alphabet)))
    return min(plans, key=lambda plan: plan.nbytes)


def plan_contexts(
    values: NDArray[Any],
    shape: tuple[int, ...],
    alphabet: int,
    plain: Plan,
    *,
    is_thorough: bool,
) -> Plan | None:
    """The best plan with contexts, for the window of ``plain``; None where none is promising."""
    window = plain.head.window
    if window.symbols > 1024 or len(plain.fits[0].table.symbols) == 1:
        return None
    tokens, _ = split(values, window)
    best: tuple[float, Contexts] | None = None
    stride = len(tokens) // _SAMPLE | 1
    for candidate in propose(tokens, shape):
        which, tables = candidate.of(shape), candidate.tables
        counts = joint_counts(which, tokens, tables, window.symbols, stride)
        clipped, bits = clip(candidate, counts * stride)
        if clipped.tables > 1 and (best is None or bits < best[0]):
            best = bits, clipped
    if best is None:
        return None
    contexts = best[1]
    # Codes of one bit gain more than a per cent, and estimates are to be right to that.
    if (is_thorough or window.symbols == 2) and len(tokens) <= 4 * _SAMPLE:
        contexts = refine(contexts, tokens.reshape(shape), window.symbols)
    rows = joint_counts(contexts.of(shape), tokens, contexts.tables, window.symbols)
    # A context that never occurs is given the counts of all: its table is written, and no symbol.
    is_empty = rows.sum(axis=1) == 0
    rows[is_empty] = rows.sum(axis=0)
    fits = [fit_table(row, plain.head.precision, has_escape=window.escapes > 0) for row in rows]
    fits = [
        replace(fit, symbol_bits=0.0) if empty else fit
        for fit, empty in zip(fits, is_empty, strict=True)
    ]
    payloads = [
        encode_plain(classes, int(classes.max()) + 1) for classes in contexts.classes.values()
    ]
    bits = sum(fit.symbol_bits for fit in fits)
    lanes, _ = lanes_for(len(values), bits, window.symbols)
    descriptions = [fit.description for fit in fits]
    head = Head(plain.head.precision, lanes, window, contexts, descriptions, payloads)
    extra = _extra(len(values), window, alphabet)
    return _finish(head, fits, len(values), len(shape), alphabet, extra)


def plan_part(
    values: NDArray[Any],
    shape: tuple[int, ...],
    alphabet: int,
    machine: Machine | None = None,
    *,
    is_thorough: bool,
) -> Plan:
    """The best plan for a part of at least one code and an alphabet of at least 2.

    Args:
        values: flat codes in their canonical type.
        shape: of the part.
        alphabet: number of symbols.
        machine: one that may say more about the codes; see :mod:`dither.coding.parity_contexts`.
        is_thorough: take four times as long to save another thousandth where contexts pay.
    """
    best = plan_counts(*pairs_of(values, alphabet), alphabet, len(shape))
    if len(shape) > 1:
        found = plan_contexts(values, shape, alphabet, best, is_thorough=is_thorough)
        best = best if found is None or found.nbytes >= best.nbytes else found
    if machine is not None and len(values) <= MAX_COUNT:
        found = plan_steered(values, shape, alphabet, best, machine)
        best = best if found is None or found.nbytes >= best.nbytes else found
    return best


def plan_steered(
    values: NDArray[Any],
    shape: tuple[int, ...],
    alphabet: int,
    plain: Plan,
    machine: Machine,
) -> Plan | None:
    """A plan like another one with two sets of tables; None where a machine cannot run.

    Args:
        values: flat codes.
        shape: of the part.
        alphabet: number of symbols.
        plain: where contexts are taken from.
        machine: says which set holds.
    """
    low, high, stride = int(values.min()), int(values.max()), stride_of(shape)
    if low == high or high - low >= 1024:
        return None
    window = Window(0, low, high - low + 1, 0)
    if 2 * window.size >= alphabet:
        window = _whole(0, alphabet)
    contexts, before = plain.head.contexts, plain.head.lanes_log2
    lanes = min(before, stride.bit_length() - 1)
    if len(values) > MAX_ROWS << lanes:
        return None
    precision = plain.head.precision
    if window.size > 1 << precision:
        return None
    payloads = plain.head.class_payloads
    head = Head(precision, lanes, window, contexts, [], payloads, machine)
    choices, count = head.choices(values, shape), 2 * (1 if contexts is None else contexts.tables)
    joint = np.zeros(len(values), np.int64) if choices is None else choices.astype(np.int64)
    joint = joint * window.size + split(values, window)[0]
    rows = np.bincount(joint, minlength=count * window.size).reshape(count, window.size)
    is_empty = rows.sum(axis=1) == 0
    rows[is_empty] = rows.sum(axis=0)
    fits = [fit_table(row, precision) for row in rows]
    if all(len(fit.table.symbols) == 1 for fit in fits):
        return None
    descriptions = [fit.description for fit in fits]
    fits = [
        replace(fit, symbol_bits=0.0) if empty else fit
        for fit, empty in zip(fits, is_empty, strict=True)
    ]
    head = replace(head, descriptions=descriptions)
    return _finish(head, fits, len(values), len(shape), alphabet, 0)


def write(plan: Plan, values: NDArray[Any], shape: tuple[int, ...], alphabet: int) -> bytes:
    """The payload of a part by its plan."""
    head, window = plan.head, plan.head.window
    tokens, escaped = split(values, window)
    pieces: list[bytes | memoryview] = [plan.head_bytes]
    if window.shift:
        pieces.append(pack_bits(values & ((1 << window.shift) - 1), window.shift))
    pieces.append(pack_bits(escaped, width_of(-(-alphabet >> window.shift))))
    tables = [fit.table for fit in plan.fits]
    if any(len(table.symbols) > 1 for table in tables):
        contexts = head.choices(values, shape)
        lanes = 1 << head.lanes_log2
        pieces += encode_lanes(tokens, contexts, tables, head.precision, lanes)
    return b"".join(pieces)


def encode_plain(values: NDArray[Any], alphabet: int) -> tuple[str, bytes]:
    """Codes of one axis without contexts: codec and payload, the smallest of both codecs."""
    if alphabet == 1 or len(values) == 0:
        return "bits", b""
    flat = values.astype(code_dtype(alphabet))
    plan = plan_counts(*pairs_of(flat, alphabet), alphabet, 1)
    return smaller(plan, flat, (len(flat),), alphabet)


def smaller(
    plan: Plan, values: NDArray[Any], shape: tuple[int, ...], alphabet: int
) -> tuple[str, bytes]:
    """Codec and payload, the smaller of packed bits and of rANS by this plan."""
    packed = packed_nbytes(len(values), width_of(alphabet))
    if len(values) <= MAX_COUNT and plan.nbytes < packed * 1.01 + 4:
        payload = write(plan, values, shape, alphabet)
        if len(payload) < packed:
            return "rans", payload
    return "bits", pack_bits(values, width_of(alphabet))
