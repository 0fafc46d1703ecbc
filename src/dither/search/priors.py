"""What is known of a layer's inputs without seeing any: second moments for error feedback.

Rounding errors that add up along what inputs have in common cost far more than others. Two things
hold for nearly every network: the inputs of a layer share a part (after a ReLU, their positive
mean), and in a convolution neighbouring pixels are alike. GPTQ with such a prior Gram matrix moves
the error to where inputs rarely go.
"""

from __future__ import annotations

from itertools import product
from threading import Lock
from weakref import WeakValueDictionary

import torch
from torch import Tensor

COMMON = 0.3
"""Share of an input's second moment that all inputs have in common: the squared mean."""

NEIGHBOUR = 0.6
"""Correlation of the same channel at neighbouring taps; it falls by this factor for each step."""

MOST_INPUTS = 2048
"""Inputs that one Gram matrix covers: wider layers are treated in groups of whole channels."""


def prior_gram(weight: Tensor) -> Tensor | None:
    """Second moments of a layer's inputs, in the order of the weight's columns.

    Args:
        weight: ``(outputs, inputs)``, or ``(outputs, channels, *kernel)`` with up to three spatial
            axes.

    Returns:
        ``(inputs, inputs)``, diagonal 1, for as many whole channels as fit :data:`MOST_INPUTS`;
        None for tensors of other shapes.
    """
    if not 2 <= weight.ndim <= 5 or not weight.is_floating_point() or not weight.numel():
        return None
    kernel = tuple(weight.shape[2:])
    taps = weight[0, 0].numel()
    if taps > MOST_INPUTS:
        return None
    key = min(weight.shape[1], MOST_INPUTS // taps), kernel
    with _LOCK:
        gram = _GRAMS.get(key)
        if gram is None:
            gram = _GRAMS[key] = _gram(*key)
    return gram


_GRAMS: WeakValueDictionary[tuple[int, tuple[int, ...]], Tensor] = WeakValueDictionary()
"""Layers of one shape share theirs, for as long as one of them is at work."""

_LOCK = Lock()


@torch.inference_mode(mode=False)
def _gram(channels: int, kernel: tuple[int, ...]) -> Tensor:
    places = torch.tensor(list(product(*map(range, kernel))), dtype=torch.float32)
    alike = NEIGHBOUR ** torch.cdist(places, places)
    own = torch.eye(channels, dtype=torch.float32)
    return (1 - COMMON) * torch.kron(own, alike) + COMMON
