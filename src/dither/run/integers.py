"""Encoded tensors as kernels of other programs take them: small integers times scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dither.core import Encoded
from dither.formats import Affine, Trellis
from dither.formats.grouping import Grouping, rows_of

_WIDEST = 1 << 15
"""Steps beyond fit no kernel; so many lie within int32 whatever is done with them here."""


@dataclass(frozen=True, eq=False)
class Integers:
    """A tensor that is ``steps * scale`` exactly, in one float32 multiplication.

    Attributes:
        steps: int32, of the tensor's shape; 0 stands for 0.
        scale: float32, ``(scales,)``.
        grouping: which steps share a scale.
    """

    steps: Tensor
    scale: Tensor
    grouping: Grouping

    @classmethod
    def of(cls, encoded: Encoded) -> Integers | None:
        """A tensor as integers; None where its format is no grid of float32 that has a 0.

        Grids and trellises are. Ends of a range with no exact 0 (``endpoint``), codebooks, products
        and factors are not, and what is restored to a shorter type was rounded after the scale.
        """
        fmt = encoded.format
        if encoded.dtype != torch.float32 or not encoded.numel:
            return None
        if not isinstance(fmt, Affine | Trellis) or getattr(fmt, "grid", "") == "endpoint":
            return None
        scale = encoded.params["scale"]
        # The format's own decoder, with steps of 1: integers up to 2**24 are exact in float32.
        steps = replace(encoded, params={"scale": torch.ones_like(scale)}).decode()
        if not bool((steps.abs() < _WIDEST).all()):
            return None
        return cls(steps.to(torch.int32), scale.float(), fmt.grouping(encoded.shape)).positive()

    def scaled(self, factor: Tensor) -> Integers:
        """The same times a factor for each scale, of any sign."""
        return replace(self, scale=self.scale * factor)

    def positive(self) -> Integers:
        """The same with the signs of scales in the steps."""
        signs = torch.where(self.scale < 0, -1, 1).to(torch.int32)
        steps = self.steps.clone()
        for (box,), (sign,) in self.grouping.walk([steps], [signs]):
            box.mul_(sign)
        return replace(self, steps=steps, scale=self.scale.abs())

    def by_row(self) -> Integers:
        """The same with a scale for each index of the first axis, where all share one."""
        if self.grouping.axis is not None or self.grouping.group is not None:
            return self
        grouping = Grouping(self.grouping.shape, axis=0)
        return Integers(self.steps, self.scale.expand(grouping.count), grouping)

    def turned(self) -> Integers | None:
        """A matrix transposed; None where runs within its rows share scales."""
        held = self.grouping
        if held.group is not None or len(held.shape) != 2:
            return None
        axis = None if held.axis is None else 1 - held.axis
        return Integers(self.steps.T.contiguous(), self.scale, Grouping(held.shape[::-1], axis))

    def codes(self, bits: int, *, signed: bool = False) -> tuple[Tensor, Tensor | None] | None:
        """Codes of so many bits and their zeros, ``(scales,)``, or no zeros for signed ones.

        Without ``signed``, unsigned ones are given where no signed code will do. None if neither
        will.
        """
        low, high = (bound.to(torch.int32) for bound in self.grouping.bounds(self.steps))
        half = 1 << (bits - 1)
        if bool((low >= -half).all()) and bool((high < half).all()):
            return self.steps, None
        low, high = low.clamp(max=0), high.clamp(min=0)
        if signed or bool((high - low >= 2 * half).any()):
            return None
        codes = self.steps.clone()
        for (box,), (least,) in self.grouping.walk([codes], [low]):
            box.sub_(least)
        return codes, -low

    def by_block(self, values: Tensor, block: int) -> Tensor | None:
        """What belongs to each scale, for runs of ``block`` in rows, ``(rows, blocks)``.

        The last run of a row may be shorter. None where scales are of no rows or runs in them.
        """
        held, (rows, columns) = self.grouping, rows_of(self.grouping.shape)
        count = -(-columns // block)
        if held.group is not None:
            each = held.group // block
            if not each or held.group % block:
                return None
            return values.reshape(rows, -1).repeat_interleave(each, 1)[:, :count].contiguous()
        if held.axis not in {None, 0}:
            return None
        return values.reshape(-1, 1).expand(rows, count).contiguous()
