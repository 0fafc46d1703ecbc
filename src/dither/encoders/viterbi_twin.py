"""Compiled twin of the search in :mod:`dither.encoders.viterbi`, one output after another.

Numbers are float32, multiplied and added one by one as in the plain code: numba fuses no products
unless it is told to.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dither.compiled import Twin

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
F32 = np.float32
COST, MULTIPLE, ERROR = 0, 1, 2


def choose(
    aims: Floats,
    worth: np.float32,
    costs: Floats,
    lengths: Floats,
    found: Floats,
) -> None:
    """Cost, multiple and error of the codes of each parity in each state, ``(3, 2, states)``."""
    reach = lengths.shape[1] // 2
    for parity in range(2):
        for state in range(len(costs)):
            quantizer = state & 1
            offset = F32(quantizer + 2 * parity)
            aim = aims[state]
            near = np.rint((aim - offset) * F32(0.25)) * F32(4) + offset
            error = near - aim
            cost = error * error * worth + costs[state]
            if reach:
                code = int((near - F32(quantizer)) * F32(0.5))
                cost += lengths[quantizer, min(max(code, -reach), reach) + reach]
            found[COST, parity, state] = cost
            found[MULTIPLE, parity, state] = near
            found[ERROR, parity, state] = error


def survive(found: Floats, before: Ints, costs: Floats, kept: Floats, origins: Ints) -> None:
    """Of the two ways into each state the cheaper: its cost, where from, multiple and error."""
    for state in range(len(costs)):
        # Which one is as good as random, so that a branch would often be mispredicted.
        is_odd = found[COST, 1, before[1, state]] < found[COST, 0, before[0, state]]
        parity = np.int64(is_odd)
        origin = before[parity, state]
        origins[state], costs[state] = origin, found[COST, parity, origin]
        kept[0, state] = found[MULTIPLE, parity, origin]
        kept[1, state] = found[ERROR, parity, origin]


def hand_on(
    first: int, old: Floats, new: Floats, origins: Ints, errors: Floats, shares: Floats
) -> None:
    """What each path hands to inputs from the first on: what it did before, and its new error."""
    behind = shares[first:]
    for state in range(len(errors)):
        # Of rows, which numba knows to be contiguous; an index from `first` on might be negative.
        source, goal, error = old[origins[state]][first:], new[state][first:], errors[state]
        for later in range(len(behind)):
            goal[later] = source[later] + behind[later] * error


def search_loop(
    block: Floats,
    within: Floats,
    worth: Floats,
    lengths: Floats,
    total: Floats,
    before: Ints,
    out: Floats,
    span: tuple[int, int],
) -> None:
    """The best path through a block of inputs, for outputs ``span[0]`` to ``span[1]``.

    Args:
        block: ``(inputs, outputs)``, in steps.
        within: how errors are passed on, ``(inputs, inputs)``.
        worth: of the squared error of each input.
        lengths: cost of each code, ``(2, codes)``; no codes where none counts.
        total: what each state has cost, ``(states, outputs)``; overwritten by what it costs then.
        before: the state before each, by parity, ``(2, states)``.
        out: ``(2, inputs, outputs)``, receives multiples and errors.
        span: which outputs.
    """
    count, states = len(block), len(total)
    passed = np.empty((2, states, count), np.float32)
    kept = np.empty((count, 2, states), np.float32)
    origins = np.empty((count, states), np.int64)
    found = np.empty((3, 2, states), np.float32)
    aims, costs = np.empty(states, np.float32), np.empty(states, np.float32)
    for column in range(span[0], span[1]):
        costs[:] = total[:, column]
        passed[0] = F32(0)
        for i in range(count):
            old, new = passed[i & 1], passed[(i + 1) & 1]
            for state in range(states):
                aims[state] = block[i, column] + old[state, i]
            choose(aims, worth[i], costs, lengths, found)
            survive(found, before, costs, kept[i], origins[i])
            hand_on(i + 1, old, new, origins[i], kept[i, 1], within[i])
        best = 0
        for state in range(1, states):
            if costs[state] < costs[best]:
                best = state
        total[:, column] = F32(np.inf)
        total[best, column] = F32(0)
        for i in range(count - 1, -1, -1):
            out[:, i, column] = kept[i, :, best]
            best = origins[i, best]


SEARCH = Twin(search_loop, choose, survive, hand_on)
