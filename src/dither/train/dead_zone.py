"""Learned steps with a learned dead zone: pruning and quantization by gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dither.core import Encoded, SpecError, Stats
from dither.train.code_lengths import CodeLengths, GivenSlopes
from dither.train.lsq import LSQ, LearnedStep

_NEAR = 0.25
"""Weights this far from the edge of the zone, in steps, say how many a wider one would take."""


@dataclass(frozen=True)
class DeadZone(LSQ):
    """Learned steps, and a learned width of the zone rounded to 0 (CoDeQ, Wenshøj et al. 2025).

    ``w = s * round(w / s)`` where ``|w| >= zone * s / 2``, else 0: magnitude pruning inside the
    quantizer (arXiv 2512.12981). Gradients pass straight through to all weights, so that what is 0
    may come back, and reach the width as in the paper: weights in the zone that would grow make it
    narrower. The size penalty's gradient to it is that of the coded size, which stands in for the
    paper's weight decay.

    The paper's values outside begin at the zone's edge; here they stay multiples of the step, so
    that a file needs no table of values, and a zone of one step is rounding to nearest.

    Attributes:
        zone: width to begin with, in steps; 1 or more.

    >>> weight = torch.tensor([[-0.8, -0.31, 0.02, 0.7]])
    >>> DeadZone(4, step=0.1, zone=7.0).begin(weight).encode(weight).decode()
    tensor([[-0.8008,  0.0000,  0.0000,  0.7007]])
    """

    name: ClassVar[str] = "dead_zone"

    zone: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.zone) and self.zone >= 1):
            raise SpecError(f"DeadZone begins with a width of 1 or more steps, not {self.zone}")

    def begin(self, weight: Tensor) -> LearnedZone:
        return LearnedZone(self, weight)


class LearnedZone(LearnedStep):
    """One weight on a grid whose steps and dead zone are learned.

    Attributes:
        log_zone: natural logarithm of the zone's width in steps, ``(1,)``; below 0 it is 0.
    """

    def __init__(self, spec: DeadZone, weight: Tensor) -> None:
        super().__init__(spec, weight)
        first = torch.full((1,), math.log(spec.zone), device=weight.device)
        self.log_zone = nn.Parameter(first, requires_grad=spec.learn)
        self._to_zone = torch.zeros(1, device=weight.device)

    def half_width(self) -> Tensor:
        """From 0 to the edge in steps, a scalar; differentiable, also where it is held at 1/2."""
        held = self.log_zone.detach().clamp(min=0) + (self.log_zone - self.log_zone.detach())
        return held.exp()[0] / 2

    def soft_bits(self, weight: Tensor) -> Tensor:
        value = super().soft_bits(weight)
        nothing = torch.zeros((), device=value.device)
        slopes = (self._to_zone, self._to_zone)
        by_zone: Tensor = GivenSlopes.apply(  # type: ignore[no-untyped-call]
            self.log_zone, self.log_zone.detach(), nothing, slopes
        )
        return value + by_zone

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        steps = self._trimmed().bfloat16().float()
        return super().encode(self._cleared(weight, self._spread(steps)), stats)

    def aside(self) -> dict[str, Any]:
        return {**super().aside(), "to_zone": self._to_zone}

    def load_aside(self, state: Mapping[str, Any]) -> None:
        super().load_aside(state)
        self._to_zone = state["to_zone"]

    def _cleared(self, weight: Tensor, steps: Tensor) -> Tensor:
        cleared: Tensor = _Cleared.apply(  # type: ignore[no-untyped-call]
            weight, steps * self.half_width()
        )
        return cleared

    def _lengths(self, place: Tensor) -> CodeLengths:
        """Straight between 0 and the first code beyond the zone; what a wider one would save."""
        half = float(self.half_width())
        away = place.abs()
        lengths = CodeLengths.of(place.masked_fill(away < half, 0.0), self.classes)
        first = math.floor(half + 0.5)
        zero, last = -lengths.lowest, lengths.bits.shape[1] - 1
        ends = [max(zero - first, 0), min(zero + first, last)]
        saved = lengths.bits[:, ends].mean(1) - lengths.bits[:, zero]
        near = (away.sub_(half).abs_() < _NEAR).to(saved.dtype)
        taken = near.sum().reshape(1)
        if self.classes is not None:
            taken = torch.zeros_like(saved).index_add_(0, self.classes, near.flatten(1).sum(1))
        self._to_zone = (taken @ saved * (-half / (2 * _NEAR))).reshape(1)
        return lengths.bridged(first)


class _Cleared(torch.autograd.Function):
    """0 within a zone; gradients straight through to weights, and to the zone's half width."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, half: Tensor) -> Tensor:
        ctx.save_for_backward(weight, half)
        return weight.masked_fill(weight.abs() < half, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, half = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return gradient, None
        moved = (weight.sign() * gradient).masked_fill_(weight.abs() >= half, 0.0)
        return gradient, moved.neg_().sum_to_size(half.shape)
