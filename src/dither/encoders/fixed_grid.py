"""Weights as real-valued codes of a uniform grid with fixed ranges, and codes as an Encoded."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dither.core import Encoded, Stats
from dither.encoders.outputs import matrix_of, output_errors, tensor_of
from dither.formats import Affine
from dither.formats.grid_rounding import restore


def ends(fmt: Affine) -> tuple[float, float]:
    """The least and the greatest code."""
    return (-math.inf, math.inf) if fmt.bits is None else (0, 2**fmt.bits - 1)


def places_of(fmt: Affine, weight: Tensor, held: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Real-valued code of each weight, and the distance of two values, both of its shape.

    Args:
        fmt: the grid.
        weight: floating point, finite.
        held: parameters, as ``fmt.assign`` takes them.
    """
    places, scales = (
        torch.empty(weight.shape, dtype=torch.float32, device=weight.device) for _ in range(2)
    )
    stored = _stored(fmt, held)
    grouping = fmt.grouping(tuple(weight.shape))
    boxes = grouping.walk([weight.contiguous(), places, scales], list(stored.values()))
    for (box, place, scale), parts in boxes:
        grid = fmt.line(dict(zip(stored, parts, strict=True)))
        place.copy_(grid.position(box))
        scale.copy_((grid.scale * grid.stride).expand(box.shape))
    return places, scales


def encoded_at(
    fmt: Affine, codes: Tensor, dtype: torch.dtype, held: Mapping[str, Tensor]
) -> Encoded:
    """The encoding with these codes.

    Args:
        fmt: the grid.
        codes: of the weight's shape, whole numbers; of an unbounded grid counted from 0.
        dtype: of the weight.
        held: parameters, as ``fmt.assign`` takes them.
    """
    codes = codes.contiguous()
    values = torch.empty_like(codes)
    stored = _stored(fmt, held)
    grouping = fmt.grouping(tuple(codes.shape))
    for (code, value), parts in grouping.walk([codes, values], list(stored.values())):
        grid = fmt.line(dict(zip(stored, parts, strict=True)))
        value.copy_(grid.values(code))
    return fmt.assign(restore(values, dtype), held)


def best_of(
    fmt: Affine,
    found: Encoded,
    nearest: Encoded,
    held: Mapping[str, Tensor],
    aim: Tensor,
    stats: Stats,
) -> Encoded:
    """The first encoding but for outputs of which the second has less error.

    Args:
        fmt: of both.
        found: the encoding by a method.
        nearest: that of nearest codes.
        held: the parameters of both.
        aim: what the weight should be.
        stats: with ``gram``.
    """
    assert stats.gram is not None  # noqa: S101 - the caller asked
    values = [encoded.decode() for encoded in (found, nearest)]
    each = [
        output_errors(matrix_of(value.float() - aim.float(), stats.outputs), stats.gram)
        for value in values
    ]
    better = each[0] <= each[1]
    if bool(better.all()):
        return found
    kept = better[:, None].expand(matrix_of(aim, stats.outputs).shape)
    kept = tensor_of(kept, tuple(aim.shape), stats.outputs)
    return fmt.assign(torch.where(kept, values[0], values[1]), held)


def _stored(fmt: Affine, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters as the file rounds them."""
    return {
        name: value if name == "zero" else value.to(fmt.scale_dtype) for name, value in held.items()
    }
