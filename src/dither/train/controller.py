"""Steer training so that the coded size arrives at a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dither.core import SpecError
from dither.search import Sensitivity, data_free

ARRIVE = 0.6
"""Share of the steps after which the size should have arrived at the budget."""

AIM = 0.996
"""Share of the budget that is aimed at: what is missing is trimmed less gladly than left."""

_INTEGRAL = 3.0
"""Gain, in nats of lambda for each relative error of 1, at each update."""

_FASTEST = 0.5
"""The largest change in one update, in nats."""

_FIRST = 0.3

_CEILING, _FLOOR = math.log(1e3 * _FIRST), math.log(1e-2 * _FIRST)
"""Of log(lambda): where the size does not answer, it would rise for ever, or take for ever to come
back once it is needed."""


@dataclass(frozen=True)
class Budget:
    """A budget for :func:`dither.attach`, with control over how training approaches it.

    Attributes:
        size: bytes, ``"60KB"``, or ``"12x"``, ``"5%"`` of the model's own bytes.
        start: the size at which training begins, in the same units; by default the budget itself.
            A larger one shrinks as training goes on.
        arrive: share of the training steps, above 0 to 1, by which the size is down to the budget.
        sensitivity: for the data-free search that chooses the first steps: see
            :func:`dither.compress`.

    Raises:
        SpecError: ``arrive`` is out of range.

    >>> Budget("60KB", start="120KB").arrive
    0.6
    """

    size: int | str
    start: int | str | None = None
    arrive: float = ARRIVE
    sensitivity: Sensitivity = data_free

    def __post_init__(self) -> None:
        share: object = self.arrive
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise SpecError(
                f"a Budget arrives after a share of the steps, above 0 to 1, not {self.arrive!r}"
            )


MEASURES = 20
"""How often the file is measured while training to a budget, about."""

_EVERY = 10
"""Steps between looks at the estimated size, at most; between measurements, at least."""

_NUDGE = 0.6
"""Share of the error in size that is mended at once, by steps that all grow or shrink."""

_LEAST_NUDGE = 0.15
"""What is left of that share at the end of training."""

_FARTHEST = 0.05
"""Octaves by which they do at most."""


@dataclass
class Controller:
    """Finds the factor of the size penalty, lambda, so that sizes follow a path to the budget.

    log(lambda) integrates the logarithm of predicted over wanted bytes, within bounds, so that it
    comes to rest where training keeps the size by itself; until then errors are mended by a common
    factor of all steps. The wanted size falls geometrically from where training starts, and stays
    at the budget from the share ``arrive`` of the steps on.

    Attributes:
        nbytes: the budget.
        arrive: share of the steps after which sizes should be there.
        count: how many weights train with noise.
        log_weight: natural logarithm of lambda, for the size in bits per weight.
        start: bytes when training began.
        error: logarithm of predicted over wanted bytes, at the last update.
    """

    nbytes: int
    arrive: float = ARRIVE
    count: int = 1
    log_weight: float = math.log(_FIRST)
    start: float | None = None
    error: float = 0.0

    @property
    def weight(self) -> float:
        """Lambda: loss for one bit per weight."""
        return math.exp(self.log_weight)

    @property
    def per_bit(self) -> float:
        """Loss for one bit."""
        return self.weight / max(self.count, 1)

    def wanted(self, progress: float) -> float:
        """The size at which training should be, in bytes."""
        goal = AIM * self.nbytes
        if self.start is None or self.start <= goal:
            return goal
        share = min(progress / self.arrive, 1.0)
        return float(self.start * (goal / self.start) ** share)

    def update(self, predicted: float, progress: float) -> float:
        """Take in the predicted size in bytes; returns by how many octaves to coarsen all steps."""
        if self.start is None:
            self.start = predicted
        self.error = math.log(max(predicted, 1.0) / self.wanted(progress))
        moved = self.log_weight + min(max(_INTEGRAL * self.error, -_FASTEST), _FASTEST)
        self.log_weight = min(max(moved, _FLOOR), _CEILING)
        # Late in training many weights stand near the middle between two grid points, where a
        # little change of the step moves many codes.
        gain = _NUDGE * max(1 - progress, _LEAST_NUDGE)
        bits = 8 * predicted / max(self.count, 1)
        return min(max(gain * self.error * bits, -_FARTHEST), _FARTHEST)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as numbers."""
        return {"log_weight": self.log_weight, "start": self.start, "error": self.error}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.log_weight, self.start = state["log_weight"], state["start"]
        self.error = state["error"]


def measures_at(step: int, steps: int | None) -> bool:
    """Whether the file is measured after this step: it takes as long as many steps."""
    return step <= (steps or 1) and step % max(_EVERY, (steps or 1) // MEASURES) == 0


def looks_at(step: int, steps: int | None) -> bool:
    """Whether the size is at least estimated after this step."""
    return step <= (steps or 1) and step % min(_EVERY, max(1, (steps or 1) // MEASURES)) == 0
