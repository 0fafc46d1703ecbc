"""What codes will cost, without coding them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dither.coding.bits import packed_nbytes, width_of
from dither.coding.codes import checked
from dither.coding.part_plan import Plan, plan_counts, plan_part
from dither.coding.rans import MAX_COUNT


def code_lengths(counts: NDArray[Any]) -> NDArray[np.float64]:
    """Ideal length of each symbol in bits, by its frequency.

    A symbol that does not occur costs what half an occurrence would, so it is finite: what a table
    would have to pay for it is about right.

    Args:
        counts: how often each symbol occurs, ``(symbols,)``; may be expected counts.

    Returns:
        Bits per symbol, ``(symbols,)``.

    >>> code_lengths(np.array([2, 1, 1, 0])).tolist()
    [1.0, 2.0, 2.0, 3.0]
    """
    shares = np.maximum(np.asarray(counts, np.float64), 0)
    total = float(shares.sum())
    if total <= 0:
        return np.full(shares.shape, np.log2(max(shares.size, 1)))
    floor = min(0.5, float(shares[shares > 0].min()))
    return np.asarray(np.log2(total) - np.log2(np.maximum(shares, floor)))


def _predicted(plan: Plan, total: int, alphabet: int) -> float:
    packed = float(packed_nbytes(total, width_of(alphabet)))
    return min(plan.nbytes, packed) if total <= MAX_COUNT else packed


def estimate_nbytes(values: NDArray[Any], alphabet: int) -> float:
    """Predicted ``len(payload)`` of ``encode_codes(values, alphabet)``, contexts included.

    Args:
        values: codes of any shape and integer type.
        alphabet: 1 to 2**24.
    """
    flat = checked(values, alphabet)
    if alphabet == 1 or flat.size == 0:
        return 0.0
    plan = plan_part(flat, values.shape, alphabet, is_thorough=False)
    return _predicted(plan, flat.size, alphabet)


def estimate_from_counts(counts: NDArray[Any]) -> float:
    """The same from a histogram, for a part without contexts.

    Args:
        counts: how often each symbol occurs, ``(alphabet,)``, whole numbers.
    """
    whole = np.asarray(counts).astype(np.int64)
    total = int(whole.sum())
    if len(whole) < 2 or total == 0:
        return 0.0
    symbols = np.flatnonzero(whole)
    return _predicted(plan_counts(symbols, whole[symbols], len(whole), 1), total, len(whole))
