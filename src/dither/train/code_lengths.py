"""What training sees of the entropy coder: code lengths, and their slopes between grid points."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dither.coding import code_lengths

_SAMPLE = 1 << 18
_MARGIN = 2
_FARTHEST = 2.0**20
"""Positions beyond are counted here: a table of more entries helps nobody."""


@dataclass(frozen=True)
class CodeLengths:
    """Bits of each code of a uniform grid, by a histogram of where weights are.

    Attributes:
        bits: ideal code lengths, ``(classes, codes)``, float32: a table for each class of rows.
        lowest: the code of the first entry, in steps.
        total: bits of all weights, each rounded to nearest: what the coder will take, but for
            contexts and tables.
    """

    bits: Tensor
    lowest: int
    total: float

    @classmethod
    def of(cls, positions: Tensor, classes: Tensor | None = None) -> CodeLengths:
        """Count positions.

        Args:
            positions: weights in steps, any shape; of many a sample of rows is looked at.
            classes: class of each row, ``(rows,)``, integers from 0; None: all are of one class.
        """
        rows = positions.detach().reshape(len(positions) if classes is not None else 1, -1)
        count = 1 if classes is None else int(classes.max()) + 1
        if classes is None:
            rows = rows[:, :: max(1, rows.numel() // _SAMPLE)]
        elif (stride := rows.numel() // _SAMPLE) > 1:
            rows = rows[:, ::stride]
        rows = rows.round().clamp_(-_FARTHEST, _FARTHEST)
        if not rows.numel():
            return cls(torch.zeros(count, 2, device=rows.device), 0, 0.0)
        low, high = (int(end) for end in torch.aminmax(rows))
        lowest = min(low, 0) - _MARGIN
        size = max(high, 0) + _MARGIN - lowest + 1
        index = rows.sub_(lowest).to(torch.int64)
        if classes is not None:
            index += classes.reshape(-1, 1) * size
        counts = torch.bincount(index.reshape(-1), minlength=size * count).reshape(count, size)
        table = counts.cpu().numpy()
        lengths = np.stack([code_lengths(row) for row in table])
        total = float((table * lengths).sum()) * positions.numel() / index.numel()
        return cls(torch.from_numpy(lengths).float().to(positions.device), lowest, total)

    def at(self, whole: Tensor, classes: Tensor | None = None) -> Tensor:
        """Bits of codes, given as whole positions; arguments as in :meth:`of`."""
        flat, index = self._found(whole, classes, self.bits.shape[1] - 1)
        return flat.index_select(0, index).reshape(whole.shape)

    def bridged(self, first: int) -> CodeLengths:
        """The same with a straight line from 0 to the codes ``first`` and ``-first``.

        For a grid on which the codes between them are not used.
        """
        bits, zero = self.bits.clone(), -self.lowest
        for end in (max(zero - first, 0), min(zero + first, bits.shape[1] - 1)):
            share = torch.linspace(0, 1, abs(end - zero) + 1, device=bits.device)
            line = bits[:, [zero]] + share * (bits[:, [end]] - bits[:, [zero]])
            between = range(zero, end + 1) if end > zero else range(zero, end - 1, -1)
            bits[:, list(between)] = line
        return replace(self, bits=bits)

    def slopes(self, positions: Tensor, classes: Tensor | None = None) -> Tensor:
        """Derivatives of code lengths by positions.

        Lengths between grid points are interpolated: what would be expected if weights were
        rounded at random without bias.

        Args:
            positions: weights in steps, any shape.
            classes: as in :meth:`of`.
        """
        flat, index = self._found(positions.floor(), classes, self.bits.shape[1] - 2)
        return flat.diff(append=flat[-1:]).index_select(0, index).reshape(positions.shape)

    def _found(self, whole: Tensor, classes: Tensor | None, last: int) -> tuple[Tensor, Tensor]:
        """All lengths, and where those of whole positions are among them."""
        index = (whole - self.lowest).clamp_(0, last).to(torch.int32)
        if classes is not None:
            shape = (-1, *[1] * (whole.ndim - 1))
            index += (classes * self.bits.shape[1]).to(torch.int32).reshape(shape)
        return self.bits.reshape(-1), index.reshape(-1)


class GivenSlopes(torch.autograd.Function):
    """A number with given gradients: a function as it was where it was last looked at."""

    @staticmethod
    def forward(
        ctx: Any, _weight: Tensor, _other: Tensor, value: Tensor, slopes: tuple[Tensor, Tensor]
    ) -> Tensor:
        ctx.slopes = slopes
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.slopes, ctx.needs_input_grad, strict=False)
        return (*(slope * gradient if need else None for slope, need in needed), None, None)
