"""The choices worth taking for each tensor, corrected by what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

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
        for choice in sorted(choices, key=lambda c: (c.nbytes, c.loss)):
            if hull and choice.loss >= hull[-1].loss:
                continue
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], choice):
                hull.pop()
            hull.append(choice)
        return cls(tuple(hull))

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

        def correct(choice: Choice) -> Choice:
            if choice.step is None:
                return choice
            ratio = float(np.interp(math.log2(choice.step), known, ratios))
            return replace(choice, nbytes=(choice.nbytes + _DAMPING) * ratio - _DAMPING)

        return Ladder.hull(correct(choice) for choice in self.choices)


def _slope(a: Choice, b: Choice) -> float:
    return (b.loss - a.loss) / max(b.nbytes - a.nbytes, 1e-9)
