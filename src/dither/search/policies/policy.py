"""What says which points to try, and is told what came of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dither.search.joint_space import Layout, Point


class Learner(Protocol):
    """A policy at work on one problem."""

    def ask(self, count: int) -> list[Point]:
        """So many points to try next; none if there is nothing more to try."""
        ...

    def tell(self, points: Sequence[Point], rewards: Sequence[float]) -> None:
        """What came of the points that were asked for; NaN where that failed."""
        ...


class Policy(Protocol):
    """Settings of a search policy: a frozen dataclass.

    What it asks for depends on the layout, the seed, and what it was told, and on nothing else.
    """

    @property
    def batch(self) -> int:
        """How many points are asked for at once: so many processes can be of use."""
        ...

    def begin(self, layout: Layout, seed: int) -> Learner:
        """Begin a search."""
        ...
