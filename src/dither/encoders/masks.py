"""Which weights are kept, by their magnitudes."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

_N_OF_M = re.compile(r"(\d+):(\d+)")


def largest(magnitudes: Tensor, share: float) -> Tensor:
    """Where the largest are, but for that share at least; ties are broken by their place.

    Args:
        magnitudes: ``(count,)``.
        share: of what is not kept, 0 to 1.
    """
    count = len(magnitudes) - math.ceil(round(share * len(magnitudes), 6))
    mask = torch.zeros(len(magnitudes), dtype=torch.bool, device=magnitudes.device)
    mask[magnitudes.argsort(descending=True, stable=True)[:count]] = True
    return mask


def n_of_m(weight: Tensor, keep: int, size: int) -> Tensor:
    """The largest ``keep`` of each ``size`` consecutive inputs; a last, shorter run is kept."""
    rows = weight.abs().reshape(len(weight) if weight.ndim > 1 else 1, -1)
    whole = rows.shape[1] // size * size
    runs = rows[:, :whole].reshape(len(rows), -1, size)
    order = runs.argsort(dim=-1, descending=True, stable=True)
    mask = torch.ones_like(rows, dtype=torch.bool)
    kept = torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, order[..., :keep], value=True)
    mask[:, :whole] = kept.reshape(len(rows), whole)
    return mask.reshape(weight.shape)


def parse_pattern(text: str) -> tuple[int, int] | None:
    """``"n:m"`` with ``0 < n < m`` as numbers; None for any other text."""
    match = _N_OF_M.fullmatch(text)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        return None
    return int(match[1]), int(match[2])
