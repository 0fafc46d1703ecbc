"""What an error costs: the weights of squared errors."""

from __future__ import annotations

import torch
from torch import Tensor

from dither.core import SpecError, Stats
from dither.formats.grouping import CHUNK


def importance_of(stats: Stats | None, weight: Tensor) -> Tensor | None:
    """Importance expanded (as a view) to the weight's shape, float32; None where none is known.

    Raises:
        SpecError: it does not broadcast, is negative, not finite, or all 0.
    """
    if stats is None or stats.importance is None:
        return None
    given = stats.importance.detach().to(weight.device, torch.float32)
    try:
        expanded = given.expand(weight.shape)
    except RuntimeError as error:
        raise SpecError(
            f"importance of shape {tuple(given.shape)} does not broadcast to a weight of shape "
            f"{tuple(weight.shape)}; give one value per weight, row or column"
        ) from error
    if not bool((given.isfinite() & (given >= 0)).all()):
        raise SpecError("importance is negative or not finite; clamp it first")
    if weight.numel() and not bool((given > 0).any()):
        raise SpecError("importance is 0 everywhere; leave it out to treat all weights alike")
    return expanded


def weighted_error(weight: Tensor, other: Tensor, importance: Tensor | None = None) -> float:
    """Sum of importance times squared difference, in float64.

    >>> weighted_error(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
    5.0
    """
    total = 0.0
    parts = [weight.detach().reshape(-1), other.reshape(-1)]
    if importance is not None:
        parts.append(importance.reshape(-1))
    for chunk in zip(*(part.split(CHUNK) for part in parts), strict=True):
        square = (chunk[0].to(torch.float64) - chunk[1]).square_()
        if importance is not None:
            square *= chunk[2]
        total += float(square.sum())
    return total
