"""Counts of values, from which ranges are chosen without keeping the values."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dither.activations.integer_grid import cover, integers

_HALF = 1 << 13
"""Bins on either side of 0."""

_COARSE = [2.0 ** (-step / 4) for step in range(25)]
_FINE = [2.0 ** (step / 16) for step in (-3, -2, -1, 0, 1, 2, 3)]


class Histogram:
    """Counts of values in bins of equal width, a power of two, on both sides of 0.

    When a value does not fit, pairs of bins merge. So the counts depend on the values alone, not on
    their order or on how they came in batches.

    Attributes:
        counts: ``(groups, 2 * half)``, int64.
        width: of a bin.
        low: least value of each group, exactly.
        high: greatest.
    """

    def __init__(self, groups: int) -> None:
        self.counts = torch.zeros(groups, 2 * _HALF, dtype=torch.int64)
        self.low = torch.full((groups,), math.inf)
        self.high = torch.full((groups,), -math.inf)
        self.width = 0.0

    def add(self, values: Tensor) -> None:
        """Count values, ``(groups, n)``, finite."""
        values = values.detach().float().cpu()
        if not values.numel():
            return
        self.low = torch.minimum(self.low, values.amin(1))
        self.high = torch.maximum(self.high, values.amax(1))
        largest = float(torch.maximum(-self.low, self.high).max())
        self._widen(largest)
        bins = torch.zeros_like(values) if self.width == 0 else values / self.width
        place = bins.floor_().clamp_(-_HALF, _HALF - 1).long().add_(_HALF)
        row = torch.arange(len(values)).unsqueeze(1) * (2 * _HALF)
        found = torch.bincount((place + row).flatten(), minlength=self.counts.numel())
        self.counts += found.view_as(self.counts)

    def _widen(self, largest: float) -> None:
        if largest == 0:
            return
        exponent = math.frexp(largest / _HALF)[1]
        width = 2.0**exponent
        if self.width == 0:  # only zeros so far, and they stay in the first bin from 0
            self.width = width
        while self.width < width:
            below = self.counts[:, :_HALF].view(-1, _HALF // 2, 2).sum(2)
            above = self.counts[:, _HALF:].view(-1, _HALF // 2, 2).sum(2)
            self.counts.zero_()
            self.counts[:, _HALF // 2 : _HALF] = below
            self.counts[:, _HALF : _HALF + _HALF // 2] = above
            self.width *= 2

    def percentile(self, share: float) -> tuple[Tensor, Tensor]:
        """Ends of the middle ``share`` (0 to 1) of each group, to the width of a bin; float32."""
        total = self.counts.sum(1, keepdim=True).double()
        below = self.counts.cumsum(1)
        lows = (below <= total * (1 - share) / 2).sum(1)
        highs = (below < total * (1 + share) / 2).sum(1) + 1
        low = ((lows - _HALF) * self.width).float().maximum(self.low)
        high = ((highs - _HALF) * self.width).float().minimum(self.high)
        return low, high

    def least_squares(self, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
        """The range with the least squared error of each group; never worse than the extremes."""
        found = [self._least(group, bits, symmetric=symmetric) for group in range(len(self.low))]
        return torch.tensor([low for low, _ in found]), torch.tensor([high for _, high in found])

    def _least(self, group: int, bits: int, *, symmetric: bool) -> tuple[float, float]:
        used = self.counts[group].nonzero().flatten()
        centres = (used - _HALF + 0.5) * self.width
        # The two ends are known exactly; the first bin from 0 is mostly what a ReLU cut off.
        centres = centres.float().clamp(self.low[group], self.high[group])
        centres[used == _HALF] = 0.0
        weights = self.counts[group][used].double()

        def error(low: float, high: float) -> float:
            scale, zero = cover(torch.tensor(low), torch.tensor(high), bits, symmetric=symmetric)
            values = (integers(centres, scale, zero, bits) - zero) * scale
            return float(((values - centres).double().square_() * weights).sum())

        return search(error, float(self.low[group]), float(self.high[group]))


def search(error: Callable[[float, float], float], low: float, high: float) -> tuple[float, float]:
    """The best range within ``low`` to ``high``: ratios of both ends, then of each by itself.

    A grid of ratios from 1 to 1/64, then finer ones around the best; never worse than the start.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    best = (error(low, high), 1.0, 1.0)

    def attempt(downs: list[float], ups: list[float]) -> None:
        nonlocal best
        for down, up in zip(downs, ups, strict=True):
            if down <= 1 and up <= 1:
                best = min(best, (error(low * down, high * up), down, up), key=lambda t: t[0])

    for ratios in (_COARSE, _FINE):
        _, down, up = best
        attempt([down * r for r in ratios], [up * r for r in ratios])
    if low < 0 < high:
        for ratios in (_COARSE, _FINE, _FINE):
            _, down, up = best
            attempt([down * r for r in ratios], [up] * len(ratios))
            _, down, up = best
            attempt([down] * len(ratios), [up * r for r in ratios])
    return low * best[1], high * best[2]
