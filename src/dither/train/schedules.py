"""Actions that depend on how far training has come."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from dither.core import SpecError
from dither.train.attached import Attached
from dither.train.ramp import Ramp


class Schedule(Protocol):
    """Called when attached, after every optimizer step, and after resuming.

    So it sees step 0, and after resuming the last step once more: what it does should follow from
    the run and the step, not from how often it was called.
    """

    def __call__(self, run: Attached, step: int) -> None:
        """Act on the run; ``step`` steps are done."""
        ...


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

    def __call__(self, run: Attached, step: int) -> None:
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

    def __call__(self, run: Attached, step: int) -> None:
        for name, surrogate, _ in run.weights():
            if fnmatchcase(name, self.match):
                surrogate.active = run.progress >= self.until
