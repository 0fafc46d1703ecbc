"""Terms added to the user's loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from dither.train.schedules import Ramp, value_at

if TYPE_CHECKING:
    from dither.train.run import Run


class Penalty(Protocol):
    """A scalar that is added to the loss."""

    def __call__(self, run: Run) -> Tensor:
        """The term, times its weight."""
        ...


@dataclass(frozen=True)
class Size:
    """The estimated coded size of all trained weights, in a unit of one's choice.

    Attributes:
        weight: the factor (lambda), or a ramp.
        unit: bits in a unit: 8 for bytes, ``8 * 2**20`` (the default) for MiB, DiffQ's unit.
    """

    weight: float | Ramp
    unit: float = 8 * 2.0**20

    def __call__(self, run: Run) -> Tensor:
        return run.soft_bits() * (value_at(self.weight, run.progress) / self.unit)
