"""Settings that depend on how far training has come."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dither.core import SpecError

SHAPES = ("linear", "cosine", "cubic", "exponential")


@dataclass(frozen=True)
class Ramp:
    """A value that goes from ``start`` to ``end`` while training goes from ``begin`` to ``until``.

    Before and after, it stays. ``begin`` and ``until`` are shares of all steps.

    Attributes:
        start: first value.
        end: last value.
        begin: share of the steps before it moves.
        until: share of the steps when it has arrived.
        shape: ``"linear"``, ``"cosine"`` (half a period), ``"cubic"`` (fast first: Zhu and Gupta
            2017) or ``"exponential"`` (a constant factor; both values positive).

    >>> round(Ramp(0.0, 0.1, begin=0.25, shape="cosine").at(0.625), 6)
    0.05
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise SpecError(f"a Ramp has one of the shapes {', '.join(SHAPES)}, not {self.shape!r}")
        if not 0 <= self.begin <= self.until <= 1:
            raise SpecError(
                f"a Ramp begins and ends within training, 0 <= begin <= until <= 1, not "
                f"{self.begin} and {self.until}"
            )
        if self.shape == "exponential" and min(self.start, self.end) <= 0:
            raise SpecError("an exponential Ramp needs two positive values")

    def at(self, progress: float) -> float:
        """The value when a share ``progress`` of the steps is done."""
        if progress <= self.begin:
            return self.start if progress < self.begin or self.until > self.begin else self.end
        if progress >= self.until:
            return self.end
        share = (progress - self.begin) / (self.until - self.begin)
        if self.shape == "exponential":
            return float(self.start * (self.end / self.start) ** share)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        elif self.shape == "cubic":
            share = 1 - (1 - share) ** 3
        return self.start + (self.end - self.start) * share


def value_at(value: float | Ramp, progress: float) -> float:
    """A number, or what a ramp has come to."""
    return value.at(progress) if isinstance(value, Ramp) else value
