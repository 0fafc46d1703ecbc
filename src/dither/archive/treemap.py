"""Rectangles whose areas are shares of a whole: a squarified treemap (Bruls et al. 2000)."""

from __future__ import annotations

from collections.abc import Sequence

Box = tuple[float, float, float, float]
"""Left, top, width, height."""

_LEAST = 1e-9
"""What is left when rounding has used up all."""


def squarified(values: Sequence[float], width: float, height: float) -> list[Box]:
    """Boxes that fill ``width`` x ``height``, one for each value, as near to squares as it goes.

    Args:
        values: positive, the greatest first.
        width: of the whole.
        height: of the whole.

    >>> squarified([2, 1, 1], 2, 1)
    [(0.0, 0.0, 1.0, 1.0), (1.0, 0.0, 1.0, 0.5), (1.0, 0.5, 1.0, 0.5)]
    """
    total = sum(values)
    areas = [value * width * height / total for value in values]
    boxes: list[Box] = []
    left, top = 0.0, 0.0
    while len(boxes) < len(areas):
        row = _row(areas[len(boxes) :], min(width, height))
        upright = width >= height
        depth = sum(row) / min(width, height)
        along = 0.0
        for area in row:
            length = area / depth
            place = (left, top + along) if upright else (left + along, top)
            boxes.append((*place, depth, length) if upright else (*place, length, depth))
            along += length
        if upright:
            left, width = left + depth, max(width - depth, _LEAST)
        else:
            top, height = top + depth, max(height - depth, _LEAST)
    return boxes


def _row(areas: Sequence[float], side: float) -> Sequence[float]:
    """The first areas that make the best row along a side."""
    count = 1
    while count < len(areas) and _worst(areas[: count + 1], side) <= _worst(areas[:count], side):
        count += 1
    return areas[:count]


def _worst(row: Sequence[float], side: float) -> float:
    """The greatest ratio of sides in a row of areas."""
    total = sum(row)
    return max(side**2 * max(row) / total**2, total**2 / (side**2 * min(row)))
