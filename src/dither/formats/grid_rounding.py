"""The nearest code of a uniform grid, under exactly the arithmetic that decodes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dither.core import Format, SpecError

SURE = 0.499
"""A guess this many steps from its weight, or nearer, is the nearest; others are looked at again.

A guess that is not the nearest *decoded* value lies at least half a step away: either the guess
itself was rounded wrongly, or restoring to a narrow type moved its neighbour onto the weight.
"""


def require_floating(weight: Tensor, name: str) -> Tensor:
    """The weight without its graph; refused where it is not floating point.

    Raises:
        SpecError: integers, booleans or complex numbers.
    """
    if not weight.is_floating_point():
        raise SpecError(
            f"format {name!r} takes floating-point tensors, not {weight.dtype}; "
            "store this tensor with Raw()"
        )
    return weight.detach()


def restore(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 values as ``dtype``, rounded to nearest; narrow types saturate at their limits.

    >>> restore(torch.tensor([70000.0]), torch.float16)
    tensor([65504.], dtype=torch.float16)
    """
    if dtype in (torch.float32, torch.float64):
        return values.to(dtype)
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


def usable_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive float64 scales as ``dtype``: never rounded to 0, never beyond its range.

    The least scale is the smallest normal number (for float16, whose subnormals are common
    scales and convert exactly everywhere, the smallest subnormal).

    Raises:
        SpecError: a scale is not finite in ``dtype``.
    """
    least = torch.finfo(dtype).tiny if dtype != torch.float16 else 2.0**-24
    rounded = torch.where(scale > 0, scale.clamp(min=least), scale).to(dtype)
    if not bool(rounded.isfinite().all()):
        worst = scale.max().item() if bool(scale.isfinite().all()) else "not finite"
        raise SpecError(
            f"a scale of {worst} does not fit {dtype} (largest {torch.finfo(dtype).max}); "
            "use scale_dtype=torch.float32, or store the tensor with Raw()"
        )
    return rounded


@dataclass(frozen=True, eq=False)
class Grid:
    """The values ``(stride * q - zero) * scale [+ offset]`` of codes ``lowest .. highest``.

    Integers are exact; one float32 multiply, then (where there is an offset) one float32 add.

    Attributes:
        scale: float32, broadcastable to the codes.
        zero: int32, broadcastable, or an integer.
        offset: float32, broadcastable, or None.
        stride: 1, or 2 for the two values ``-scale`` and ``+scale`` (with zero 1).
        lowest: least code.
        highest: greatest code.
    """

    scale: Tensor
    zero: Tensor | int
    offset: Tensor | None
    stride: int
    lowest: int
    highest: int

    def values(self, codes: Tensor) -> Tensor:
        """Float32 values of integer codes."""
        steps = codes.to(torch.int32)
        steps = steps * self.stride if self.stride != 1 else steps
        values = (steps - self.zero).to(torch.float32).mul_(self.scale)
        return values if self.offset is None else values.add_(self.offset)

    def position(self, weight: Tensor) -> Tensor:
        """Real-valued code of each weight, in the weight's own precision."""
        shifted = weight if self.offset is None else weight - self.offset
        scale = torch.where(self.scale == 0, torch.inf, self.scale)  # then every code is alike
        place = shifted / scale.to(weight.dtype) + self.zero
        return place / self.stride if self.stride != 1 else place

    def guess(self, weight: Tensor) -> Tensor:
        """Int32 codes by rounding: nearest but for rounding errors of the order of a tie."""
        place = self.position(weight).round_().clamp_(self.lowest, self.highest)
        return place.to(torch.int32)

    def at(self, where: Tensor) -> Grid:
        """The same grid for the elements of a boolean mask, as vectors."""

        def pick(part: Tensor) -> Tensor:
            return part.expand(where.shape)[where]

        zero = pick(self.zero) if isinstance(self.zero, Tensor) else self.zero
        offset = None if self.offset is None else pick(self.offset)
        return Grid(pick(self.scale), zero, offset, self.stride, self.lowest, self.highest)

    def nearest(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Int32 codes whose values, restored to ``dtype``, are nearest to the weight.

        Raises:
            SpecError: a weight is not finite, or beyond float32.
        """
        single = weight.to(torch.float32)
        codes = self.guess(single)
        error = restore(self.values(codes), dtype).to(torch.float32).sub_(single).abs_()
        unsure = ~(error <= self.scale.abs() * (SURE * self.stride))  # also where it is NaN
        if bool(unsure.any()):
            chosen = weight[unsure]
            if not bool(single[unsure].isfinite().all()):
                raise SpecError(
                    "a weight is not finite, or is beyond float32; "
                    "repair it, or store the tensor with Raw()"
                )
            codes[unsure] = self.at(unsure).settle(chosen, dtype)
        return codes

    def settle(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Nearest of three neighbouring codes, compared in float64."""
        double = weight.to(torch.float64)
        guess = self.guess(double)
        best, least = guess, torch.full_like(double, torch.inf)
        for step in (0, -1, 1):
            codes = (guess + step).clamp_(self.lowest, self.highest)
            error = (restore(self.values(codes), dtype).to(torch.float64) - double).abs_()
            best = torch.where(error < least, codes, best)
            least = torch.minimum(error, least)
        return best


def require_held(fmt: Format, params: Mapping[str, Tensor], name: str, count: int | None) -> Tensor:
    """A parameter given to ``assign``, without its graph; flat where ``count`` is given.

    Raises:
        SpecError: it is missing, or does not have ``count`` values.
    """
    if name not in params:
        raise SpecError(f"{fmt!r} needs the parameter {name!r}; given are {sorted(params)}")
    value = params[name].detach()
    if count is not None:
        value = value.reshape(-1)
        if value.numel() != count:
            raise SpecError(
                f"{fmt!r} has {count} values of {name!r} for this tensor, not {value.numel()}"
            )
    return value
