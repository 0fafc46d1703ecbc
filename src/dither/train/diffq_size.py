"""Sizes as the DiffQ paper counts them: fixed widths, before any entropy coding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dither.formats import Affine
from dither.train.attached import Attached
from dither.train.diffq import LearnedBits
from dither.train.lsq import LearnedStep
from dither.train.method import AfterTraining
from dither.train.ramp import Ramp, value_at

_MIB_BITS = 8 * 2.0**20
_RANGE_BITS = 2 * 32 + 8
"""A tensor's range, and the width of its widths."""


@dataclass(frozen=True)
class DiffQSize:
    """The size that DiffQ's paper penalises, in MiB, times a weight: see :func:`model_size_mib`.

    Attributes:
        weight: the factor (lambda), or a ramp.
        exact: count rounded widths; the gradient is that of the widths themselves.
        half: what is not quantized has 16 bits, not 32.
    """

    weight: float | Ramp
    exact: bool = False
    half: bool = False

    def __call__(self, run: Attached) -> Tensor:
        size = model_size_mib(run, half=self.half)
        if self.exact:
            size = true_model_size_mib(run, half=self.half) + (size - size.detach())
        return size * value_at(self.weight, run.progress)


def model_size_mib(run: Attached, *, half: bool = False) -> Tensor:
    """The model in MiB (2**20 bytes) as the paper counts it; differentiable, a scalar.

    A tensor under DiffQ counts its weights' widths, 64 bits for its range, 8 for the number of bits
    of a width, and that number for each group; one under :class:`~dither.LSQ` its bits and 32 for
    each step; one in a bounded :class:`~dither.Affine` its bits and 64 for each scale; every other
    parameter 32 bits a value. Buffers are not counted, and tied parameters once. Files are smaller,
    because they are entropy-coded.

    Args:
        run: an attached model.
        half: count 16 bits a value for parameters that are not quantized.
    """
    return _size(run, is_exact=False, half=half)


def true_model_size_mib(run: Attached, *, half: bool = False) -> Tensor:
    """The same with widths rounded and clamped as they are for files; a scalar without slope."""
    with torch.no_grad():
        return _size(run, is_exact=True, half=half)


def _size(run: Attached, *, is_exact: bool, half: bool) -> Tensor:
    device = next(run.model.parameters()).device
    learned = [torch.zeros((), device=device)]
    fixed = 0.0
    for name, parameter in run.model.named_parameters():
        surrogate = run.surrogates.get(name)
        if isinstance(surrogate, LearnedBits):
            learned.append(_learned_bits(surrogate, is_exact=is_exact).to(device))
        elif not any(parameter is own for s in run.surrogates.values() for own in s.parameters()):
            fixed += _fixed_bits(surrogate, parameter, 16 if half else 32)
    return (torch.stack(learned).sum() + fixed) / _MIB_BITS


def _learned_bits(surrogate: LearnedBits, *, is_exact: bool) -> Tensor:
    extra = surrogate.spec.extra_bits
    bits = surrogate.widths() if is_exact else surrogate.bits()
    highest = surrogate.bits_of(surrogate.logits.detach().amax())
    width = math.ceil(math.log2(1 + max(round(float(highest)) - surrogate.spec.min_bits, 0)))
    # The last group may have fewer weights.
    total = bits.sum() * surrogate.group
    total = total - bits[-1] * (len(bits) * surrogate.group - surrogate.numel)
    total = total if is_exact else total + extra * surrogate.numel
    return total + (_RANGE_BITS + width * len(bits))


def _fixed_bits(surrogate: object, parameter: Tensor, rest: int) -> float:
    count = parameter.numel()
    if isinstance(surrogate, LearnedStep) and surrogate.spec.bits is not None:
        return surrogate.spec.bits * count + 32 * len(surrogate.log_step)
    if isinstance(surrogate, AfterTraining) and isinstance(surrogate.encoder, Affine):
        grid = surrogate.encoder
        if grid.bits is not None:
            return grid.bits * count + 64 * grid.grouping(tuple(parameter.shape)).count
    return float(rest * count)
