"""Pruning before the budget is spent, without data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dither.core import SpecError
from dither.encoders.masks import largest, n_of_m, parse_pattern
from dither.search.knowledge import Knowledge, Sensitivity
from dither.search.predict import can_quantize
from dither.search.sensitivity import data_free


@dataclass(frozen=True)
class PrunedFirst:
    """A sensitivity by which a share of the weights of matrices is 0 before they are stored.

    Those that cost least go, by their squares times what an error costs, of all matrices and
    convolutions together; token tables and vectors stay whole. Zeros are exact in the file, so
    errors of rounding are not fed on to other weights: at one size this is coarser than
    :func:`~dither.search.data_free`, and of use where zeros are, as for kernels that skip them.

    Attributes:
        share: of zeros, above 0 and below 1; or ``"n:m"``: at most n of m consecutive inputs of a
            row are kept.
        sensitivity: what an error costs.

    Raises:
        SpecError: another share; there is no matrix.
    """

    share: float | str
    sensitivity: Sensitivity = data_free

    def __post_init__(self) -> None:
        known = (
            parse_pattern(self.share) is not None
            if isinstance(self.share, str)
            else 0 < self.share < 1
        )
        if not known:
            raise SpecError(
                f"a share of weights above 0 and below 1 is pruned, or n:m as 2:4, with n < m, not "
                f"{self.share}"
            )

    def __call__(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Knowledge]:
        found = dict(self.sensitivity(tensors))
        matrices = {
            name: known
            for name, known in found.items()
            if known.value.ndim > 1 and known.rows is None and can_quantize(known.value)
        }
        if not matrices:
            raise SpecError("there is no matrix or convolution to prune")
        costs = {name: _cost(known) for name, known in matrices.items()}
        if isinstance(self.share, str):
            keep, size = parse_pattern(self.share) or (1, 1)
            masks = {name: n_of_m(cost, keep, size) for name, cost in costs.items()}
        else:
            kept = largest(torch.cat([cost.reshape(-1) for cost in costs.values()]), self.share)
            parts = kept.split([cost.numel() for cost in costs.values()])
            masks = {
                name: part.reshape(cost.shape)
                for (name, cost), part in zip(costs.items(), parts, strict=True)
            }
        for name, known in matrices.items():
            value = known.value.detach() * masks[name]
            found[name] = replace(known, value=value, gram=None, axes=None)
        return found


def _cost(known: Knowledge) -> Tensor:
    """The square root of what is lost with each weight."""
    return known.value.detach().float().abs() * math.sqrt(known.sensitivity)
