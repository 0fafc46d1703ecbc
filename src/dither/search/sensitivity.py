"""What an error in each tensor costs, read off the weights alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from dither.search.options import Weighted
from dither.search.priors import prior_gram

Sensitivity = Callable[[Mapping[str, Tensor]], Mapping[str, Weighted]]
"""Tensors by name in, each with what an error costs out."""


def data_free(tensors: Mapping[str, Tensor]) -> dict[str, Weighted]:
    """Placeholder while the rule is being found."""
    return {name: _weigh(value) for name, value in tensors.items()}


def _weigh(value: Tensor) -> Weighted:
    if value.ndim < 2:
        return Weighted(value, 1.0)
    return Weighted(value, max(value.numel(), 1) ** (-2 / 3), gram=prior_gram(value))
