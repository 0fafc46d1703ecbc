"""Points bred from the best so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dither.core import SpecError
from dither.search.joint_space import Layout, Point
from dither.search.policies.policy import Learner


@dataclass(frozen=True)
class Evolution:
    """A plain (mu + lambda) strategy: two parents, layers from either, some numbers moved.

    Attributes:
        parents: the best so far, of which two are drawn.
        first: points that are drawn at random before; with ``from_allocator``, the allocator's with
            some numbers moved.
        rate: share of numbers that are moved, at least one.
        move: standard deviation of a move.
        from_allocator: begin at what the allocator chose, which is better than any random point.
        batch: points asked for at once.

    Raises:
        SpecError: settings that make no sense.
    """

    parents: int = 8
    first: int = 12
    rate: float = 0.1
    move: float = 0.2
    from_allocator: bool = False
    batch: int = 4

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        if self.parents < 1 or self.first < 1 or not 0 < self.rate <= 1 or self.move <= 0:
            raise SpecError(
                f"{self!r}: parents and first are 1 or more, the rate is above 0 and at most 1, a "
                "move is above 0"
            )

    def begin(self, layout: Layout, seed: int) -> Learner:
        """Begin a search."""
        return _Evolution(self, layout, np.random.default_rng(seed))


class _Evolution:
    def __init__(self, settings: Evolution, layout: Layout, generator: np.random.Generator) -> None:
        self._settings, self._layout, self._generator = settings, layout, generator
        self._asked = 0
        self._found: list[tuple[float, Point]] = []

    def ask(self, count: int) -> list[Point]:
        points = [self._next(self._asked + place) for place in range(count)]
        self._asked += count
        return points

    def tell(self, points: Sequence[Point], rewards: Sequence[float]) -> None:
        scored = [(r, p) for p, r in zip(points, rewards, strict=True) if not math.isnan(r)]
        # Sorted by rewards alone, so that among equals the older one stays.
        ranked = sorted(self._found + scored, key=lambda pair: -pair[0])
        self._found = ranked[: self._settings.parents]

    def _next(self, number: int) -> Point:
        layout, generator = self._layout, self._generator
        if number < self._settings.first or not self._found:
            if not self._settings.from_allocator:
                return tuple(generator.random(layout.size).tolist())
            return layout.start if number == 0 else self._moved(np.array(layout.start))
        mother, father = (
            np.array(self._found[int(generator.integers(len(self._found)))][1]) for _ in range(2)
        )
        from_mother = np.repeat(generator.random(len(layout.kernels)) < 0.5, layout.each)
        return self._moved(np.where(from_mother, mother, father))

    def _moved(self, point: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Point:
        settings, generator = self._settings, self._generator
        moves = generator.random(len(point)) < settings.rate
        moves[int(generator.integers(len(point)))] = True
        steps = generator.normal(0.0, settings.move, len(point))
        return tuple(np.clip(point + np.where(moves, steps, 0.0), 0.0, 1.0).tolist())
