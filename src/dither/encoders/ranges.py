"""Ranges of uniform grids: the extremes, a percentile, or the least squared error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dither.core import Encoded, SpecError, Stats, on_cpu
from dither.encoders.importance import importance_of
from dither.formats import Affine
from dither.formats.grid_rounding import require_floating
from dither.formats.grouping import Grouping, rows_of
from dither.formats.settings import check_choice, check_kind, check_number

METHODS = ("minmax", "percentile", "mse")

_COARSE = [2.0 ** (-step / 4) for step in range(25)]
_SCALES = 1 << 12
_FINE = [2.0 ** (step / 16) for step in (-3, -2, -1, 1, 2, 3)]


@dataclass(frozen=True)
class Ranges:
    """Nearest codes of an Affine whose range is chosen per scale (Nagel et al. 2021, section 3.1).

    * ``minmax``: no weight is clipped;
    * ``percentile``: that share of the weights lies within the range, half of the others to each
      side;
    * ``mse``: the clipping with the least squared error, weighted by ``stats.importance``: a grid
      of ratios from 1 to 1/64, then finer ones around the best, then each end by itself where the
      grid allows. Never worse than ``minmax``.

    Attributes:
        format: a bounded Affine of any granularity.
        method: ``"minmax"``, ``"percentile"`` or ``"mse"``.
        percentile: above 0, at most 100.

    Raises:
        SpecError: settings out of range, or an unbounded Affine.

    >>> weight = torch.tensor([0.1, -0.2, 0.3, -0.1, 0.2, 8.0])
    >>> clipped = Ranges(Affine(4), "percentile", percentile=50.0).encode(weight)
    >>> clipped.decode().max() < 1
    tensor(True)
    """

    format: Affine
    method: str = "mse"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        check_kind("Ranges", self.format, (Affine,))
        check_choice("Ranges", "method", self.method, METHODS)
        check_number("Ranges", "percentile", self.percentile, 100)
        if self.format.bits is None:
            raise SpecError(
                f"Ranges(format={self.format!r}): give bits=1..16; an unbounded grid has no range, "
                "see Nearest"
            )

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        """Nearest codes within the chosen ranges."""
        weight, stats = on_cpu(weight, stats)
        return self.format.assign(weight, self.params(weight, stats))

    def params(self, weight: Tensor, stats: Stats | None = None) -> dict[str, Tensor]:
        """Scales, and zeros or offsets, as ``format.assign`` takes them, where the weight is."""
        weight = require_floating(weight, self.format.name)
        grouping = self.format.grouping(tuple(weight.shape))
        if self.method == "percentile":
            return self.format.cover(*_percentiles(grouping, weight, self.percentile / 100))
        low, high = grouping.bounds(weight)
        if self.method == "minmax" or not weight.numel():
            return self.format.cover(low, high)
        importance = importance_of(stats, weight)
        rows, columns = rows_of(tuple(weight.shape))
        if self.format.group is None or rows == 1:
            return self._least_squares(weight, importance, low, high)
        # Many scales: a few rows at a time, which are independent, keep the trials small.
        step = max(1, _SCALES // grouping.groups_per_row)
        parts = [weight.reshape(rows, columns), low.view(rows, -1), high.view(rows, -1)]
        parts += [] if importance is None else [importance.reshape(rows, columns)]
        found = [
            self._least_squares(
                some[0], some[3] if len(some) > 3 else None, some[1].flatten(), some[2].flatten()
            )
            for some in zip(*(part.split(step) for part in parts), strict=True)
        ]
        return {name: torch.cat([params[name] for params in found]) for name in found[0]}

    def _least_squares(
        self, weight: Tensor, importance: Tensor | None, low: Tensor, high: Tensor
    ) -> dict[str, Tensor]:
        """Search of the clipping ratios of both ends, for all scales at once."""
        endpoint = self.format.grid == "endpoint"
        middle = (low + high) / 2 if endpoint else torch.zeros_like(low)
        below, above = middle - low, high - middle
        down, up = torch.ones_like(low), torch.ones_like(low)
        best = torch.full_like(low, torch.inf)

        def attempt(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
            """Move to the best of the given ratios, scale by scale, where it is better."""
            nonlocal down, up, best
            trials = [
                self.format.cover(middle - below * lower, middle + above * upper)
                for lower, upper in pairs
            ]
            errors = self._errors(weight, importance, trials)
            least, at = errors.min(0)
            chosen = torch.stack([torch.stack(pair) for pair in pairs])
            index = at.expand(1, 2, -1)
            picked = chosen.gather(0, index)[0]
            down = torch.where(least < best, picked[0], down)
            up = torch.where(least < best, picked[1], up)
            best = torch.minimum(least, best)

        attempt([(down * ratio, up * ratio) for ratio in _COARSE])
        attempt([(down * ratio, up * ratio) for ratio in _FINE])
        if self.format.grid != "symmetric":
            for ratios in (_COARSE, _FINE, _FINE):
                attempt([((down * ratio).clamp(max=1), up) for ratio in ratios])
                attempt([(down, (up * ratio).clamp(max=1)) for ratio in ratios])
        return self.format.cover(middle - below * down, middle + above * up)

    def _errors(
        self, weight: Tensor, importance: Tensor | None, trials: Sequence[Mapping[str, Tensor]]
    ) -> Tensor:
        """Squared error per scale of each trial, float64 ``(trials, scales)``; one pass."""
        grouping = self.format.grouping(tuple(weight.shape))
        errors = torch.zeros(len(trials), grouping.count, dtype=torch.float64, device=weight.device)
        names = list(trials[0])
        shared = [trial[name] for trial in trials for name in names]
        tensors = [weight] if importance is None else [weight, importance]
        for boxes, parts in grouping.walk(tensors, [*shared, *errors]):
            single = boxes[0].to(torch.float32)
            for number in range(len(trials)):
                mine = parts[number * len(names) : (number + 1) * len(names)]
                grid = self.format.line(dict(zip(names, mine, strict=True)))
                square = grid.values(grid.guess(single)).sub_(single).square_()
                if importance is not None:
                    square *= boxes[1]
                total = square.sum(grouping.reduced, keepdim=True, dtype=torch.float64)
                parts[len(shared) + number].add_(total)
        return errors


def _percentiles(grouping: Grouping, weight: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Ends of the middle ``share`` of the weights of each scale, float64; interpolated."""
    low = torch.zeros(grouping.count, dtype=torch.float64, device=weight.device)
    high = torch.zeros_like(low)
    if not weight.numel():
        return low, high
    pieces = zip(grouping.views(weight), grouping.spread(low), grouping.spread(high), strict=True)
    for box, least, greatest in pieces:
        # One axis of scales comes first; the weights that share a scale come last.
        rows = box.transpose(0, 1).flatten(1) if grouping.reduced == (0, 2) else box
        ordered = rows.to(torch.float32).sort(-1).values
        for end, at in ((least, (1 - share) / 2), (greatest, (1 + share) / 2)):
            place = at * (ordered.shape[-1] - 1)
            before = int(place)
            after = min(before + 1, ordered.shape[-1] - 1)
            first, second = (ordered[..., i].to(torch.float64) for i in (before, after))
            end.copy_(torch.lerp(first, second, place - before).reshape(end.shape))
    return low, high
