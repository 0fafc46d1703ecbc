"""The nearest of a few vectors for each of many, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SCORES = 1 << 18
"""Distances held at once: a megabyte, which stays in the cache."""

_PACKED = 1 << 12
"""Up to this many vectors, a distance and an index share one 32-bit integer."""

_NEAR = 2.0**-9
"""Squared distances below this share of the squared lengths are computed again in float64."""


def distance_terms(table: Tensor, *, importance: bool = False) -> Tensor:
    """The factor ``(features, vectors)`` whose product with :func:`point_terms` is the distance.

    Args:
        table: ``(vectors, length)`` float32.
        importance: whether squared errors have weights.
    """
    square = table.square()
    if importance:
        ones = table.new_ones(table.shape[0], 1)
        return torch.cat([table * -2, square, ones], 1).T.contiguous()
    total = square.sum(1, keepdim=True)
    return torch.cat([table * -2, torch.ones_like(total), total], 1).T.contiguous()


def point_terms(points: Tensor, importance: Tensor | None = None) -> Tensor:
    """The factor ``(points, features)`` for ``sum(importance * (point - vector)**2)``."""
    if importance is None:
        total = points.square().sum(1, keepdim=True)
        return torch.cat([points, total, torch.ones_like(total)], 1)
    moment = points * importance
    return torch.cat([moment, importance, (moment * points).sum(1, keepdim=True)], 1)


def least_index(scores: Tensor) -> Tensor:
    """Index of the least of non-negative float32 scores in each row, int32; scores are overwritten.

    Non-negative floats are ordered like their bit patterns, so the last bits of each score can
    carry its index and a plain minimum, which is several times faster than ``argmin``, finds
    both. Scores equal to one part in 2**11 (256 vectors: 2**15) may be taken for each other;
    a score that rounding made negative counts as 0.
    """
    count = scores.shape[1]
    if count > _PACKED:
        return scores.min(1).indices.to(torch.int32)
    mask = (1 << (count - 1).bit_length()) - 1
    packed = scores.view(torch.int32)
    packed.bitwise_and_(~mask).bitwise_or_(
        torch.arange(count, dtype=torch.int32, device=scores.device)
    )
    return packed.amin(1).bitwise_and_(mask)


def nearest_by_terms(points: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest vector, int32 ``(points,)``, from the factors of the distance."""
    out = torch.empty(points.shape[0], dtype=torch.int32, device=points.device)
    step = max(1, SCORES // table.shape[1])
    scores = points.new_empty(min(step, max(1, points.shape[0])), table.shape[1])
    for part, indices in zip(points.split(step), out.split(step), strict=True):
        part_scores = scores[: part.shape[0]]
        torch.mm(part, table, out=part_scores)
        indices.copy_(least_index(part_scores))
    return out


def distinct(table: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of a table, and for each the index of its first occurrence, int64."""
    rows, inverse = table.unique(dim=0, return_inverse=True)
    first = inverse.new_full((rows.shape[0],), table.shape[0])
    order = torch.arange(table.shape[0], device=table.device)
    return rows, first.scatter_reduce(0, inverse, order, "amin")


def nearest_vectors(points: Tensor, table: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Index of the nearest row of ``table`` for each row of ``points``, chunk by chunk, int64.

    Nearest by squared distance up to float32 rounding, and exact where a point equals a row: the
    first such row is found, whatever the magnitudes.

    Args:
        points: ``(points, length)``, any floating-point type within float32.
        table: ``(vectors, length)`` float32, finite.
    """
    rows, first = distinct(table)
    step = max(1, SCORES // rows.shape[0])
    if not points.shape[0]:
        return
    largest = max(float(rows.abs().max()), _largest(points))
    # Squares must neither overflow nor vanish; a power of two changes no mantissa.
    unit = 2.0 ** -torch.tensor(largest, dtype=torch.float64).clamp(min=1e-37).log2().ceil().item()
    scaled = (rows.to(torch.float64) * unit).to(torch.float32)
    terms = distance_terms(scaled)
    length = scaled.square().sum(1)
    for start in range(0, points.shape[0], step):
        part = slice(start, start + step)
        single = points[part].to(torch.float32)
        small = (single.to(torch.float64) * unit).to(torch.float32)
        chosen = least_index(torch.mm(point_terms(small), terms)).to(torch.int64)
        error = (small - scaled[chosen]).square_().sum(1)
        near = error <= (small.square().sum(1) + length[chosen]) * _NEAR
        again = near & (single != rows[chosen]).any(1)
        if bool(again.any()):
            chosen[again] = _settle(single[again], rows)
        yield part, first[chosen]


def _largest(points: Tensor) -> float:
    if points.element_size() == 1:  # float8 has no reductions
        points = points.to(torch.float32)
    low, high = torch.aminmax(points)
    return max(-low.item(), high.item())


def _settle(points: Tensor, table: Tensor) -> Tensor:
    """The nearest row by direct differences in float64."""
    double, out = table.to(torch.float64), []
    for part in points.split(max(1, SCORES // table.numel())):
        difference = part.to(torch.float64).unsqueeze(1) - double
        out.append(difference.square_().sum(2).argmin(1))
    return torch.cat(out)
