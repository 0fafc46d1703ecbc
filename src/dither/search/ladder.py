"""The choices worth taking for each tensor, corrected by what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

import numpy as np

from dither.search.knowledge import Choice, Knowledge
from dither.search.proposers import PROPOSERS

_DAMPING = 32.0


@dataclass(frozen=True)
class Ladder:
    """The choices worth taking, bytes rising and loss falling along a convex curve."""

    choices: tuple[Choice, ...]

    @classmethod
    def of(cls, known: Knowledge) -> Ladder:
        """What all proposers offer for a tensor."""
        proposers = PROPOSERS if known.proposers is None else known.proposers
        return cls.hull(choice for proposer in proposers for choice in proposer.propose(known))

    @classmethod
    def hull(cls, choices: Iterable[Choice]) -> Ladder:
        """Those on the lower convex hull of (bytes, loss), from the fewest bytes on."""
        hull: list[Choice] = []
        for choice in sorted(choices, key=attrgetter("nbytes", "loss")):
            if hull and choice.loss >= hull[-1].loss:
                continue
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], choice):
                hull.pop()
            hull.append(choice)
        return cls(tuple(hull))

    @cached_property
    def _logs(self) -> dict[int, float]:
        """The binary logarithms of the steps of grids, by their places."""
        return {i: math.log2(c.step) for i, c in enumerate(self.choices) if c.step is not None}

    def predict(self, step: float) -> float:
        """Predicted bytes of the grid whose step is nearest."""
        grids = (choice for choice in self.choices if choice.step is not None)
        return min(grids, key=lambda c: abs(math.log2((c.step or step) / step))).nbytes

    def corrected(self, measured: Mapping[float, float]) -> Ladder:
        """The same with the bytes of grids corrected by what some of them turned out to take.

        Args:
            measured: bytes by step. Between measured steps the correction is interpolated.
        """
        if not measured:
            return self
        steps = sorted(measured)
        known = [math.log2(step) for step in steps]
        ratios = [(measured[step] + _DAMPING) / (self.predict(step) + _DAMPING) for step in steps]
        found = np.interp(list(self._logs.values()), known, ratios).tolist()
        choices = list(self.choices)
        for place, ratio in zip(self._logs, found, strict=True):
            old = choices[place]
            nbytes = (old.nbytes + _DAMPING) * ratio - _DAMPING
            choices[place] = Choice(nbytes, old.loss, old.proposer, old.step, old.fed)
        return Ladder.hull(choices)


def _slope(a: Choice, b: Choice) -> float:
    return (b.loss - a.loss) / max(b.nbytes - a.nbytes, 1e-9)
