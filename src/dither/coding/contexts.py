"""Which table codes which symbol: classes of rows, columns and other axes.

Every axis of a part may have one class per index; the context of an element is the sum of the
classes of its indices, clipped to the number of tables. Contexts are therefore known before the
first symbol is decoded, and decoding stays one loop over lanes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_AXES = 8
MAX_TABLES = 16
MAX_CLASSES = 16

_RUN = 64
"""Elements of a run of last axes, at least: runs with equal sums before them are copies."""

_MOST = 1 << 20
"""Elements of all kinds of runs: it bounds the temporary memory."""


def sums(
    classes: Mapping[int, NDArray[np.uint8]], shape: tuple[int, ...], begin: int, end: int
) -> NDArray[np.uint8]:
    """Sums of the classes of the axes from ``begin`` up to ``end``, shaped like these."""
    total = np.zeros(shape[begin:end], np.uint8)
    for axis, found in classes.items():
        if begin <= axis < end:
            total += found.reshape([-1 if a == axis else 1 for a in range(begin, end)])
    return total


@dataclass(frozen=True, eq=False)
class Contexts:
    """A choice of tables.

    Attributes:
        classes: axis -> class of each index, ``(shape[axis],)``, each 0 to 15.
        offset: taken from the sum of the classes before clipping.
        tables: number of tables, 2 to 16.
    """

    classes: Mapping[int, NDArray[np.uint8]]
    offset: int
    tables: int

    def of(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """The table of every element, flat, in C order."""
        split = len(shape) - 1
        while split > 0 and prod(shape[split:]) < _RUN:
            split -= 1
        ahead = sums(self.classes, shape, 0, split).reshape(-1)
        behind = sums(self.classes, shape, split, len(shape)).reshape(-1)
        kinds = int(ahead.max()) + 1 if ahead.size else 0
        if kinds * len(behind) > _MOST:
            return self._clipped(ahead[:, None] + behind).reshape(-1)
        runs = self._clipped(np.arange(kinds, dtype=np.uint8)[:, None] + behind)
        return runs.take(ahead, axis=0).reshape(-1)

    def _clipped(self, sums: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The tables of sums, which are overwritten."""
        np.maximum(sums, np.uint8(self.offset), out=sums)
        sums -= np.uint8(self.offset)
        return np.minimum(sums, np.uint8(self.tables - 1), out=sums)


def _spread(deviation: NDArray[np.float32], axis: int) -> NDArray[np.float64]:
    """log2 of the mean deviation at each index of an axis, relative to that of the part."""
    others = tuple(a for a in range(deviation.ndim) if a != axis)
    means = deviation.mean(axis=others, dtype=np.float64)
    overall = float(means.mean())
    return np.asarray(np.log2((means + 0.02 * overall + 1e-6) / (1.02 * overall + 1e-6)))


def _worth(spread: NDArray[np.float64], count: int) -> float:
    """Expected gain of an axis in bits, for ``count`` symbols; sampling noise is taken off."""
    noise = 1.2 * len(spread) / count
    return count * 0.35 * (float(spread.var()) - noise) - 1.5 * len(spread)


def propose(tokens: NDArray[Any], shape: tuple[int, ...]) -> list[Contexts]:
    """Candidates, from classes that follow the local spread; empty where none can pay.

    Args:
        tokens: ``(n,)``, unsigned.
        shape: shape of the part, ``n`` elements.
    """
    if len(shape) > MAX_AXES or len(tokens) < 256:
        return []
    middle = np.float32(np.median(tokens[:: max(len(tokens) // 65536, 1)]))
    deviation = tokens.astype(np.float32)
    deviation -= middle
    deviation = np.abs(deviation, out=deviation).reshape(shape)
    found = []
    for axis, length in enumerate(shape):
        if 2 <= length <= len(tokens) // 2:
            spread = _spread(deviation, axis)
            worth = _worth(spread, len(tokens))
            if worth > 0:
                found.append((worth, axis, spread))
    found.sort(key=lambda item: -item[0])
    candidates = []
    for used in range(1, len(found) + 1):
        for per_octave in (1, 2, 3):
            classes = {}
            for _, axis, spread in found[:used]:
                steps = np.rint(spread * per_octave)
                low, high = np.quantile(steps, [0.002, 0.998])
                low = max(low, high - MAX_CLASSES + 1)
                classes[axis] = (np.clip(steps, low, high) - low).astype(np.uint8)
            highest = sum(int(c.max()) for c in classes.values())
            if highest:
                candidates.append(Contexts(dict(sorted(classes.items())), 0, highest + 1))
    return candidates


def _table_bits(histograms: NDArray[np.int64]) -> NDArray[np.float64]:
    """About how many bits each row of counts takes, its table included."""
    totals = histograms.sum(axis=-1).astype(np.float64)
    logs = np.log2(np.maximum(histograms, 1))
    entropy = totals * np.log2(np.maximum(totals, 1)) - (histograms * logs).sum(axis=-1)
    tables = np.minimum(2.5 * (histograms > 0).sum(axis=-1), 24 + 0.004 * totals)
    return np.asarray(entropy + 14 + tables)


def clip(candidate: Contexts, histograms: NDArray[np.int64]) -> tuple[Contexts, float]:
    """Join the outermost contexts so that all take the fewest bits, in at most 16 tables.

    Args:
        candidate: contexts from :func:`propose`.
        histograms: ``(contexts, symbols)``, the counts within each.

    Returns:
        The clipped contexts and about how many bits all symbols and tables take.
    """
    count = len(histograms)
    single = np.concatenate([[0.0], np.cumsum(_table_bits(histograms))])
    first = _table_bits(np.cumsum(histograms, axis=0))
    last = _table_bits(np.cumsum(histograms[::-1], axis=0))[::-1]
    # Entry (i, j): contexts 0 to i are joined, and so are contexts j to the end, i < j.
    low, high = np.arange(count)[:, None], np.arange(count)[None]
    total = first[:, None] + single[high] - single[np.minimum(low + 1, high)] + last[None]
    tables = high - low + 1
    total[(tables < 2) | (tables > MAX_TABLES)] = np.inf
    best = int(total.argmin())
    low_end, high_begin = best // count, best % count
    classes = sum(1.5 * len(c) for c in candidate.classes.values())
    chosen = Contexts(candidate.classes, low_end, high_begin - low_end + 1)
    return chosen, float(total.flat[best]) + classes
