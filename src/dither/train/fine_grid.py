"""Vectors: few, and an error in one reaches every position."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dither.core import Encoded, SpecError, Stats
from dither.formats import Affine, Raw
from dither.search.sensitivity import RANGE, by_ratio, counted
from dither.train.method import AfterTraining, Method
from dither.train.surrogate import Surrogate


@dataclass(frozen=True)
class Fine(Method):
    """Trains unquantized and ends on a fine entropy-coded grid: for biases, norms and statistics.

    The step is a share of the standard deviation; where none is negative, as with variances, at
    most the same share of the root harmonic mean square of those that count, so that none of these
    becomes 0. Values too far apart for a grid are stored as they are.

    Attributes:
        precision: the step in standard deviations. A value costs about
            ``log2(4.13 / precision)`` bits: 7.1 at the default.

    >>> bias = torch.tensor([-0.8, -0.31, 0.02, 0.7])
    >>> Fine(0.1).begin(bias).encode(bias).decode()
    tensor([-0.8167, -0.3267,  0.0000,  0.7078])
    """

    name: ClassVar[str] = "fine"

    precision: float = 0.03

    def __post_init__(self) -> None:
        if not (math.isfinite(self.precision) and self.precision > 0):
            raise SpecError(f"Fine has a positive precision, not {self.precision}")

    def begin(self, weight: Tensor) -> Surrogate:
        return AfterTraining(self)

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        """Nearest codes on the grid."""
        values = weight.detach().reshape(-1).double()
        grid = Affine(bits=None, scale_dtype=torch.bfloat16)
        if not values.numel() or not bool(values.isfinite().all()):
            return Affine(bits=None).encode(weight)  # an empty tensor, or an error that says why
        spread = min(float(values.std(correction=0)), by_ratio(values))
        least = float(values.abs().max()) * RANGE
        step = max(spread * self.precision, least) if spread else least / RANGE or 1.0
        if bool((counted(values) < step / 2).any()):
            return Raw().encode(weight)
        return grid.assign(weight, {"scale": torch.tensor([step], device=weight.device)})
