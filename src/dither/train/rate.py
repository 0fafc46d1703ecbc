"""What training sees of the entropy coder: code lengths, interpolated so that they have a slope."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dither.coding import code_lengths

_SAMPLE = 1 << 18
_MARGIN = 2


class CodeLengths:
    """Bits of each code of a uniform grid, by a histogram of where weights are now.

    Attributes:
        bits: ideal code lengths, ``(codes,)``, float32.
        lowest: the code of the first entry, in steps.
    """

    def __init__(self, bits: Tensor, lowest: int) -> None:
        self.bits = bits
        self.lowest = lowest

    @classmethod
    def of(cls, positions: Tensor) -> CodeLengths:
        """Count ``positions``: weights in steps, any shape, of which a sample is looked at."""
        flat = positions.detach().reshape(-1)
        flat = flat[:: max(1, flat.numel() // _SAMPLE)].round().clamp(-(2.0**20), 2.0**20)
        if not flat.numel():
            return cls(torch.zeros(2, device=positions.device), 0)
        low, high = (int(end) for end in torch.aminmax(flat))
        lowest = min(low, 0) - _MARGIN
        size = max(high, 0) + _MARGIN - lowest + 1
        counts = torch.bincount((flat - lowest).to(torch.int64), minlength=size)
        lengths = code_lengths(counts.cpu().numpy().astype(np.float64))
        return cls(torch.from_numpy(lengths).float().to(positions.device), lowest)

    def total(self, weight: Tensor, step: Tensor) -> Tensor:
        """Bits of all weights, a scalar, with gradients to weights and steps.

        Between two grid points the length is interpolated: it is the expected length if weights
        were rounded at random without bias.

        Args:
            weight: float32.
            step: broadcastable to it.
        """
        bits: Tensor = _Interpolated.apply(  # type: ignore[no-untyped-call]
            weight, step, self.bits, self.lowest
        )
        return bits


class _Interpolated(torch.autograd.Function):
    """Sum of interpolated code lengths; keeps one slope per weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, bits: Tensor, lowest: int) -> Tensor:
        place = weight / step
        whole = place.floor()
        index = (whole - lowest).clamp_(0, len(bits) - 2).to(torch.int32)
        slopes = (bits[1:] - bits[:-1]).take(index.long())
        total = bits.take(index.long()).sum(dtype=torch.float64)
        total += (slopes * (place - whole)).sum(dtype=torch.float64)
        ctx.save_for_backward(slopes, weight, step)
        return total.to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slopes, weight, step = ctx.saved_tensors
        to_weight = slopes * (gradient / step)
        to_step = None
        if ctx.needs_input_grad[1]:
            to_step = -sum_to(to_weight * weight, step.shape) / step
        return (to_weight if ctx.needs_input_grad[0] else None), to_step, None, None


def sum_to(value: Tensor, shape: torch.Size) -> Tensor:
    """The sum of ``value`` over the axes along which a tensor of ``shape`` was broadcast."""
    return value.sum_to_size(shape) if value.shape != shape else value
