"""Points at random, and none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dither.search.joint_space import Layout, Point
from dither.search.policies.policy import Learner


@dataclass(frozen=True)
class RandomPoints:
    """Every number alike and by itself: what a search has to beat.

    Attributes:
        batch: points asked for at once.
    """

    batch: int = 4

    def begin(self, layout: Layout, seed: int) -> Learner:
        """Begin a search."""
        return _Random(layout.size, np.random.default_rng(seed))


@dataclass(frozen=True)
class _Random:
    size: int
    generator: np.random.Generator

    def ask(self, count: int) -> list[Point]:
        return [tuple(self.generator.random(self.size).tolist()) for _ in range(count)]

    def tell(self, points: Sequence[Point], rewards: Sequence[float]) -> None:
        """Learns nothing."""


@dataclass(frozen=True)
class Allocator:
    """Nothing but the file that every search begins with."""

    batch: int = 1

    def begin(self, layout: Layout, seed: int) -> Learner:
        """Begin a search."""
        return self

    def ask(self, count: int) -> list[Point]:
        """Nothing."""
        return []

    def tell(self, points: Sequence[Point], rewards: Sequence[float]) -> None:
        """Learns nothing."""
