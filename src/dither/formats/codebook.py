"""Scalar codebooks: a sorted list of points, with an optional scale per bucket of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
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
from dither.formats.grid_rounding import require_floating, require_held, restore, usable_scale
from dither.formats.grouping import CHUNK, Grouping
from dither.formats.memory import new_tensor
from dither.formats.settings import check_choice, check_count, check_flag, check_restored

SAMPLE = 1 << 20
"""Weights looked at, at most, to find quantiles: evenly spaced in memory."""


def midpoints(values: Tensor) -> Tensor:
    """Float32 edges between sorted float32 values (last axis) for ``searchsorted``.

    The exact midpoint rounded down, so that comparing a float32 number with it gives the nearest
    value (the lower one on a tie), and a value itself is always found again.
    """
    double = values.to(torch.float64)
    exact = (double[..., 1:] + double[..., :-1]) / 2
    edges = exact.to(torch.float32)
    return torch.where(edges > exact, edges.nextafter(edges.new_tensor(-torch.inf)), edges)


@dataclass(frozen=True)
class Codebook(Format):
    """Each weight is one of a few points (Polino et al. 2018 with buckets; else k-means of Han).

    A weight is ``point``, or with buckets of consecutive flattened weights ``point * scale``, or
    with ``shift`` ``point * scale + offset``: linear scaling ``(w - min) / (max - min)``.

    Parts: codes ``indices`` of the weight's shape; params ``points`` (1 to ``points``, sorted, in
    ``dtype``), ``scale`` and ``offset`` (``(buckets,)`` in ``scale_dtype``). Float32 arithmetic.

    Attributes:
        points: 2 to 65,536; fewer are stored where the weight has fewer distinct values.
        bucket: weights that share a scale, or None for no scales.
        shift: whether buckets have an offset too.
        dtype: type of the points: float16, bfloat16 or float32.
        scale_dtype: type of scales and offsets: float32, float16 or bfloat16.

    Raises:
        SpecError: settings out of range, weights that are not finite or do not fit ``dtype``.

    >>> encoded = Codebook(2).encode(torch.tensor([1.0, -1.0, 1.0, 1.0]))
    >>> encoded.decode(), encoded.bits
    (tensor([ 1., -1.,  1.,  1.]), 36)
    """

    name: ClassVar[str] = "codebook"

    points: int
    bucket: int | None = None
    shift: bool = False
    dtype: torch.dtype = torch.float16
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        check_count("Codebook", "points", self.points, 2, 1 << 16)
        check_flag("Codebook", "shift", self.shift)
        types = (torch.float16, torch.bfloat16, torch.float32)
        check_choice("Codebook", "dtype", self.dtype, types)
        check_choice("Codebook", "scale_dtype", self.scale_dtype, types)
        if self.bucket is not None:
            check_count("Codebook", "bucket", self.bucket, 1, MAX_ALPHABET)
        elif self.shift:
            raise SpecError("Codebook(shift=True) needs a bucket size: bucket=256, for example")

    def grouping(self, shape: tuple[int, ...]) -> Grouping:
        """Buckets of the flattened tensor."""
        return Grouping((prod(shape),), group=self.bucket)

    def fit(self, weight: Tensor, stats: Stats | None = None) -> dict[str, Tensor]:
        """Scales from each bucket's range, points at quantiles of the scaled weights.

        All distinct values become points where they are few enough.
        """
        del stats
        weight = require_floating(weight, self.name)
        scales = self.fit_scales(weight)
        stride = max(1, weight.numel() // SAMPLE)
        scaled = self.scaled(weight, scales, stride).unique()
        if scaled.numel() > self.points or stride > 1:
            ordered = self.scaled(weight, scales, stride).sort().values
            steps = torch.arange(self.points, dtype=torch.float64, device=weight.device)
            at = ((steps + 0.5) / self.points * ordered.numel()).to(torch.int64)
            scaled = ordered[at].unique() if ordered.numel() else ordered
        points = scaled if scaled.numel() else scaled.new_zeros(1)
        return {"points": self.stored_points(points), **scales}

    def fit_scales(self, weight: Tensor) -> dict[str, Tensor]:
        """Scale (and offset) per bucket: the range, or the largest magnitude without an offset.

        A bucket of one repeated value has scale 0 with an offset, and is exact.
        """
        if self.bucket is None:
            return {}
        low, high = self.grouping(tuple(weight.shape)).bounds(weight)
        spread = high - low if self.shift else torch.maximum(low.abs(), high.abs())
        scales = {"scale": usable_scale(spread, self.scale_dtype)}
        if self.shift:
            scales["offset"] = low.to(self.scale_dtype)
        return scales

    def scaled(self, weight: Tensor, scales: Mapping[str, Tensor], stride: int = 1) -> Tensor:
        """Every ``stride``-th flattened weight in units of its bucket, float64.

        Weights of buckets whose scale is 0 are 0.

        Raises:
            SpecError: a weight is not finite.
        """
        flat = weight.detach().reshape(-1)[::stride].to(torch.float64)
        if not bool(flat.isfinite().all()):
            raise SpecError("a weight is not finite; repair it, or store the tensor with Raw()")
        if self.bucket is None:
            return flat
        at = torch.arange(0, weight.numel(), stride, device=weight.device) // self.bucket
        if "offset" in scales:
            flat = flat - scales["offset"].to(torch.float64)[at]
        scale = scales["scale"].to(torch.float64)[at]
        return torch.where(scale == 0, 0.0, flat / scale)

    def stored_points(self, points: Tensor) -> Tensor:
        """Points in their type, sorted.

        Raises:
            SpecError: a point does not fit ``dtype``.
        """
        stored = points.detach().reshape(-1).to(self.dtype)
        if not bool(stored.isfinite().all()):
            raise SpecError(
                f"a point of {points.abs().max().item():.4g} does not fit {self.dtype}; "
                "use Codebook(dtype=torch.float32), or a bucket size"
            )
        return stored.sort().values

    def assign(self, weight: Tensor, params: Mapping[str, Tensor]) -> Encoded:
        """Nearest decoded point of each weight; points are sorted first.

        Raises:
            SpecError: parameters missing, of the wrong size, not finite; a negative scale.
        """
        weight = require_floating(weight, self.name)
        shape, grouping = tuple(weight.shape), self.grouping(tuple(weight.shape))
        held = {"points": self.stored_points(require_held(self, params, "points", None))}
        count = held["points"].numel()
        if not 1 <= count <= self.points:
            raise SpecError(f"{self!r} holds 1 to {self.points} points, not {count}")
        names = [] if self.bucket is None else ["scale", "offset"] if self.shift else ["scale"]
        for name in names:
            held[name] = require_held(self, params, name, grouping.count).to(self.scale_dtype)
            if not bool((held[name].isfinite() & ((held[name] >= 0) | (name != "scale"))).all()):
                raise SpecError(f"{self!r}: {name!r} is negative or not finite")
        codes = torch.empty(weight.numel(), dtype=code_dtype(count), device=weight.device)
        points = held["points"].to(torch.float32)
        shared = [held[name].to(torch.float32) for name in names]
        limit = CHUNK
        if self.bucket is not None:  # each bucket has a table of its own: keep those small too
            limit = self.bucket * max(1, CHUNK // max(count, self.bucket))
        table: Tensor | None = None
        if self.bucket is None:
            shared = [points.new_ones(1)]  # not read
            table = midpoints(restore(points, weight.dtype).to(torch.float32))
        for (box, out), parts in grouping.walk([weight.reshape(-1), codes], shared, limit):
            single = box[0].to(torch.float32).contiguous()
            if not bool(single.isfinite().all()):
                raise SpecError("a weight is not finite, or beyond float32; use Raw() for it")
            edges = table
            if edges is None:
                values = self._values(points.expand(single.shape[0], count), [p[0] for p in parts])
                edges = midpoints(restore(values, weight.dtype).to(torch.float32))
            out.copy_(torch.searchsorted(edges, single, out_int32=True))
        return Encoded(
            self, shape, weight.dtype, {"indices": Codes(codes.reshape(shape), count)}, held
        )

    def decode(self, encoded: Encoded) -> Tensor:
        """A look-up, then one float32 multiply, then one float32 add, as far as there are any."""
        indices = encoded.codes["indices"].values
        points = encoded.params["points"].to(torch.float32)
        shared = [encoded.params[name] for name in ("scale", "offset") if name in encoded.params]
        out = new_tensor(encoded.shape, encoded.dtype, indices.device)
        boxes = self.grouping(encoded.shape).walk(
            [out.view(-1), indices.reshape(-1)], shared or [points.new_ones(1)]
        )
        for (box, codes), parts in boxes:
            scales = [part.to(torch.float32) for part in parts] if shared else []
            values = self._values(points[codes.to(torch.int64)], scales)
            box.copy_(restore(values, encoded.dtype))
        return out

    def check(self, encoded: Encoded) -> None:
        """Indices of the tensor's shape over the stored points; one scale per bucket."""
        scales = set() if self.bucket is None else {"scale"}
        scales |= {"offset"} if self.shift else set()
        expect_parts(encoded, {"indices"}, {"points", *scales})
        check_restored(self.name, encoded.dtype)
        count = encoded.params["points"].numel()
        if not 1 <= count <= self.points:
            raise SpecError(f"{self!r} holds 1 to {self.points} points, not {count}")
        expect_param(encoded, "points", (count,), self.dtype)
        expect_codes(encoded, "indices", encoded.shape, count)
        for name in scales:
            expect_param(encoded, name, (self.grouping(encoded.shape).count,), self.scale_dtype)

    def _values(self, points: Tensor, parts: list[Tensor]) -> Tensor:
        values = points
        if parts:
            values = values * parts[0]
        return values.add_(parts[1]) if len(parts) > 1 else values
