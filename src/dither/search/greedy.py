"""Spend a budget in file bytes on all tensors at once: predict, encode, measure, correct."""

from __future__ import annotations

from dither.core import BudgetError
from dither.search.allocate import allocate
from dither.search.forecast import Forecast, without_axes
from dither.search.knowledge import Choice
from dither.search.landing import land
from dither.search.ledger import Ledger
from dither.search.predict import GRID_INDEX_NBYTES, why_exact
from dither.search.size import LEAST_SHARE, SLACK_NBYTES, fills
from dither.terminal import printable

_PASSES = 4
_CLOSE = 0.02
"""Share of the budget by which a pass may miss for single tensors to make up for it."""
_FEW = 64
_MATTERS = 0.1
"""Share of the smallest file from which tensors that are kept exactly are named as the cause."""
_NAMED = 3
_NEARLY = 24.0
"""Predictions of the smallest choices may be off by about so many bytes."""


class Greedy:
    """For each tensor the choice with which a file fills its budget at the least predicted loss.

    Nothing but coded payloads is kept, and a tensor is coded again only when its choice changes.

    Args:
        forecast: of all tensors; learns from what is encoded.
        ledger: is filled.
    """

    def __init__(self, forecast: Forecast, ledger: Ledger) -> None:
        self._forecast, self._ledger = forecast, ledger

    def spend(self, budget: int) -> None:
        """Fill the ledger with a file of at most ``budget`` bytes.

        Raises:
            BudgetError: no choices fit; it names the smallest size that does.
        """
        plain = without_axes(self._forecast.tensors)
        try:
            size = self._meet(budget)
        except BudgetError:
            if not plain:
                raise
            size = 0
        if plain and size < LEAST_SHARE * budget and budget - size > SLACK_NBYTES:
            # Near the least size axes cost too much, and near the accuracy of its type a table
            # has to do without: in between there are sizes that only plain grids reach.
            self._forecast.change(plain)
            self._ledger.clear()
            self._meet(budget)

    def _meet(self, budget: int) -> int:
        """Code all tensors; the size of the file, at most the budget."""
        forecast, ledger = self._forecast, self._ledger
        size, overhead = 0, ledger.expected_overhead
        forecast.probe(forecast.plan(budget, overhead))
        for attempt in range(_PASSES):
            chosen = forecast.plan(budget, overhead)
            if attempt and self._holds(chosen):
                break
            forecast.encode(chosen, ledger, f"encoding, pass {attempt + 1}")
            size, overhead = ledger.nbytes, ledger.overhead
            if fills(size, budget) or abs(size - budget) < _CLOSE * budget:
                break
        size = land(ledger, forecast, budget)
        if size > budget:
            self._shrink(budget)
            size = land(ledger, forecast, budget)
        return size

    def _holds(self, chosen: dict[str, Choice]) -> bool:
        return all(self._ledger.choice(name).is_like(choice) for name, choice in chosen.items())

    def _shrink(self, budget: int) -> None:
        """Take bytes away until the file fits: for budgets near the least."""
        forecast, ledger = self._forecast, self._ledger
        size = ledger.nbytes
        target = size - ledger.overhead
        while size > budget:
            ladders = forecast.ladders()
            least = sum(ladder.choices[0].nbytes for ladder in ladders.values())
            target = max(least, target - max(1.25 * (size - budget), 16))
            chosen = allocate(ladders, target)
            if self._holds(chosen) and target <= least:
                self._take_least(budget)
                return
            forecast.encode(chosen, ledger, "fitting")
            size = ledger.nbytes

    def _take_least(self, budget: int) -> None:
        """The smallest file there is, by coding the cheapest choices of every tensor.

        Raises:
            BudgetError: it is larger than the budget.
        """
        ledger, candidates = self._ledger, {}
        for name in ledger.names:
            cheap = self._forecast.cheapest(name, _NEARLY)
            tried = [(choice, self._forecast.code(name, choice)) for choice in cheap]
            best = min(
                tried, key=lambda t: t[1].nbytes + GRID_INDEX_NBYTES * (t[0].step is not None)
            )
            ledger.put(name, *best)
            candidates[name] = tried
        size = ledger.nbytes
        # In a small file the index counts: what compresses well there depends on all tensors.
        for name in candidates if len(candidates) <= _FEW else ():
            for choice, coded in candidates[name]:
                before = ledger.choice(name), ledger.coded(name)
                ledger.put(name, choice, coded)
                if ledger.nbytes < size:
                    size = ledger.nbytes
                else:
                    ledger.put(name, *before)
        if size > budget:
            raise BudgetError(
                f"a file of {budget} bytes is impossible: these tensors take at least {size} "
                f"bytes, their names and shapes included; ask for {size} bytes or more"
                + self._kept_exactly(size),
                smallest=size,
            )

    def _kept_exactly(self, size: int) -> str:
        """The largest of the tensors that cannot be made smaller, and why, if they matter."""
        exact = {
            name: (self._ledger.coded(name).nbytes, why)
            for name in self._ledger.names
            if (why := why_exact(self._forecast.tensors[name].value))
        }
        if sum(nbytes for nbytes, _ in exact.values()) < _MATTERS * size:
            return ""
        largest = sorted(exact, key=lambda name: -exact[name][0])
        said = [
            f"{printable(name)} ({exact[name][0]:,} bytes: {exact[name][1]})"
            for name in largest[:_NAMED]
        ]
        more = f"; and {len(exact) - _NAMED} more" if len(exact) > _NAMED else ""
        return (
            f". Kept exactly: {'; '.join(said)}{more}. Repair or leave out such tensors, or store "
            "them as real floating-point numbers"
        )
