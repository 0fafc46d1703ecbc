"""Weights that bear rounding at any width: what clients of a federation train with, or anyone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dither.core import Encoded, SpecError, Stats
from dither.formats import Affine
from dither.formats.settings import check_kind
from dither.train.method import Method
from dither.train.noise import Noise
from dither.train.refreshed_format import Fitted
from dither.train.straight_through import Replacing
from dither.train.surrogate import Surrogate, plain

FLOAT = 32
"""The width that stands for no rounding at all."""


@dataclass(frozen=True)
class _AnyWidth(Method):
    """What both methods have in common: widths to draw from, and the grid of files."""

    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, FLOAT)
    format: Affine = field(default_factory=Affine)
    seed: int = 0

    def __post_init__(self) -> None:
        who = type(self).__name__
        check_kind(who, self.format, (Affine,))
        if self.format.bits is None:
            raise SpecError(f"{who} rounds on a bounded Affine, not {self.format!r}")
        object.__setattr__(self, "widths", tuple(self.widths))
        good = [type(n) is int and (1 <= n <= 16 or n == FLOAT) for n in self.widths]
        if not good or not all(good):
            raise SpecError(f"{who} has widths from 1 to 16, and {FLOAT}, not {self.widths}")

    def width(self, step: int) -> int:
        """That of a step, the same for all weights."""
        cpu = torch.device("cpu")
        generator = Noise(self.seed).generator(step, "width", cpu)
        return self.widths[int(torch.randint(len(self.widths), (), generator=generator))]

    def grid(self, width: int) -> Affine:
        """The grid of a width."""
        return replace(self.format, bits=width)


@dataclass(frozen=True)
class MQAT(_AnyWidth):
    """Multi-bit quantization-aware training (Gupta et al. 2023).

    arXiv 2206.10844. Each step draws a width for all weights, and training reads weights that are
    rounded at it; gradients pass straight through, but not to weights that the grid clips. Ranges
    are those of the weights at each step.

    Attributes:
        widths: to draw from, all alike; 32 is no rounding.
        format: what files and evaluation hold; its other settings are those of all widths.
        seed: of the widths; clients of a federation have different ones.

    >>> surrogate = MQAT(widths=(2,)).begin(torch.ones(2))
    >>> surrogate.draw(torch.tensor([-0.8, 0.3]), torch.Generator(), 0)
    >>> surrogate(torch.tensor([-0.8, 0.3]))
    tensor([-0.8000,  0.4000])
    """

    name: ClassVar[str] = "mqat"

    def begin(self, weight: Tensor) -> Surrogate:
        return RoundedAtWidths(self)


@dataclass(frozen=True)
class APQN(_AnyWidth):
    """Additive pseudo-quantization noise at drawn widths (Gupta et al. 2023).

    arXiv 2206.10844. Each step draws a width for all weights, and training reads ``w + u`` with
    ``u`` uniform on ``-s/2 .. s/2``, ``s`` the step of the width's grid, so of the variance
    ``s**2 / 12`` that rounding has. There is no straight-through estimator: the gradient is exact.

    Attributes:
        widths: to draw from, all alike; 32 is no noise.
        format: what files and evaluation hold; its other settings are those of all widths.
        seed: of the widths; clients of a federation have different ones.

    >>> weight = torch.zeros(10_000).index_fill(0, torch.tensor([0]), 1.0)
    >>> surrogate = APQN(widths=(2,)).begin(weight)
    >>> surrogate.draw(weight, torch.Generator().manual_seed(0), 0)
    >>> noise = surrogate(weight) - weight  # on 2 bits for -1 to 1, a step is 1
    >>> round(float(noise.var() * 12), 1)
    1.0
    """

    name: ClassVar[str] = "apqn"

    def begin(self, weight: Tensor) -> Surrogate:
        return NoisyAtWidths(self)


class RoundedAtWidths(Replacing):
    """One weight, rounded at the width of the step."""

    def __init__(self, spec: MQAT) -> None:
        super().__init__(Fitted(spec.format, "minmax"), 1)
        self.spec = spec
        self._width = spec.format.bits or FLOAT

    def draw(self, weight: Tensor, generator: torch.Generator, step: int) -> None:
        self._width = self.spec.width(step)
        if self._width == FLOAT:
            self._drawn += 1
            return
        self.fitted = Fitted(self.spec.grid(self._width), "minmax")
        super().draw(weight, generator, step)

    def fill(self, weight: Tensor, out: Tensor) -> Tensor | None:
        return self.fitted.values(weight, out)

    def noisy(self, weight: Tensor) -> Tensor:
        return weight if self._width == FLOAT else super().noisy(weight)

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        return self.spec.format.encode(plain(weight))

    def aside(self) -> dict[str, Any]:
        """Nothing: widths and ranges are those of the step."""
        return {}

    def load_aside(self, state: Mapping[str, Any]) -> None:
        del state


class NoisyAtWidths(Surrogate):
    """One weight with noise of the width of the step."""

    def __init__(self, spec: APQN) -> None:
        super().__init__()
        self.spec = spec
        self._noise: Tensor | None = None

    def draw(self, weight: Tensor, generator: torch.Generator, step: int) -> None:
        width, weight = self.spec.width(step), plain(weight).float()
        self._noise = None
        if width != FLOAT and weight.numel():
            grid = self.spec.grid(width)
            unit = torch.rand(weight.shape, generator=generator, device=weight.device) - 0.5
            self._noise = unit * step_of(grid, weight)

    def noisy(self, weight: Tensor) -> Tensor:
        return weight if self._noise is None else weight + self._noise

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        return self.spec.format.encode(plain(weight))


def step_of(grid: Affine, weight: Tensor) -> Tensor:
    """The distance of neighbouring values of a fitted grid, for each weight."""
    params = grid.fit(weight)
    names = list(params)
    steps = torch.empty_like(weight, memory_format=torch.contiguous_format)
    parts = [params[name] for name in names]
    for (box,), held in grid.grouping(tuple(weight.shape)).walk([steps], parts, 1 << 16):
        line = grid.line(dict(zip(names, held, strict=True)))
        box.copy_((line.scale.abs() * line.stride).expand(box.shape))
    return steps
