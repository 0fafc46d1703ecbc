"""How often each code occurs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dither.coding import lanes_twin
from dither.coding.tables import Ints

COUNTED = 1 << 18
"""Bytes beyond which counting them in a way of their own is worth it."""

_PIECE = 1 << 22
"""Codes that are counted at a time where that takes eight bytes of each."""


def pairs_of(values: NDArray[Any], alphabet: int) -> tuple[Ints, Ints]:
    """The codes that occur, ascending, and how often each does."""
    if alphabet > 65536 and alphabet > 4 * len(values):
        symbols, counts = np.unique(values, return_counts=True)
        return symbols.astype(np.int64), counts.astype(np.int64)
    counts = histogram(values, alphabet)
    symbols = np.flatnonzero(counts)
    return symbols, counts[symbols]


def histogram(values: NDArray[Any], alphabet: int) -> Ints:
    """How often each code occurs, ``(alphabet,)``."""
    if values.dtype == np.uint8 and len(values) > COUNTED:
        found = lanes_twin.counted(values)
        if found is not None:
            return found[:alphabet]
        # Two codes at a time halve the work of the conversion inside bincount.
        even = len(values) // 2 * 2
        both = np.bincount(values[:even].view(np.uint16), minlength=1 << 16).reshape(256, 256)
        counts = both.sum(axis=0) + both.sum(axis=1)
        if even < len(values):
            counts[values[-1]] += 1
        return np.asarray(counts[:alphabet], np.int64)
    counts = np.zeros(alphabet, np.int64)
    piece = max(_PIECE, alphabet)
    for start in range(0, len(values), piece):
        counts += np.bincount(values[start : start + piece], minlength=alphabet)
    return counts


def joint_counts(
    contexts: NDArray[Any], symbols: NDArray[Any], kinds: int, count: int, stride: int = 1
) -> Ints:
    """How often each symbol occurs in each context, ``(kinds, count)``.

    Args:
        contexts: ``(n,)``, unsigned, each below ``kinds``.
        symbols: ``(n,)``, unsigned, each below ``count``.
        kinds: number of contexts; with ``count`` less than 2**31.
        count: number of symbols.
        stride: how far those that are looked at are apart.
    """
    found = lanes_twin.counted_jointly(contexts, symbols, kinds, count, stride)
    if found is not None:
        return found
    joint = contexts[::stride].astype(np.int32) * np.int32(count)
    joint += symbols[::stride].astype(np.int32)
    return np.asarray(np.bincount(joint, minlength=kinds * count).reshape(-1, count), np.int64)
