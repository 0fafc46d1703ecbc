"""Which weights share a scale: a whole tensor, an index of one axis, or a run within a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor

from dither.core import SpecError

CHUNK = 1 << 18
"""Weights handled at once, so that temporary copies stay in the cache whatever the tensor."""


def rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor viewed as ``(shape[0], rest)``; a vector is one row.

    >>> rows_of((8, 3, 3, 3)), rows_of((5,)), rows_of(())
    ((8, 27), (1, 5), (1, 1))
    """
    rows = shape[0] if len(shape) > 1 else 1
    return rows, prod(shape[1:]) if len(shape) > 1 else prod(shape)


def chunks(shape: tuple[int, int, int], limit: int = CHUNK) -> Iterator[tuple[slice, slice, slice]]:
    """Cut a 3-D shape into boxes of at most ``limit`` elements, in row-major order."""
    if 0 in shape:
        return
    outer, middle, inner = shape
    steps = (
        max(1, limit // (middle * inner)),
        min(middle, max(1, limit // inner)),
        min(inner, limit),
    )
    starts = (range(0, n, step) for n, step in zip((outer, middle, inner), steps, strict=True))
    for corner in product(*starts):
        a, b, c = (slice(at, at + step) for at, step in zip(corner, steps, strict=True))
        yield a, b, c


@dataclass(frozen=True)
class Grouping:
    """The sharing of scales over a tensor of ``shape``.

    Weights are seen through 3-D views in which the scales broadcast: ``(1, 1, n)`` against
    ``(1, 1, 1)`` for one scale, ``(outer, n, inner)`` against ``(1, n, 1)`` for an axis, and
    ``(rows, groups, group)`` against ``(rows, groups, 1)`` for runs of consecutive weights within
    a row, where a shorter last group of each row has a view of its own.

    Attributes:
        shape: shape of the tensor.
        axis: one scale per index of this axis, or None.
        group: one scale per this many consecutive weights of each row, or None.

    Raises:
        SpecError: the axis does not exist in the shape.
    """

    shape: tuple[int, ...]
    axis: int | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        """Resolve a negative axis and refuse one that does not exist."""
        if self.axis is None:
            return
        if not -len(self.shape) <= self.axis < len(self.shape):
            raise SpecError(
                f"axis={self.axis} does not exist in a tensor of shape {self.shape}; "
                f"use axis=None or an axis below {len(self.shape)}"
            )
        object.__setattr__(self, "axis", self.axis % len(self.shape))

    @property
    def groups_per_row(self) -> int:
        """Scales of one row, where ``group`` is given."""
        if self.group is None:
            raise SpecError("groups_per_row needs a grouping with group=...")
        return -(-rows_of(self.shape)[1] // self.group)

    @property
    def count(self) -> int:
        """Number of scales.

        >>> Grouping((4, 10), group=4).count
        12
        """
        if self.axis is not None:
            return self.shape[self.axis]
        if self.group is not None:
            return rows_of(self.shape)[0] * self.groups_per_row
        return 1

    @property
    def reduced(self) -> tuple[int, ...]:
        """Axes of the 3-D views along which weights share a scale."""
        if self.axis is not None:
            return (0, 2)
        return (0, 1, 2) if self.group is None else (2,)

    def views(self, tensor: Tensor) -> list[Tensor]:
        """3-D views of a tensor of ``shape`` (of a copy where its strides allow no view)."""
        if self.axis is not None:
            outer, inner = prod(self.shape[: self.axis]), prod(self.shape[self.axis + 1 :])
            return [tensor.reshape(outer, self.shape[self.axis], inner)]
        if self.group is None:
            return [tensor.reshape(1, 1, tensor.numel())]
        rows, columns = rows_of(self.shape)
        table, full = tensor.reshape(rows, columns), columns // self.group
        whole, rest = table[:, : full * self.group], table[:, full * self.group :]
        views = [whole.unflatten(1, (full, self.group))] if full else []
        return [*views, rest.unsqueeze(1)] if rest.shape[1] else views

    def spread(self, values: Tensor) -> list[Tensor]:
        """3-D views of one value per scale, ``(count,)``, that broadcast against :meth:`views`."""
        if self.axis is not None:
            return [values.reshape(1, self.count, 1)]
        if self.group is None:
            return [values.reshape(1, 1, 1)]
        rows, columns = rows_of(self.shape)
        table, full = values.reshape(rows, self.groups_per_row), columns // self.group
        views = [table[:, :full].unsqueeze(2)] if full else []
        return [*views, table[:, full:].unsqueeze(2)] if columns % self.group else views

    def walk(
        self, tensors: Sequence[Tensor], values: Sequence[Tensor], limit: int = CHUNK
    ) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Matching small boxes of tensors of ``shape`` and of values per scale, as views.

        No box has more than ``limit`` weights.
        """
        boxes = zip(*(self.views(tensor) for tensor in tensors), strict=True)
        scales = zip(*(self.spread(value) for value in values), strict=True)
        for box, shared in zip(boxes, scales, strict=True):
            for cut in chunks(tuple(box[0].shape), limit):
                narrow = tuple(
                    part if n > 1 else slice(None)
                    for part, n in zip(cut, shared[0].shape, strict=True)
                )
                yield [view[cut] for view in box], [view[narrow] for view in shared]

    def bounds(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest weight per scale, float64 ``(count,)``; 0 where there is no weight.

        >>> low, high = Grouping((2, 3), group=2).bounds(torch.arange(6.0).reshape(2, 3))
        >>> low.tolist(), high.tolist()
        ([0.0, 2.0, 3.0, 5.0], [1.0, 2.0, 4.0, 5.0])
        """
        low = torch.zeros(self.count, dtype=torch.float64, device=tensor.device)
        high = torch.zeros_like(low)
        if tensor.numel():
            if tensor.element_size() == 1:  # float8 has no reductions
                tensor = tensor.to(torch.float32)
            pieces = zip(self.views(tensor), self.spread(low), self.spread(high), strict=True)
            for box, least, greatest in pieces:
                least.copy_(box.amin(self.reduced, keepdim=True))
                greatest.copy_(box.amax(self.reduced, keepdim=True))
        return low, high

    def sizes(self, device: torch.device | None = None) -> Tensor:
        """Number of weights that share each scale, float64 ``(count,)``."""
        if self.group is None:
            each = prod(self.shape) / self.count if self.count else 0.0
            return torch.full((self.count,), each, dtype=torch.float64, device=device)
        rows, columns = rows_of(self.shape)
        starts = torch.arange(self.groups_per_row, device=device) * self.group
        return (columns - starts).clamp_(max=self.group).to(torch.float64).repeat(rows)

    def deviation(self, tensor: Tensor) -> Tensor:
        """Standard deviation per scale (divided by the count), float64 ``(count,)``."""
        total = torch.zeros(self.count, dtype=torch.float64, device=tensor.device)
        if not tensor.numel():
            return total
        size, mean = self.sizes(tensor.device), torch.zeros_like(total)
        for (box,), (part, count) in self.walk([tensor], [mean, size]):
            part.add_((box.to(torch.float64) / count).sum(self.reduced, keepdim=True))
        for (box,), (part, middle) in self.walk([tensor], [total, mean]):
            part.add_((box.to(torch.float64) - middle).square_().sum(self.reduced, keepdim=True))
        return (total / size).sqrt_()

    def magnitude(self, tensor: Tensor) -> Tensor:
        """Mean magnitude per scale, float64 ``(count,)``; 0 where there is no weight."""
        total = torch.zeros(self.count, dtype=torch.float64, device=tensor.device)
        if tensor.numel():
            size = self.sizes(tensor.device)
            for (box,), (part, count) in self.walk([tensor], [total, size]):
                part.add_((box.to(torch.float64).abs() / count).sum(self.reduced, keepdim=True))
        return total
