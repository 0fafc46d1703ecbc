"""Values and actions that depend on how far training has come."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol

from dither.core import SpecError

if TYPE_CHECKING:
    from dither.train.run import Run

SHAPES = ("linear", "cosine", "cubic", "exponential")


class Schedule(Protocol):
    """Called when attached, after every optimizer step, and after resuming.

    So it sees step 0, and after resuming the last step once more: what it does should follow from
    the run and the step, not from how often it was called.
    """

    def __call__(self, run: Run, step: int) -> None:
        """Act on the run; ``step`` steps are done."""
        ...


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


@dataclass(frozen=True)
class Vary:
    """A schedule that lets a setting of surrogates follow a ramp.

    Attributes:
        setting: name of the surrogates' attribute: ``"p"`` of Quant-Noise, for example.
        ramp: its values.
        match: only for weights whose names match this glob.

    Raises:
        SpecError: when attached, if no surrogate that matches has such a setting.
    """

    setting: str
    ramp: Ramp
    match: str = "*"

    def __call__(self, run: Run, step: int) -> None:
        value, found = self.ramp.at(run.progress), False
        for name, surrogate, _ in run.weights():
            if fnmatchcase(name, self.match) and hasattr(surrogate, self.setting):
                setattr(surrogate, self.setting, value)
                found = True
        if not found:
            raise SpecError(
                f"no surrogate of a weight that matches {self.match!r} has the setting "
                f"{self.setting!r}; what the plan's methods have stands in their documentation"
            )


@dataclass(frozen=True)
class WarmUp:
    """A schedule that trains without noise first: weights are read as they are.

    Evaluation and files are quantized all the same. What surrogates learn has no gradient as long:
    under DDP, give it ``find_unused_parameters=True``.

    Attributes:
        until: share of the steps without noise.
        match: only for weights whose names match this glob.
    """

    until: float
    match: str = "*"

    def __post_init__(self) -> None:
        if not 0 <= self.until <= 1:
            raise SpecError(f"WarmUp lasts a share of the steps, 0 to 1, not {self.until}")

    def __call__(self, run: Run, step: int) -> None:
        for name, surrogate, _ in run.weights():
            if fnmatchcase(name, self.match):
                surrogate.active = run.progress >= self.until
