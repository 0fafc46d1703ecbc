"""How many weights are zero, as training goes on."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dither.core import Described, SpecError
from dither.formats.settings import check_count
from dither.train.ramp import Ramp

KINDS: dict[str, type[Sparsity]] = {}
"""Every schedule by the name that JSON uses."""


@dataclass(frozen=True)
class Sparsity(Described, ABC):
    """A schedule of the share of weights that are zero.

    Attributes:
        end: the share at the end, 0 to 1; less than 1.
    """

    noun: ClassVar[str] = "sparsity"

    end: float

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        KINDS[cls.name] = cls

    def __post_init__(self) -> None:
        if not 0 <= self.end < 1:
            raise SpecError(f"{type(self).__name__} ends at a share of 0 to 1, not {self.end}")

    @abstractmethod
    def at(self, progress: float) -> float:
        """The share when a share ``progress`` of training is done."""

    def cycle(self, progress: float) -> int:
        """The number of the cycle: in a new one, weights that were pruned come back, at 0."""
        return 0

    def to_json(self) -> dict[str, Any]:
        """Name and settings that differ from their defaults, as JSON values."""
        return {"sparsity": self.name, **super().to_json()}


def sparsity_from_json(values: Mapping[str, Any]) -> Sparsity:
    """The inverse of :meth:`Sparsity.to_json`."""
    settings = dict(values)
    kind = KINDS.get(settings.pop("sparsity"))
    if kind is None:
        raise SpecError(
            f"there is no sparsity {values['sparsity']!r}; known are {', '.join(sorted(KINDS))}"
        )
    return kind.from_json(settings)


@dataclass(frozen=True)
class OneShot(Sparsity):
    """All at once, after a share of training.

    Attributes:
        begin: that share.
    """

    name: ClassVar[str] = "one-shot"

    begin: float = 0.0

    def at(self, progress: float) -> float:
        return self.end if progress >= self.begin else 0.0


@dataclass(frozen=True)
class Gradual(Sparsity):
    """Fast first, then slower: ``s_f + (s_i - s_f) (1 - t)^3`` (Zhu and Gupta 2017, 1710.01878).

    Attributes:
        start: the first share.
        begin: share of training before it rises.
        until: share of training after which the mask stays.
    """

    name: ClassVar[str] = "gradual"

    start: float = 0.0
    begin: float = 0.0
    until: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        self._ramp  # noqa: B018 - refuses what a ramp refuses

    @property
    def _ramp(self) -> Ramp:
        return Ramp(self.start, self.end, self.begin, self.until, "cubic")

    def at(self, progress: float) -> float:
        return self._ramp.at(progress)


@dataclass(frozen=True)
class Iterative(Sparsity):
    """Rounds that each prune the same share of what is left, then train (Han et al. 2015).

    Attributes:
        rounds: how many, of equal length.
        begin: share of training before the first: for weights that were not trained yet.
    """

    name: ClassVar[str] = "iterative"

    rounds: int = 5
    begin: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("Iterative", "rounds", self.rounds, 1, 1 << 20)
        if not 0 <= self.begin < 1:
            raise SpecError(f"Iterative begins after a share of training, not {self.begin}")

    def at(self, progress: float) -> float:
        if progress < self.begin:
            return 0.0
        share = (progress - self.begin) / (1 - self.begin)
        number = min(int(share * self.rounds) + 1, self.rounds)
        return float(1 - (1 - self.end) ** (number / self.rounds))


@dataclass(frozen=True)
class Cyclical(Sparsity):
    """Cycles in each of which sparsity climbs anew (Srinivas et al. 2022, arXiv 2202.01290).

    At the begin of each cycle sparsity falls back, and weights that were pruned come back with the
    value 0, to grow by their gradient if that is of use. The mask of the last cycle's end is final.

    Attributes:
        cycles: how many, of equal length.
        start: sparsity at the begin of each.
        until: share of a cycle after which its mask stays.
    """

    name: ClassVar[str] = "cyclical"

    cycles: int = 3
    start: float = 0.0
    until: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("Cyclical", "cycles", self.cycles, 1, 1 << 20)
        self._ramp  # noqa: B018 - refuses what a ramp refuses

    @property
    def _ramp(self) -> Ramp:
        return Ramp(self.start, self.end, 0.0, self.until, "cubic")

    def at(self, progress: float) -> float:
        return self.end if progress >= 1 else self._ramp.at(progress * self.cycles % 1)

    def cycle(self, progress: float) -> int:
        return min(int(progress * self.cycles), self.cycles - 1)

    def rate(self, progress: float) -> float:
        """A factor of the learning rate that restarts with each cycle: half a cosine, 1 to 0.

        >>> [round(Cyclical(0.9, cycles=2).rate(p), 2) for p in (0, 0.25, 0.5, 1)]
        [1.0, 0.5, 1.0, 0.0]
        """
        share = 1.0 if progress >= 1 else progress * self.cycles % 1
        return (1 + math.cos(math.pi * share)) / 2
