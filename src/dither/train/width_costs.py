"""What training sees of the coder where groups of weights have widths of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from dither.coding import code_lengths
from dither.formats.mixed import WIDEST

_FINEST = 12
BINS = 1 << _FINEST
"""Cells of the range, of which the codes of each width are made up."""

_NEIGHBOURS = 0.05
"""Share of the weights of neighbouring widths that counts for a width: it may have none yet."""

_HEAD_BITS = 34.0
"""Of a payload: its head and the state of a lane, about."""

_CHUNK = 1 << 15

_STEEPEST = 1e30
"""Cells in a unit, at most: beyond, slopes would overflow."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class WidthCosts:
    """Coded bits of groups by width, linear about the widths and weights at which it was made.

    Attributes:
        constant: bits at width 0 of that line, and of tables and heads, a float64 scalar.
        per_bit: bits that one more bit of width adds to each group, ``(groups,)``.
        pull: slope of the coded bits in each weight, of the flattened weight's shape.
    """

    constant: Tensor
    per_bit: Tensor
    pull: Tensor

    @classmethod
    def of(cls, flat: Tensor, bits: Tensor, group: int, low: Tensor, span: Tensor) -> WidthCosts:
        """Measure on the weights as they are.

        The bits are those of rounded widths, as the file would have them; the slope in a width is
        what it would cost to go from the integer below to the one above. The lengths of codes
        follow the histogram of all weights of a width, which are coded together. Codes are a
        staircase in the weights, so that the slope in a weight is that of lengths interpolated
        between codes.

        Args:
            flat: float32 weights, ``(weights,)``.
            bits: real-valued widths, ``(groups,)``.
            group: weights of a group; the last may have fewer.
            low: what code 0 decodes to, a scalar.
            span: what the highest code decodes to, less ``low``, a scalar.
        """
        bits = bits.detach()
        whole = bits.floor().clamp_(0, WIDEST - 1)
        share = (bits - whole).clamp_(0, 1)
        below = whole.to(torch.int32)
        scale = torch.where(span > 0, BINS / span, 0.0).clamp_max(_STEEPEST).to(flat.dtype)
        cells = cells_of(flat, low, scale)
        counts = _counts(cells, below + (share > 0.5), group)
        lengths, slopes, heads = tables(counts.cpu().numpy())
        table = torch.from_numpy(lengths).to(flat).view(-1)
        rises = (torch.from_numpy(slopes).to(flat) * (scale / BINS)).view(-1)
        at, step, pull = (torch.empty_like(t) for t in (share, share, flat))
        groups = max(1, _CHUNK // group)
        for box, own, part, out_at, out_step, out_pull in zip(
            cells.split(groups * group),
            below.split(groups),
            share.split(groups),
            at.split(groups),
            step.split(groups),
            pull.split(groups * group),
            strict=True,
        ):
            index = box + spread(own * BINS, group, len(box))
            first = table.index_select(0, index)
            second = table.index_select(0, index + BINS)
            out_at.copy_(sums(first, group))
            out_step.copy_(sums(second.sub_(first), group))
            first, second = (rises.index_select(0, i) for i in (index, index + BINS))
            torch.lerp(first, second, spread(part, group, len(box)), out=out_pull)
        heights, widths = _width_lengths(below, share)
        own = torch.where(share > 0.5, at + step, at).sum(dtype=torch.float64)
        per_bit = step + heights
        constant = own + float(heads.sum()) + widths - (per_bit * bits).sum(dtype=torch.float64)
        return cls(constant, per_bit, pull)

    def total(self, weight: Tensor, bits: Tensor) -> Tensor:
        """Coded bits, a scalar, with gradients to widths and weights."""
        pulled: Tensor = _Pull.apply(weight, self.pull)  # type: ignore[no-untyped-call]
        return self.constant.to(bits.dtype) + torch.dot(bits, self.per_bit) + pulled


def sums(flat: Tensor, group: int) -> Tensor:
    """Sums of groups of consecutive entries; the last group may have fewer."""
    if group == 1:
        return flat
    full = len(flat) // group * group
    if group > 64:
        total = flat[:full].view(-1, group).sum(1)
    else:  # a product is faster than so short a sum
        total = flat[:full].view(-1, group) @ flat.new_ones(group)
    return total if full == len(flat) else torch.cat([total, flat[full:].sum().reshape(1)])


def spread(values: Tensor, group: int, count: int) -> Tensor:
    """Each value ``group`` times, ``count`` in all."""
    if group == 1:
        return values
    return values.unsqueeze(1).expand(-1, group).reshape(-1)[:count]


def cells_of(flat: Tensor, low: Tensor, scale: Tensor) -> Tensor:
    """In which cell of the range each weight lies, int32."""
    out = torch.empty(flat.shape, dtype=torch.int32, device=flat.device)
    for box, cells in zip(flat.split(_CHUNK), out.split(_CHUNK), strict=True):
        # Of ranges beyond what float32 divides by, nothing is left but NaN.
        cells.copy_(box.sub(low).mul_(scale).nan_to_num_(0.0).clamp_(0, BINS - 1))
    return out


def _counts(cells: Tensor, widths: Tensor, group: int) -> Tensor:
    """Weights in each cell by width, ``(WIDEST + 1, BINS)``."""
    size = (WIDEST + 1) * BINS
    counts = torch.zeros(size, dtype=torch.int64, device=cells.device)
    groups = max(1, (1 << 20) // group)
    boxes = zip(cells.split(groups * group), widths.split(groups), strict=True)
    for box, own in boxes:
        counts += torch.bincount(box + spread(own * BINS, group, len(box)), minlength=size)
    return counts.view(-1, BINS)


def tables(counts: NDArray[Any], first: float = 0.0) -> tuple[Floats, Floats, Floats]:
    """Lengths and slopes by width and cell, ``(WIDEST + 1, BINS)``; bits of the coder's tables.

    Args:
        counts: weights in each cell by width, ``(WIDEST + 1, BINS)``.
        first: where the range begins, in steps from code 0: 0, or 1/2 if codes are centred on 0.

    A slope is bits for the whole range. The coder's tables have about as many entries as pay, so
    with few weights neighbouring codes share one, and low bits are stored as they are.
    """
    lengths, slopes = (np.zeros((WIDEST + 1, BINS)) for _ in "ab")
    heads = np.zeros(WIDEST + 1)
    totals = counts.sum(axis=1)
    near = totals + np.roll(totals, 1) + np.roll(totals, -1)
    for width in range(1, WIDEST + 1):
        if not near[width]:
            continue
        own = counts[width] + _NEIGHBOURS * (counts[width - 1] + counts[min(width + 1, WIDEST)])
        total = float(own.sum())
        fine = min(width, _FINEST, max(2, int(math.log2(total) / 2) + 2 if total > 1 else 2))
        codes, left = _codes(width, fine, first)
        shared = np.bincount(codes, own, minlength=1 << fine)
        bits = code_lengths(shared) + (width - fine)
        rise = np.append(np.diff(bits), 0.0) * (((1 << width) - 1) / (1 << (width - fine)))
        lengths[width], slopes[width] = bits[codes], rise[left]
        if totals[width]:
            present = int((shared >= 0.5).sum())
            heads[width] = min(2.5 * present, 24 + 0.004 * total) + _HEAD_BITS
    return lengths, slopes, heads


@cache
def _codes(width: int, fine: int, first: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each cell the first ``fine`` bits of the nearest code, and of the one to its left."""
    level = (np.arange(BINS) + 0.5) * (((1 << width) - 1) / BINS) + first
    nearest, left = np.rint(level).astype(np.int64), level.astype(np.int64)
    return nearest >> (width - fine), left >> (width - fine)


def _width_lengths(below: Tensor, share: Tensor) -> tuple[Tensor, float]:
    """Bits of each group's next bit of width, and those of all widths as they would be rounded."""
    size = WIDEST + 1
    rounded = torch.bincount(below + (share > 0.5), minlength=size).cpu().numpy()
    total = float((rounded * code_lengths(rounded)).sum())
    counts = torch.bincount(below, 1 - share, size) + torch.bincount(below + 1, share, size)
    table = torch.from_numpy(np.diff(code_lengths(counts.cpu().numpy()))).to(share)
    return table.index_select(0, below), total + _HEAD_BITS


class _Pull(torch.autograd.Function):
    """Zero, with a given gradient to the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.shape = weight.shape
        return weight.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * gradient).view(ctx.shape), None
