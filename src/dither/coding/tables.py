"""Frequency tables of the rANS coder: how they are written, and how they are rebuilt.

A table is described on a logarithmic scale. Every symbol that occurs has a *level*, in sixteenths
of an octave, 0 to 255; a level stands for an integer weight, and the weights are scaled to integer
frequencies that sum to ``2**precision``. Everything here is integer arithmetic, so that every
platform rebuilds the same table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from dither.coding.bits import BitReader, BitWriter, width_of
from dither.coding.errors import CodingError

Ints = NDArray[np.int64]

MIN_PRECISION, MAX_PRECISION = 8, 15
"""Frequencies sum to ``2**precision``; four bits of the payload hold ``precision - 8``."""

TOP = 255
"""The highest level."""

SHAPES = (2, 3, 4, 5, 6, 7, 8, 10)
"""Exponents of a curve in quarters: 4 is a two-sided geometric, 8 a Gaussian."""

MAX_CURVE = 4096
"""The largest window of symbols that a curve may describe."""

DENSE, GAPPED, CURVE, SPIKED = range(4)
"""Kinds of table."""


def _root(power: int, roots: int) -> int:
    """``floor(2 ** (power / 2**roots))``, exactly: nested integer square roots."""
    value = 1 << power
    for _ in range(roots):
        value = isqrt(value)
    return value


STEPS: Ints = np.array([_root(12 * 16 + k, 4) for k in range(16)], np.int64)
"""``floor(2**(12 + k/16))``: one octave of weights."""

_FINE_STEPS: Ints = np.array([_root(15 * 64 + k, 6) for k in range(64)], np.int64)
"""``floor(2**(15 + k/64))``."""


_WEIGHTS: Ints = np.array([int(STEPS[level & 15]) << (level >> 4) for level in range(256)])
"""The weight of each level."""


@lru_cache(maxsize=8)
def _logarithms(size: int) -> Ints:
    """``floor(64 * log2(d))`` for ``d = 0 .. size - 1`` (0 for 0), exactly."""
    return np.array([max((d**64).bit_length() - 1, 0) for d in range(size)], np.int64)


_COARSEST = 8 * 127
"""The greatest ``8 * scale`` of a curve."""


@lru_cache(maxsize=len(SHAPES))
def _flanks(shape: int) -> Ints:
    """Levels by ``floor(64 * log2(distance)) - 8 * scale``, which begins at minus the greatest."""
    logs = np.arange(-_COARSEST, 64 * 15, dtype=np.int64)
    power = (SHAPES[shape] * logs) >> 2
    octave = np.clip(power >> 6, -16, 4)
    drop = (_FINE_STEPS[power & 63] << 4) >> (15 - octave)
    return np.asarray(TOP - np.minimum(drop, TOP))


@dataclass(frozen=True, eq=False)
class Table:
    """Symbols that occur, ascending, and their frequencies, which sum to ``2**precision``."""

    symbols: Ints
    frequencies: Ints


def weights_of(levels: Ints) -> Ints:
    """The weight of each level: ``STEPS[level % 16] << (level // 16)``."""
    return _WEIGHTS.take(levels)


def normalize(weights: Ints, precision: int) -> Ints:
    """Frequencies >= 1 in proportion to weights >= 1, summing to exactly ``2**precision``.

    Args:
        weights: ``(symbols,)``, at most ``2**precision`` of them, each below 2**29.
        precision: 8 to 15.
    """
    total = 1 << precision
    frequencies = np.maximum(weights * total // weights.sum(), 1)
    spare = total - int(frequencies.sum())
    if spare < 0:
        excess = frequencies - 1
        frequencies = 1 + excess * (total - len(weights)) // excess.sum()
        spare = total - int(frequencies.sum())
    if spare:
        # One more to those whose share is furthest below their weight.
        need = (weights << 17) // (2 * frequencies + 1)
        frequencies[np.argsort(-need, kind="stable")[:spare]] += 1
    return np.asarray(frequencies)


@dataclass(frozen=True)
class Curve:
    """A peak with smooth flanks: ``2 ** -(distance / scale) ** shape``.

    Attributes:
        center: position of the peak in quarters of a symbol.
        scale: eighths of an octave; 0 is a quarter of a symbol.
        shape: index into ``SHAPES``.
        spike: how far the symbol at the centre stands out, in quarters of an octave, -32 to 31;
            None is written in fewer bits than 0.
        escape: level of the escape symbol, None without one.
    """

    center: int
    scale: int
    shape: int
    spike: int | None = None
    escape: int | None = None

    def nbits(self, window: int) -> int:
        """Bits of the description."""
        spike = 0 if self.spike is None else 6
        return 12 + width_of(4 * window - 3) + spike + (0 if self.escape is None else 8)

    def write(self, head: BitWriter, window: int) -> None:
        """Append the description."""
        head.write(CURVE if self.spike is None else SPIKED, 2)
        head.write(self.center, width_of(4 * window - 3))
        head.write(self.scale, 7)
        head.write(self.shape, 3)
        if self.spike is not None:
            head.write(self.spike + 32, 6)
        if self.escape is not None:
            head.write(self.escape, 8)

    def table(self, window: int, precision: int) -> Table:
        """The frequencies of ``window`` symbols and, behind them, the escape symbol."""
        distance = np.abs(np.arange(-self.center, 4 * window - self.center, 4, dtype=np.int64))
        logs = _logarithms(1 << max(8, width_of(4 * window))).take(distance)
        logs += _COARSEST - 8 * self.scale
        levels = _flanks(self.shape).take(logs)
        if self.center % 4 == 0:
            levels[self.center >> 2] = TOP
        if self.spike is not None:
            peak = (self.center + 2) >> 2
            level = TOP + min(4 * self.spike, 0)
            levels = np.maximum(levels - max(4 * self.spike, 0), 0)
            levels[peak] = level
        if self.escape is not None:
            levels = np.append(levels, self.escape)
        symbols = np.arange(len(levels), dtype=np.int64)
        return Table(symbols, normalize(weights_of(levels), precision))


@dataclass(frozen=True, eq=False)
class Steps:
    """Levels written one by one, as differences from a prediction.

    Attributes:
        symbols: symbols that occur, ascending, ``(m,)``.
        levels: their levels in units of ``16 >> resolution``, ``(m,)``.
        resolution: 0 (octaves) to 4 (sixteenths).
        slope: 0, 1 or 2 halves of the last difference are added to the prediction.
        low: Rice parameter, 0 to 7.
        gaps: whether some symbols do not occur.
    """

    symbols: Ints
    levels: Ints
    resolution: int
    slope: int
    low: int
    gaps: bool

    def write(self, head: BitWriter, size: int) -> None:
        """Append the description of a table for the symbols ``0 .. size - 1``."""
        head.write(GAPPED if self.gaps else DENSE, 2)
        head.write(self.resolution, 3)
        head.write(self.slope, 2)
        head.write(self.low, 3)
        symbols, levels = self.symbols.tolist(), self.levels.tolist()
        limit = (16 << self.resolution) - 1
        if self.gaps:
            head.gamma(symbols[0] + 1)
        head.write(levels[0], 4 + self.resolution)
        before = last = levels[0]
        previous = symbols[0]
        for symbol, level in zip(symbols[1:], levels[1:], strict=True):
            guess = min(max(last + ((last - before) * self.slope >> 1), 0), limit)
            error = level - guess
            code = 2 * error if error >= 0 else -2 * error - 1
            if symbol > previous + 1:
                head.rice(0, self.low)
                head.gamma(symbol - previous - 1)
            elif self.gaps:
                code += 1
            head.rice(code, self.low)
            before, last, previous = last, level, symbol
        if previous < size - 1:
            head.rice(0, self.low)
            head.gamma(size - 1 - previous)

    def table(self, precision: int) -> Table:
        """The frequencies."""
        levels = self.levels << (4 - self.resolution)
        return Table(self.symbols, normalize(weights_of(levels), precision))


def _read_steps(head: BitReader, size: int, precision: int, *, gaps: bool) -> Table:
    resolution, slope, low = head.read(3), head.read(2), head.read(3)
    if resolution > 4 or slope > 2:
        raise CodingError("a frequency table has an unknown resolution or slope")
    limit = (16 << resolution) - 1
    at = head.gamma() - 1 if gaps else 0
    if at >= size:
        raise CodingError("a frequency table has no symbol")
    before = last = head.read(4 + resolution)
    symbols, levels = [at], [last]
    at += 1
    while at < size:
        code = head.rice(low, 2 * limit + 2)
        if gaps and code == 0:
            at += head.gamma()
            if at >= size:
                break
            code = head.rice(low, 2 * limit + 2)
        elif gaps:
            code -= 1
        guess = min(max(last + ((last - before) * slope >> 1), 0), limit)
        before, last = last, guess + (-((code + 1) >> 1) if code & 1 else code >> 1)
        if not 0 <= last <= limit:
            raise CodingError("a frequency table has a level out of range")
        symbols.append(at)
        levels.append(last)
        at += 1
        if len(symbols) > 1 << precision:
            raise CodingError(f"a frequency table has more than {1 << precision} symbols")
    if at != size:
        raise CodingError("a frequency table goes beyond its alphabet")
    present, values = np.array(symbols, np.int64), np.array(levels, np.int64)
    return Steps(present, values, resolution, slope, low, gaps).table(precision)


def read_table(head: BitReader, window: int, precision: int, *, has_escape: bool) -> Table:
    """Read one description and rebuild its table.

    Args:
        head: where the description begins.
        window: number of symbols, without the escape symbol.
        precision: frequencies sum to ``2**precision``.
        has_escape: whether symbol ``window`` is the escape symbol.

    Raises:
        CodingError: a description that no encoder writes.
    """
    kind = head.read(2)
    if kind in (DENSE, GAPPED):
        return _read_steps(head, window + has_escape, precision, gaps=kind == GAPPED)
    if window > MAX_CURVE or window + has_escape > 1 << precision:
        raise CodingError(f"a curve cannot describe {window} symbols")
    center, scale, shape = head.read(width_of(4 * window - 3)), head.read(7), head.read(3)
    if center > 4 * (window - 1):
        raise CodingError("a curve is centred outside its window")
    spike = head.read(6) - 32 if kind == SPIKED else None
    escape = head.read(8) if has_escape else None
    return Curve(center, scale, shape, spike, escape).table(window, precision)
