"""Choosing a frequency table for a histogram, by its exact cost: bits of table plus of symbols.

Only encoders come here, so floating point is allowed: it decides which table is written, never how
a table is read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dither.coding.bits import BitWriter
from dither.coding.tables import MAX_CURVE, SHAPES, TOP, Curve, Ints, Steps, Table

Floats = NDArray[np.float64]

_SHAPES: Floats = np.array(SHAPES, np.float64)[:, None] / 4


@dataclass(frozen=True, eq=False)
class Fit:
    """A table, its description and the exact costs.

    Attributes:
        description: what is written.
        table: what it stands for.
        head_bits: size of the description.
        symbol_bits: size of all symbols at ``precision - log2(frequency)`` bits each.
    """

    description: Curve | Steps
    table: Table
    head_bits: int
    symbol_bits: float

    @property
    def bits(self) -> float:
        """Size of table and symbols together."""
        return self.head_bits + self.symbol_bits


def _symbol_bits(counts: Ints, table: Table, precision: int) -> float:
    occurring = counts[table.symbols]
    return float((occurring * (precision - np.log2(table.frequencies))).sum())


def _bit_lengths(values: Ints) -> Ints:
    """``int.bit_length`` of positive numbers below 2**53."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


def _code(symbols: Ints, levels: Ints, resolution: int, size: int) -> tuple[Steps, int]:
    """The best slope and Rice parameter for these levels, and the bits of the description."""
    limit = (16 << resolution) - 1
    last = levels[:-1]
    slopes = np.arange(3)[:, None]
    error = levels[1:] - np.clip(last + (np.diff(last, prepend=last[:1]) * slopes >> 1), 0, limit)
    codes = np.where(error >= 0, 2 * error, -2 * error - 1)
    fixed = 14 + resolution
    has_gaps = len(symbols) < size
    if has_gaps:
        runs = np.diff(symbols) - 1
        codes += runs == 0
        tail = size - 1 - int(symbols[-1])
        runs = np.append(runs[runs > 0], [tail] if tail else [])
        gammas = _bit_lengths(np.append(runs, symbols[0] + 1))
        fixed += int((2 * gammas - 1).sum())
        codes = np.concatenate([codes, np.zeros((3, len(runs)), np.int64)], axis=1)
    costs = np.array([(codes >> k).sum(axis=1) + codes.shape[1] * (1 + k) for k in range(8)])
    low, slope = divmod(int(costs.argmin()), 3)
    return Steps(symbols, levels, resolution, slope, low, has_gaps), fixed + int(costs[low, slope])


def fit_steps(counts: Ints, precision: int) -> Fit | None:
    """The best table of single levels, None where there are too many symbols."""
    size = len(counts)
    present = np.flatnonzero(counts)
    total = int(counts.sum())
    choices: list[tuple[Ints, Floats]] = []
    if len(present) < size and len(present) <= 1 << precision:
        choices.append((present, counts[present].astype(np.float64)))
    if size <= min(MAX_CURVE, 1 << precision) and len(present) * 2 >= size:
        choices.append((np.arange(size), np.maximum(counts, 0.4)))
    best: Fit | None = None
    wanted = int(np.clip(np.log2(total / len(present) + 1) / 2, 0, 4))
    for symbols, shares in choices:
        octaves = np.log2(shares / shares.max())
        for resolution in range(max(wanted - 1, 0), min(wanted + 2, 5)):
            top = (16 << resolution) - 1
            levels = np.maximum(np.rint(octaves * (1 << resolution)).astype(np.int64) + top, 0)
            steps, bits = _code(symbols, levels, resolution, size)
            table = steps.table(precision)
            fit = Fit(steps, table, bits, _symbol_bits(counts, table, precision))
            if best is None or fit.bits < best.bits:
                best = fit
    return best


def _trials(distance: Floats, counts: Floats, total: float) -> tuple[Floats, Floats, Floats]:
    """Log weights of curves of all shapes, three scales each, and their cost in bits.

    Args:
        distance: quarters of a symbol from the centre, ``(w,)``.
        counts: ``(w,)``.
        total: their sum.

    Returns:
        scales ``(shapes, 3)``, log2 of the sums of weights and costs, both ``(shapes, 3)``.
    """
    logs = np.log2(np.maximum(distance, 1e-9))
    moments = (np.exp2(_SHAPES * logs) @ counts) / total
    best = np.log2(np.maximum(_SHAPES[:, 0] * np.log(2) * moments, 1e-12)) / _SHAPES[:, 0]
    scales = np.clip(np.rint(8 * best)[:, None] + np.array([-1, 0, 1]), 0, 127)
    power = _SHAPES[:, :, None] * (logs - scales[:, :, None] / 8)
    drop = np.minimum(np.exp2(np.minimum(power, 4)), 16)
    sums = np.log2(np.exp2(-drop).sum(axis=2))
    return scales, sums, drop @ counts + total * sums


def _curve(counts: Floats, center: int, *, is_spiked: bool) -> tuple[float, Curve]:
    """The best curve with this centre and its estimated cost in bits."""
    distance = np.abs(4.0 * np.arange(len(counts)) - center)
    total = float(counts.sum())
    if not is_spiked:
        scales, _, costs = _trials(distance, counts, total)
        at = np.unravel_index(int(costs.argmin()), costs.shape)
        return float(costs[at]), Curve(center, int(scales[at]), int(at[0]))
    peak = (center + 2) >> 2
    rest = np.delete(counts, peak)
    outside = max(total - float(counts[peak]), 0.5)
    inside = max(float(counts[peak]), 0.5)
    scales, sums, costs = _trials(np.delete(distance, peak), rest, float(max(rest.sum(), 0.5)))
    at = np.unravel_index(int(costs.argmin()), costs.shape)
    split = inside * np.log2(total / inside) + outside * np.log2(total / outside)
    spike = int(np.clip(np.rint(4 * (np.log2(inside / outside) + sums[at])), -32, 31))
    return float(costs[at]) + split + 6, Curve(center, int(scales[at]), int(at[0]), spike)


def fit_curve(counts: Ints, precision: int, *, has_escape: bool) -> Fit | None:
    """The best curve, None where none can describe so many symbols."""
    window = len(counts) - has_escape
    if window < 2 or window > MAX_CURVE or len(counts) > 1 << precision:
        return None
    inner = counts[:window].astype(np.float64)
    total = float(inner.sum())
    if total == 0:
        return None
    mean = int(np.rint(4 * float(inner @ np.arange(window)) / total))
    mode = 4 * int(inner.argmax())
    centers = {min(max(c, 0), 4 * window - 4) for c in (mean - 1, mean, mean + 1, mode)}
    trials = [_curve(inner, center, is_spiked=False) for center in sorted(centers)]
    if window > 2:
        trials.append(_curve(inner, mode, is_spiked=True))
    curve = min(trials, key=lambda trial: trial[0])[1]
    if has_escape:
        peak = curve.table(window, precision).frequencies.max() / (1 << precision)
        share = max(int(counts[-1]), 0.5) / total / peak
        escape = int(np.clip(TOP + np.rint(16 * np.log2(share)), 0, TOP))
        curve = replace(curve, escape=escape)
    table = curve.table(window, precision)
    bits = _symbol_bits(counts, table, precision)
    return Fit(curve, table, curve.nbits(window), bits)


def fit_table(counts: Ints, precision: int, *, has_escape: bool = False) -> Fit:
    """The cheapest table for a histogram.

    Args:
        counts: ``(symbols,)``, the escape symbol last where there is one; not all zero.
        precision: frequencies will sum to ``2**precision``; at most that many symbols occur.
        has_escape: whether the last symbol is the escape symbol.
    """
    fits = [fit_steps(counts, precision), fit_curve(counts, precision, has_escape=has_escape)]
    found = [fit for fit in fits if fit is not None]
    return min(found, key=lambda fit: fit.bits)


def entropy_bits(counts: NDArray[Any]) -> float:
    """Empirical entropy of a histogram times its number of symbols, in bits."""
    occurring = counts[counts > 0].astype(np.float64)
    total = float(occurring.sum())
    return float((occurring * (np.log2(total) - np.log2(occurring))).sum()) if total else 0.0


def written_bits(fit: Fit, size: int) -> int:
    """Bits that the description really takes; a check of ``head_bits`` for tests."""
    head = BitWriter()
    fit.description.write(head, size)
    return len(head)
