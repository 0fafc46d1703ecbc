"""Lloyd's iterations and their starts, on plain tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dither.formats.matching import distance_terms, nearest_by_terms, point_terms


def spread_start(
    points: Tensor, count: int, cost: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Distinct starting points by k-means++ (Arthur and Vassilvitskii 2007).

    Each next one is drawn with probability proportional to its cost times its squared distance to
    the nearest chosen one; fewer are returned where fewer are distinct.

    Args:
        points: ``(points, length)``.
        count: how many to choose at most.
        cost: ``(points,)``, or None.
        generator: of the draws.
    """
    share = torch.ones(len(points), dtype=torch.float64, device=points.device)
    share = share if cost is None else cost.to(torch.float64).clone()
    chosen: list[int] = []
    distance = torch.full_like(share, torch.inf)
    odds = share
    while len(chosen) < count:
        total = odds.cumsum(0)
        if not float(total[-1]) > 0:
            break
        draw = torch.rand(1, dtype=torch.float64, device=points.device, generator=generator)
        at = int(torch.searchsorted(total, draw * total[-1], right=True).clamp_(max=len(total) - 1))
        chosen.append(at)
        square = (points - points[at]).square_().sum(1).to(torch.float64)
        distance = torch.minimum(distance, square)
        odds = distance * share
    return points[torch.tensor(chosen, dtype=torch.int64, device=points.device)]


@dataclass(frozen=True, eq=False)
class SortedValues:
    """Scalars in order, with running sums, so that a run of them costs two look-ups.

    Attributes:
        values: sorted, less ``middle``, float64 ``(n,)``.
        middle: the median: sums of squares lose no digits to a common offset.
        sums: running sums of cost, cost times value and cost times square, ``(n + 1,)`` each.
    """

    values: Tensor
    middle: Tensor
    sums: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(cls, values: Tensor, cost: Tensor | None = None) -> SortedValues:
        """Sort values; those that cost nothing are left out."""
        if cost is not None:
            values, cost = values[cost > 0], cost[cost > 0]
        ordered, order = values.sort()
        middle = ordered[len(ordered) // 2].clone()
        ordered -= middle
        share = torch.ones_like(ordered) if cost is None else cost[order]
        moment = share * ordered
        zero, first, second = (
            torch.nn.functional.pad(part.cumsum(0), (1, 0))
            for part in (share, moment, moment * ordered)
        )
        return cls(ordered, middle, (zero, first, second))

    def clusters(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mass, mean and cost of what is nearest to each sorted point (less ``middle``)."""
        edges = torch.searchsorted(self.values, (points[1:] + points[:-1]) / 2, right=True)
        edges = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), len(self.values))])
        mass, first, second = (part[edges[1:]] - part[edges[:-1]] for part in self.sums)
        mean = torch.where(mass > 0, first / mass, points)
        return mass, mean, torch.where(mass > 0, second - first * mean, 0.0).clamp_(min=0)

    def at_mass(self, shares: Tensor) -> Tensor:
        """Values below which lie these shares of the mass, ``0 .. 1``."""
        at = torch.searchsorted(self.sums[0], shares * self.sums[0][-1], right=True) - 1
        return self.values[at.clamp_(0, len(self.values) - 1)]

    def quantiles(self, count: int) -> Tensor:
        """Points of equal mass."""
        return self.at_mass((self._steps(count) + 0.5) / count)

    def companded(self, count: int) -> Tensor:
        """Points as dense as the cube root of the density, the best for many points (Panter 1951).

        Between neighbouring quantiles a gap apart, the cube root of the density times the gap is
        the gap to the power 2/3; no gap may take more than one point.
        """
        ends = self.at_mass(self._steps(16 * count + 1) / (16 * count))
        share = ends.diff() ** (2 / 3)
        share = share.clamp(max=float(share.sum()) / count).cumsum(0)
        share = torch.nn.functional.pad(share / share[-1], (1, 0))
        wanted = (self._steps(count) + 0.5) / count
        after = torch.searchsorted(share, wanted).clamp_(1, len(share) - 1)
        part = (wanted - share[after - 1]) / (share[after] - share[after - 1])
        return torch.lerp(ends[after - 1], ends[after], part.clamp(0, 1))

    def _steps(self, count: int) -> Tensor:
        return torch.arange(count, dtype=torch.float64, device=self.values.device)


def lloyd_scalar(ordered: SortedValues, points: Tensor, iterations: int) -> tuple[Tensor, float]:
    """Exact Lloyd iterations in one dimension: sums over runs of sorted values.

    Args:
        ordered: the values.
        points: ``(points,)`` float64, the start.
        iterations: at most this many; fewer where nothing changes.

    Returns:
        Sorted points, ``(points,)``, and the squared error of the values with their nearest.

    >>> ordered = SortedValues.of(torch.tensor([0.0, 1.0, 10.0, 12.0], dtype=torch.float64))
    >>> points, error = lloyd_scalar(ordered, torch.tensor([0.0, 1.0]).double(), 5)
    >>> points.tolist(), error
    ([0.5, 11.0], 2.5)
    """
    points = points.sort().values - ordered.middle
    for _ in range(iterations):
        mass, mean, spread = ordered.clusters(points)
        moved = _fill_empty(mean, mass, spread)
        if torch.equal(moved, points):
            break
        points = moved
    mass, mean, spread = ordered.clusters(points)
    error = spread + mass * (points - mean).square()
    return points + ordered.middle, float(error.sum())


def _fill_empty(mean: Tensor, mass: Tensor, spread: Tensor) -> Tensor:
    """Sorted means, in which each empty cluster halves one of the costliest.

    Half of a cluster's variance away to both sides is where halves of a flat cluster would lie.
    """
    empty = (mass <= 0).nonzero().squeeze(1)
    if len(empty):
        mean = mean.clone()
        costly = spread.argsort(descending=True)[: len(empty)]
        costly = costly[spread[costly] > 0]
        shift = (spread[costly] / mass[costly]).sqrt() * 0.75**0.5
        mean[empty[: len(costly)]] = mean[costly] + shift
        mean[costly] -= shift
    return mean.sort().values


def lloyd_vectors(
    points: Tensor,
    table: Tensor,
    iterations: int,
    cost: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    """Lloyd iterations for vectors, by chunked matrix products.

    Args:
        points: ``(points, length)`` float32, of magnitude about 1.
        table: ``(centroids, length)``, the start.
        iterations: how many.
        cost: ``(points, length)`` weights of squared errors, or None.
        generator: of the directions in which clusters are split.

    Returns:
        Centroids, of the shape of ``table``; one that no point is nearest to may remain.
    """
    if cost is not None:
        cost = cost / cost.max()
    length = points.shape[1]
    across = point_terms(points, cost).T.contiguous()  # sums along rows are several times faster
    for _ in range(iterations):
        found = nearest_by_terms(across.T, distance_terms(table, importance=cost is not None))
        sums = across.new_zeros(len(across), len(table))
        sums = sums.index_add_(1, found.to(torch.int64), across).T
        first = sums[:, :length]
        mass = sums[:, -1:] if cost is None else sums[:, length:-1]
        square = sums[:, length] if cost is None else sums[:, -1]
        mean = torch.where(mass > 0, first / mass, table)
        spread = (square - (first * mean).sum(1)).clamp_(min=0)
        table = _split_costly(mean, mass.sum(1), spread, generator)
    return table


def _split_costly(
    table: Tensor, mass: Tensor, spread: Tensor, generator: torch.Generator
) -> Tensor:
    """Each empty cluster moves beside one of the costliest, which steps to the other side."""
    empty = (mass <= 0).nonzero().squeeze(1)
    if not len(empty):
        return table
    costly = spread.argsort(descending=True, stable=True)[: len(empty)]
    costly = costly[spread[costly] > 0]
    direction = torch.randn(
        (len(costly), table.shape[1]),
        dtype=torch.float32,
        device=table.device,
        generator=generator,
    ).sign_()
    step = (spread[costly] / mass[costly]).sqrt_().unsqueeze(1) * direction / 4
    table = table.clone()
    table[empty[: len(costly)]] = table[costly] + step
    table[costly] -= step
    return table
