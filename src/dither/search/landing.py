"""Bring a file that is nearly right to its budget, by the steps of single tensors."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from dither.search.forecast import Forecast
from dither.search.knowledge import short
from dither.search.ledger import Ledger
from dither.search.size import ENOUGH, SLACK_NBYTES, fills

_TOUCHES = 24
_BRACKETINGS = 8
_MOST_CHANGE = 0.08
_MOST_COARSER = 0.5
_MOST_FINER = 3.0
_FINE_STEPS = 1 << 12
"""Payloads from this size on may spend two bytes more on an exact step."""


def land(
    ledger: Ledger,
    forecast: Forecast,
    budget: int,
    frozen: AbstractSet[str] = frozenset(),
) -> int:
    """Change steps until the file fills its budget; its size then, which may still miss it.

    Each time, the smallest tensor for which the change is small takes it on.

    Args:
        ledger: holds all tensors.
        forecast: has what is known of them, and codes them.
        budget: bytes.
        frozen: names that must stay as they are.
    """
    tried, size = set(frozen), ledger.nbytes
    while not fills(size, budget) and len(tried) < _TOUCHES + len(frozen):
        name = _pick(ledger, abs(goal(budget) - size), tried)
        if name is None:
            break
        tried.add(name)
        size = _fit(ledger, forecast, name, budget, size)
    return size


def goal(budget: int) -> int:
    """What single tensors aim at: a little less than all."""
    return budget - max(round(budget * (1 - ENOUGH) / 4), SLACK_NBYTES // 4)


def _pick(ledger: Ledger, gap: int, tried: set[str]) -> str | None:
    """The smallest tensor on a grid to which the gap is little, or else the largest."""
    grids = {
        name: ledger.coded(name).nbytes
        for name in ledger.names
        if ledger.choice(name).step is not None
        and ledger.choice(name).loss > 0
        and name not in tried
    }
    roomy = [name for name, nbytes in grids.items() if nbytes * _MOST_CHANGE >= gap]
    if roomy:
        return min(roomy, key=lambda name: grids[name])
    return max(grids, key=lambda name: grids[name], default=None)


def _fit(ledger: Ledger, forecast: Forecast, name: str, budget: int, size: int) -> int:
    """Search for the step of one tensor at which the file fills its budget; its new size.

    Positions are octaves finer than now; sizes at either side of the goal enclose it.
    """
    choice, coded, wanted = ledger.choice(name), ledger.coded(name), goal(budget)
    known = forecast.tensors[name]
    best = (size, choice, coded)
    under, over = ((0.0, size), None) if size <= wanted else (None, (0.0, size))
    # One octave of the step is one bit for each value, and less where codes are few.
    position = 8 * (wanted - size) / known.value.numel()
    for _ in range(_BRACKETINGS):
        position = min(max(position, -_MOST_COARSER), _MOST_FINER)
        step = (choice.step or 1.0) * 2.0**-position
        if best[2].nbytes < _FINE_STEPS or known.rows is not None:
            step = short(step)
        changed = choice.at(step)
        coded = forecast.code(name, changed)
        ledger.put(name, changed, coded)
        measured = ledger.nbytes
        if _miss(measured, budget) < _miss(best[0], budget):
            best = (measured, changed, coded)
        if fills(best[0], budget):
            break
        if measured <= wanted:
            under = (position, measured)
        else:
            over = (position, measured)
        if under and over:
            share = (wanted - under[1]) / max(over[1] - under[1], 1)
            position = under[0] + min(max(share, 0.15), 0.85) * (over[0] - under[0])
        else:
            position = position * 2 or 0.01
    ledger.put(name, best[1], best[2])
    return best[0]


def _miss(size: int, budget: int) -> float:
    """How far a file is from its budget; too large is worse than any that fits."""
    return float(budget - size) if size <= budget else float(budget + size)
