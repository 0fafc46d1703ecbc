"""Uniform grids: symmetric, asymmetric and endpoint, bounded or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dither.core import (
    MAX_ALPHABET,
    Codes,
    Encoded,
    Format,
    SpecError,
    Stats,
    code_dtype,
    expect_codes,
    expect_param,
    expect_parts,
)
from dither.formats import affine_twin
from dither.formats.grid_rounding import Grid, require_floating, require_held, restore, usable_scale
from dither.formats.grouping import Grouping
from dither.formats.memory import new_tensor
from dither.formats.settings import check_choice, check_count, check_restored

GRIDS = ("symmetric", "asymmetric", "endpoint")
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

DECODE_CHUNK = 1 << 15
"""Weights decoded at once: within the cache, and too few for torch to split among threads."""


@dataclass(frozen=True)
class Affine(Format):
    """Evenly spaced values, one scale per tensor, per index of an axis, or per group of weights.

    Grids, for codes ``q`` of ``bits`` bits (Jacob et al. 2018; endpoint: Défossez et al. 2022):

    * ``symmetric``: ``(q - 2**(bits - 1)) * scale``; for 1 bit ``-scale`` and ``+scale``;
    * ``asymmetric``: ``(q - zero) * scale`` with one integer ``zero`` per scale;
    * ``endpoint``: ``q * scale + offset``: both ends of the range, no exact zero.

    With ``bits=None`` the symmetric grid has no ends: the alphabet of the codes follows the data
    and one ``zero`` for the tensor is minus the lowest code. The alphabet always reaches 0.

    Parts: codes ``levels`` of the weight's shape and, where there is one, ``zero``; params
    ``scale`` and, for endpoint, ``offset``, ``(scales,)`` in ``scale_dtype``. Decoding subtracts
    integers exactly, multiplies once and adds once in float32, then restores the tensor's type.

    Attributes:
        bits: 1 to 16 bits per weight, or None for no bound.
        axis: one scale per index of this axis.
        group: one scale per this many consecutive weights of each row of the tensor viewed as
            ``(shape[0], rest)``; the last group of a row may be shorter; a vector is one row.
        grid: ``"symmetric"``, ``"asymmetric"`` or ``"endpoint"``.
        scale_dtype: type of scales and offsets: float32, float16 or bfloat16.

    Raises:
        SpecError: settings out of range, weights that are not finite, a step too small.

    >>> encoded = Affine(4).encode(torch.tensor([-0.8, -0.31, 0.0, 0.7]))
    >>> encoded.codes["levels"].values.tolist(), encoded.bits
    ([0, 5, 8, 15], 48)
    >>> encoded.decode()
    tensor([-0.8000, -0.3000,  0.0000,  0.7000])
    """

    name: ClassVar[str] = "affine"

    bits: int | None = 8
    axis: int | None = None
    group: int | None = None
    grid: str = "symmetric"
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        check_choice("Affine", "grid", self.grid, GRIDS)
        check_choice("Affine", "scale_dtype", self.scale_dtype, SCALE_DTYPES)
        if self.bits is not None:
            check_count("Affine", "bits", self.bits, 1, 16)
        elif self.grid != "symmetric":
            raise SpecError(f"Affine(bits=None) has a symmetric grid only, not {self.grid!r}")
        if self.axis is not None:
            check_count("Affine", "axis", self.axis, -64, 63)
            if self.group is not None:
                raise SpecError(
                    f"Affine(axis={self.axis}, group={self.group}): give one of the two"
                )
        if self.group is not None:
            check_count("Affine", "group", self.group, 1, MAX_ALPHABET)

    def grouping(self, shape: tuple[int, ...]) -> Grouping:
        """Which weights of a tensor share a scale."""
        return Grouping(tuple(shape), self.axis, self.group)

    def fit(self, weight: Tensor, stats: Stats | None = None) -> dict[str, Tensor]:
        """The finest grid that covers all weights; 1 bit: the mean magnitude.

        Without a bound the step is an eighth of the standard deviation (a constant: its
        magnitude), and no less than 2**-22 of the largest magnitude.
        """
        del stats
        weight = require_floating(weight, self.name)
        grouping = self.grouping(tuple(weight.shape))
        low, high = grouping.bounds(weight)
        if self.bits is None:
            largest = torch.maximum(low.abs(), high)
            step = grouping.deviation(weight) / 8
            step = torch.where(step > 0, torch.maximum(step, largest / (1 << 22)), largest)
            return {"scale": self._scale(step)}
        if self.bits == 1 and self.grid == "symmetric":
            return {"scale": usable_scale(grouping.magnitude(weight), self.scale_dtype)}
        return self.cover(low, high)

    def cover(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Parameters of the finest bounded grid that covers ``low`` to ``high``.

        Symmetric and asymmetric grids always hold 0. ``low`` and ``high`` are ``(scales,)``.

        Raises:
            SpecError: ``bits`` is None, or a bound is not finite.

        >>> Affine(8, grid="endpoint").cover(torch.tensor([-1.0]), torch.tensor([1.55]))
        {'scale': tensor([0.0100]), 'offset': tensor([-1.])}
        """
        if self.bits is None:
            raise SpecError('Affine(bits=None) covers any range: give {"scale": step} instead')
        low, high = low.to(torch.float64), high.to(torch.float64)
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise SpecError("a weight is not finite; repair it, or store the tensor with Raw()")
        top = (1 << self.bits) - 1
        if self.grid == "endpoint":
            offset = low.to(self.scale_dtype)
            usable_scale(low.abs(), self.scale_dtype)  # an offset, too, must fit its type
            usable_scale(high - low, torch.float32)  # the decoder's product must be finite
            return {"scale": self._scale((high - low) / top), "offset": offset}
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.grid == "asymmetric":
            scale = self._scale((high - low) / top)
            zero = (-low / scale.to(torch.float64)).round_().clamp_(0, top).to(torch.int32)
            return {"scale": scale, "zero": zero}
        if self.bits == 1:
            return {"scale": usable_scale(torch.maximum(-low, high), self.scale_dtype)}
        half = 1 << (self.bits - 1)
        return {"scale": self._scale(torch.maximum(-low / half, high / (half - 1)))}

    def assign(self, weight: Tensor, params: Mapping[str, Tensor]) -> Encoded:
        """Nearest codes; ``params`` as :meth:`fit` gives them, any finite scale.

        Raises:
            SpecError: parameters that are missing, not finite or of the wrong size; a step so
                small that an unbounded grid would need more than 2**24 levels.
        """
        weight = require_floating(weight, self.name)
        dtype, shape = weight.dtype, tuple(weight.shape)
        grouping = self.grouping(shape)
        held = self._held(params, grouping.count, weight.device)
        lowest, highest = self._ends()
        alphabet = highest - lowest + 1
        unbounded = self.bits is None
        codes = torch.empty(
            shape, dtype=torch.int32 if unbounded else code_dtype(alphabet), device=weight.device
        )
        names = list(held)
        shared = [held[name] for name in names]
        for (box, out), parts in grouping.walk([weight, codes], shared):
            out.copy_(self.line(dict(zip(names, parts, strict=True))).nearest(box, dtype))
        params_out = {name: held[name] for name in names if name != "zero"}
        if not unbounded:
            parts_out = {"levels": Codes(codes, alphabet)}
            if "zero" in held:
                parts_out["zero"] = Codes(held["zero"], alphabet)
            return Encoded(self, shape, dtype, parts_out, params_out)
        return Encoded(self, shape, dtype, self._unbounded(codes, held["scale"]), params_out)

    def decode(self, encoded: Encoded) -> Tensor:
        """Exact integer difference, one float32 multiply, one float32 add (endpoint)."""
        held = self.params_of(encoded)
        levels = encoded.codes["levels"].values
        if self.bits is None:  # one zero for the tensor, whatever shares a scale
            zero = held["zero"].to(torch.int32)
            held["zero"] = zero.expand(held["scale"].shape)
        out = new_tensor(encoded.shape, encoded.dtype, levels.device)
        names = list(held)
        shared = [held[name] for name in names]
        grouping = self.grouping(encoded.shape)
        loop = affine_twin.loop_for(grouping.views(out)[0]) if out.numel() else None
        limit = DECODE_CHUNK if loop is None else out.numel()
        for (box, codes), parts in grouping.walk([out, levels], shared, limit):
            grid = self.line(dict(zip(names, parts, strict=True)))
            if loop is not None:
                affine_twin.fill(loop, box, codes, grid)
            elif box.dtype == torch.float32:
                _fill(box, codes, grid)
            else:
                box.copy_(restore(grid.values(codes), encoded.dtype))
        return out

    def params_of(self, encoded: Encoded) -> dict[str, Tensor]:
        """What :meth:`assign` takes to encode again with the same parameters."""
        held = dict(encoded.params)
        if "zero" in encoded.codes:
            held["zero"] = encoded.codes["zero"].values
        return held

    def check(self, encoded: Encoded) -> None:
        """Levels of the tensor's shape; zeros, scales and offsets one per scale."""
        codes = {"levels"} if self.grid != "asymmetric" and self.bits else {"levels", "zero"}
        params = {"scale", "offset"} if self.grid == "endpoint" else {"scale"}
        expect_parts(encoded, codes, params)
        check_restored(self.name, encoded.dtype)
        count = self.grouping(encoded.shape).count
        for name in params:
            expect_param(encoded, name, (count,), self.scale_dtype)
        expect_codes(encoded, "levels", encoded.shape, 1 << self.bits if self.bits else None)
        if self.bits is None:
            expect_codes(encoded, "zero", (1,), MAX_ALPHABET)
        elif "zero" in codes:
            expect_codes(encoded, "zero", (count,), 1 << self.bits)

    def _scale(self, scale: Tensor) -> Tensor:
        """Scales in their type; where all weights are 0 any scale will do, and 1 is safe."""
        return usable_scale(torch.where(scale == 0, 1.0, scale), self.scale_dtype)

    def _ends(self) -> tuple[int, int]:
        return (-MAX_ALPHABET, MAX_ALPHABET) if self.bits is None else (0, (1 << self.bits) - 1)

    def _wide(self, value: Tensor) -> Tensor:
        return value.to(torch.float32 if value.is_floating_point() else torch.int32)

    def line(self, held: Mapping[str, Tensor]) -> Grid:
        """The grid of parameters that broadcast against the weights, in any numeric type."""
        held = {name: self._wide(value) for name, value in held.items()}
        lowest, highest = self._ends()
        zero: Tensor | int = 0
        if "zero" in held:
            zero = held["zero"]
        elif self.grid == "symmetric" and self.bits is not None:
            zero = 1 << (self.bits - 1)
        stride = 2 if self.bits == 1 and self.grid == "symmetric" else 1
        return Grid(held["scale"], zero, held.get("offset"), stride, lowest, highest)

    def _held(
        self, params: Mapping[str, Tensor], count: int, device: torch.device
    ) -> dict[str, Tensor]:
        """Checked parameters in their stored types."""
        names = {"symmetric": (), "asymmetric": ("zero",), "endpoint": ("offset",)}[self.grid]
        held = {}
        for name in ("scale", *names):
            value = require_held(self, params, name, count).to(device)
            if name == "zero":
                value = value.round() if value.is_floating_point() else value
                value = value.clamp(0, (1 << (self.bits or 0)) - 1).to(torch.int32)
            else:
                value = value.to(self.scale_dtype, copy=True)
                if not bool(value.isfinite().all()):
                    raise SpecError(f"{self!r}: {name!r} is not finite in {self.scale_dtype}")
            held[name] = value
        return held

    def _unbounded(self, steps: Tensor, scale: Tensor) -> dict[str, Codes]:
        """Codes from 0 and their zero, from signed steps (which are overwritten)."""
        least = min(0, int(steps.min())) if steps.numel() else 0
        alphabet = (max(0, int(steps.max())) if steps.numel() else 0) - least + 1
        if alphabet > MAX_ALPHABET:
            raise SpecError(
                f"a step of {scale.abs().min().item():.4g} needs more than 2**24 levels for this "
                "tensor; give a larger step"
            )
        zero = torch.full((1,), -least, dtype=torch.int32, device=steps.device)
        return {"levels": Codes(steps.sub_(least), alphabet), "zero": Codes(zero, MAX_ALPHABET)}


def _fill(box: Tensor, codes: Tensor, grid: Grid) -> None:
    """``grid.values`` without temporary copies.

    Float32 holds the codes, the zeros and their differences exactly: none exceeds 2**24.
    """
    box.copy_(codes)
    if grid.stride != 1:
        box.mul_(grid.stride)
    box.sub_(grid.zero).mul_(grid.scale)
    if grid.offset is not None:
        box.add_(grid.offset)
