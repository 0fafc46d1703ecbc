"""Ranges of uniform grids by the error of the layer's output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dither.core import STACKED, Encoded, SpecError, Stats
from dither.encoders.outputs import matrix_of, output_errors, prepared, retargeted
from dither.encoders.ranges import Ranges
from dither.formats import Affine
from dither.formats.grid_rounding import require_floating
from dither.formats.settings import check_count, check_kind

RANGES = ("mse", "minmax", "output")
"""Squared error of the weights, their extremes, squared error of the outputs."""


@dataclass(frozen=True)
class SequentialMSE:
    """Clip a range where the error of the layer's output is least (AIMET's sequential MSE).

    For each scale, the ends of the weights times ``k / candidates``, ``k = 1 .. candidates``, are
    tried, and the range of least squared error of the weights; nearest codes, and the squared
    error ``E H E'`` of the output, ``H`` from ``Stats.gram``. Sequential are the statistics:
    :func:`dither.calibrate.in_sequence` gives them under the encoded layers before; with
    ``Stats.cross``, errors are those from the original model's output.

    Attributes:
        format: a bounded Affine with one scale, or one for each output.
        candidates: ranges tried; 20 in AIMET.

    Raises:
        SpecError: settings out of range, or scales by group.

    >>> weight = torch.tensor([[0.1, -0.2, 0.3, 4.0]])  # the last input is always 0
    >>> stats = Stats(gram=torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0])))
    >>> found = SequentialMSE(Affine(3)).encode(weight, stats).decode()
    >>> bool((found - weight)[0, :3].abs().max() < 0.1)
    True
    """

    format: Affine
    candidates: int = 20

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        check_kind("SequentialMSE", self.format, (Affine,))
        check_count("SequentialMSE", "candidates", self.candidates, 1, 1 << 12)
        if self.format.bits is None or self.format.group is not None:
            raise SpecError(
                f"SequentialMSE(format={self.format!r}): give bits=1..16 and no group; scales "
                "within a row share an output, and cannot be chosen one by one"
            )

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        """Nearest codes within the chosen ranges; without a Gram matrix as :class:`Ranges`.

        Raises:
            SpecError: an axis of scales that is not that of the outputs; moments that do not fit.
        """
        weight, stats = prepared(weight, stats)
        return self.format.assign(weight, self.params(weight, stats))

    def params(self, weight: Tensor, stats: Stats | None = None) -> dict[str, Tensor]:
        """Scales, and zeros or offsets, as ``format.assign`` takes them.

        Raises:
            SpecError: as :meth:`encode`.
        """
        weight = require_floating(weight, self.format.name)
        fallback = Ranges(self.format).params(weight, stats)
        if stats is None or stats.gram is None or not weight.numel() or not weight.ndim:
            return fallback
        grouping = self.format.grouping(tuple(weight.shape))
        is_stack = stats.outputs == STACKED
        if grouping.axis is not None and not is_stack and grouping.axis != stats.outputs:
            raise SpecError(
                f"scales along axis {grouping.axis} of a weight whose outputs are axis "
                f"{stats.outputs}; give Affine(axis={stats.outputs})"
            )
        aim = weight if stats.cross is None else retargeted(weight, stats, 0.01)
        low, high = grouping.bounds(weight)
        shares = [k / self.candidates for k in range(1, self.candidates + 1)]
        trials = [fallback, *(self.format.cover(low * k, high * k) for k in shares)]
        best = torch.full((grouping.count,), torch.inf, dtype=torch.float64, device=weight.device)
        chosen = {name: value.clone() for name, value in fallback.items()}
        for trial in trials:
            decoded = self.format.assign(weight, trial).decode()
            error = matrix_of(decoded.float() - aim.float(), stats.outputs)
            each = output_errors(error, stats.gram)
            each = each if grouping.axis is not None else each.sum(0, keepdim=True)
            if is_stack and grouping.axis is not None:
                each = each.reshape(weight.shape[:-1]).movedim(grouping.axis, 0).flatten(1).sum(1)
            better = each < best
            best = torch.minimum(each, best)
            for name, value in trial.items():
                chosen[name] = torch.where(better, value, chosen[name])
        return chosen


def params_by(
    ranges: str, fmt: Affine, weight: Tensor, stats: Stats | None = None
) -> dict[str, Tensor]:
    """Parameters of a bounded grid whose ranges are found in one of the ways of :data:`RANGES`."""
    if ranges == "output":
        return SequentialMSE(fmt).params(weight, stats)
    return Ranges(fmt, ranges).params(weight, stats)
