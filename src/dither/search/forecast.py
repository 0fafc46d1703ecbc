"""What every choice is expected to take and lose, by predictions and all that was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import TypeVar
from zlib import crc32

import torch

from dither.archive import CodedTensor
from dither.progress import report
from dither.search.allocate import allocate
from dither.search.coder import PROBE, Coder
from dither.search.knowledge import Choice, Knowledge
from dither.search.ladder import Ladder
from dither.search.ledger import Ledger
from dither.search.predict import GRID_INDEX_NBYTES
from dither.team import ALONE, Team
from dither.threads import Room, side_by_side

Item = TypeVar("Item")
Result = TypeVar("Result")

AIM = 0.9985
"""Share of a budget that is allocated: predictions err."""

_PROBED = 1 << 16
_TOGETHER = 1 << 23
"""Values of tensors that are worked at at once, or those of the largest: it bounds the memory."""


class Forecast:
    """The ladders of all tensors, which learn from what their choices turn out to take.

    Args:
        tensors: their values, and what is known.
        team: processes that predict and encode together.
        coder: predicts and codes single tensors.
    """

    def __init__(
        self, tensors: Mapping[str, Knowledge], team: Team = ALONE, coder: Coder | None = None
    ) -> None:
        self.tensors = dict(tensors)
        self._team, self.coder = team, coder or Coder()
        self._ladders = self._map("predicting", self.coder.ladder, tensors)
        self._measured: dict[str, dict[float, float]] = {name: {} for name in tensors}

    def ladders(self) -> dict[str, Ladder]:
        """Of all tensors, corrected by what was measured."""
        return {n: ladder.corrected(self._measured[n]) for n, ladder in self._ladders.items()}

    def cheapest(self, name: str, allowance: float) -> list[Choice]:
        """Uncorrected choices whose bytes may be fewest, predictions being off by an allowance."""
        choices = self._ladders[name].choices
        return [c for c in choices if c.nbytes <= 2 * choices[0].nbytes + allowance]

    def plan(self, budget: int, overhead: float) -> dict[str, Choice]:
        """The best choices for a budget by all that is known now."""
        return allocate(self.ladders(), budget * AIM - overhead)

    def expected(self, name: str, step: float) -> float:
        """Bytes that a tensor is expected to take on a grid, as a ledger measures them."""
        return self._ladders[name].corrected(self._measured[name]).predict(step)

    def note(self, name: str, step: float | None, nbytes: float) -> None:
        """Learn what a tensor takes on a grid."""
        if step is not None:
            self._measured[name][step] = nbytes

    def renew(self, name: str, step: float | None, nbytes: float) -> None:
        """The same where all that was measured before no longer holds."""
        if step is not None:
            self._measured[name] = {step: nbytes}

    def change(self, tensors: Mapping[str, Knowledge]) -> None:
        """Know something else of some tensors; what was measured of them is forgotten."""
        self.tensors |= tensors
        self._ladders |= self._map("predicting", self.coder.ladder, tensors)
        self._measured |= {name: {} for name in tensors}

    def code(self, name: str, choice: Choice) -> CodedTensor:
        """A tensor as a choice codes it."""
        return self.coder.code(self.tensors[name], choice)

    def probe(self, chosen: Mapping[str, Choice]) -> AbstractSet[str]:
        """Learn what large tensors take from a part of their rows, before any is coded whole.

        Returns:
            their names.
        """
        parts = {
            name: (self.tensors[name], choice)
            for name, choice in chosen.items()
            if choice.step is not None and _can_probe(self.tensors[name])
        }
        nbytes = self._map("probing", lambda item: self.coder.probe(*item), parts)
        for name, (known, choice) in parts.items():
            share = known.every(PROBE).value.numel() / known.value.numel()
            self.note(name, choice.step, nbytes[name] / share + GRID_INDEX_NBYTES)
        return parts.keys()

    def encode(self, chosen: Mapping[str, Choice], ledger: Ledger, stage: str) -> None:
        """Put choices into a ledger and learn what they take; what is there already stays."""
        changed = {
            name: choice
            for name, choice in chosen.items()
            if name not in ledger or not ledger.choice(name).is_like(choice)
        }
        items = {name: (name, choice) for name, choice in changed.items()}
        coded = self._map(stage, lambda item: self.code(*item), items)
        for name, choice in changed.items():
            self.note(name, choice.step, ledger.put(name, choice, coded[name]))

    def _map(
        self, stage: str, function: Callable[[Item], Result], items: Mapping[str, Item]
    ) -> dict[str, Result]:
        """Apply a function to every value, in all processes and on all cores."""
        costs = {name: self.tensors[name].value.numel() for name in items}

        def run(names: Sequence[str]) -> dict[str, Result]:
            return self._map_here(stage, function, {name: items[name] for name in names})

        return self._team.collected(stage + _said(items), run, costs)

    def _map_here(
        self, stage: str, function: Callable[[Item], Result], items: Mapping[str, Item]
    ) -> dict[str, Result]:
        """The same on the cores of this process; NumPy and torch release the lock."""
        done: dict[str, Result] = {}
        sizes = {name: self.tensors[name].value.numel() for name in items}
        total, passed = max(sum(sizes.values()), 1), 0

        def note(name: str, result: Result) -> None:
            nonlocal passed
            done[name], passed = result, passed + sizes[name]
            report(stage, passed / total, name)

        names = sorted(items, key=lambda name: -sizes[name])  # or the last one would be waited for
        room = Room(max(_TOGETHER, *sizes.values()) if sizes else 0)

        def work(name: str) -> Result:
            with room.for_some(sizes[name]):
                return function(items[name])

        if names and sizes[names[0]] > _TOGETHER // 4:  # or nothing would be heard for seconds
            report(stage, 0.0, names[0])
        with side_by_side(work, names, min(4, torch.get_num_threads())) as results:
            for name, result in zip(names, results, strict=True):
                note(name, result)
        return done


def _said(items: Mapping[str, object]) -> str:
    """What processes must agree on to encode together: names and steps."""
    steps = [
        (name, item[1].step if isinstance(item, tuple) else None) for name, item in items.items()
    ]
    return f", {len(steps)} tensors ({crc32(repr(steps).encode()):08x})"


def without_axes(tensors: Mapping[str, Knowledge]) -> dict[str, Knowledge]:
    """Those tensors that have axes, without them."""
    return {n: replace(known, axes=None) for n, known in tensors.items() if known.axes is not None}


def _can_probe(known: Knowledge) -> bool:
    """Whether some rows tell what all take: not where they share axes, which are stored once."""
    return known.value.numel() > _PROBED and known.axes is None
