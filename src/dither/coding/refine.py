"""Better classes for contexts, found as k-means finds centres: tables and classes in turn."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dither.coding.contexts import Contexts, sums
from dither.coding.histograms import joint_counts

_MOST = 1 << 23
"""The most counts kept at a time; an axis that needs more stays as it is."""

Floats = NDArray[np.float64]


def _lengths(histograms: NDArray[np.int64]) -> Floats:
    """Bits of each symbol in each context; a symbol new to a context is paid for by all."""
    everything = histograms.sum(axis=0)
    shares = histograms + 4.0 * (everything + 0.1) / (everything.sum() + 1)
    return np.asarray(np.log2(shares.sum(axis=1, keepdims=True)) - np.log2(shares))


def _reassign(
    contexts: Contexts, axis: int, symbols: NDArray[Any], lengths: Floats
) -> NDArray[np.uint8] | None:
    """The classes of one axis that take the fewest bits, the others held fixed."""
    shape, (tables, count) = symbols.shape, lengths.shape
    old = contexts.classes[axis]
    rest = {a: c for a, c in contexts.classes.items() if a != axis}
    others = sums(rest, shape, 0, len(shape))
    kinds, highest = int(others.max()) + 1, int(old.max())
    if shape[axis] * kinds * count > _MOST:
        return None
    places = np.arange(shape[axis], dtype=np.uint32) * np.uint32(kinds)
    joint = others + places.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    counts = joint_counts(joint.reshape(-1), symbols.reshape(-1), shape[axis] * kinds, count)
    found = counts.reshape(shape[axis], -1).astype(np.float64)
    usage = np.bincount(old, minlength=highest + 1) + 0.5
    reached = np.arange(highest + 1)[:, None] + np.arange(kinds) - contexts.offset
    prices = lengths[np.clip(reached, 0, tables - 1)].reshape(highest + 1, -1)
    bits = found @ prices.T - np.log2(usage / usage.sum())
    return np.asarray(bits.argmin(axis=1), np.uint8)


def refine(contexts: Contexts, symbols: NDArray[Any], count: int, rounds: int = 2) -> Contexts:
    """Contexts of the same form in which symbols take fewer bits, as far as a few rounds go.

    Args:
        contexts: where to begin.
        symbols: shaped like the part.
        count: size of the alphabet.
        rounds: how often every axis is looked at.
    """
    flat = symbols.reshape(-1)
    for _ in range(rounds):
        for axis in contexts.classes:
            tables = contexts.of(symbols.shape)
            lengths = _lengths(joint_counts(tables, flat, contexts.tables, count))
            classes = _reassign(contexts, axis, symbols, lengths)
            if classes is not None:
                chosen = {**contexts.classes, axis: classes}
                contexts = Contexts(chosen, contexts.offset, contexts.tables)
    return contexts
