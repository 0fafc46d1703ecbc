"""Bytes that a quantized network moves to and from memory in a step of training.

The model of Fournarakis and Nagel 2021 (arXiv 2105.04246, section on memory movement): an
accelerator reads 8-bit operands and sums in wide accumulators. If the range of the result is known
before, it is quantized on its way out and written once. If the range depends on the result itself,
accumulators are written, read again once their extremes are known, and written a third time,
quantized. Batch norm, ReLU and sums are taken as fused with the layer before them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SCHEMES = ("dynamic", "running", "hindsight", "static")
OPERAND, ACCUMULATOR = 1, 4
"""Bytes of a quantized number and of an accumulator."""
RANGE = 2 * 4
"""Bytes of the two ends of a range."""


@dataclass(frozen=True)
class Layer:
    """A convolution or a linear layer, and the sizes of what it reads and gives.

    Attributes:
        name: its path.
        weights: how many.
        inputs: numbers that it reads for one sample.
        outputs: numbers that it gives for one sample.
        is_first: its input is data, which needs no gradient.
    """

    name: str
    weights: int
    inputs: int
    outputs: int
    is_first: bool = False


def written(numbers: int, scheme: str) -> int:
    """Bytes moved until a result of so many numbers is in memory, quantized.

    ``"dynamic"`` and ``"running"`` need the extremes of the result itself: accumulators go out and
    come back. ``"hindsight"`` reads a range and writes what the accumulators saw; ``"static"``
    reads a range.

    Raises:
        ValueError: no such scheme.

    >>> [written(100, scheme) for scheme in ("static", "hindsight", "dynamic")]
    [108, 116, 908]
    """
    if scheme not in SCHEMES:
        raise ValueError(f"a scheme is one of {', '.join(SCHEMES)}, not {scheme!r}")
    quantized = numbers * OPERAND
    if scheme == "dynamic":
        return quantized + 2 * numbers * ACCUMULATOR + RANGE
    if scheme == "running":
        return quantized + 2 * numbers * ACCUMULATOR + 2 * RANGE
    return quantized + (2 if scheme == "hindsight" else 1) * RANGE


def forward(layer: Layer, scheme: str, batch: int = 1) -> int:
    """Bytes moved by a layer: weights and inputs are read, outputs written."""
    read = (layer.weights + batch * layer.inputs) * OPERAND
    return read + written(batch * layer.outputs, scheme)


def backward(layer: Layer, scheme: str, batch: int = 1) -> int:
    """Bytes moved by the two products of back-propagation.

    The gradient of the inputs reads weights and the gradient of the outputs, and is quantized; the
    first layer has none. That of the weights reads inputs and the gradient of the outputs, and is
    written as it is accumulated, because the optimizer takes it so.
    """
    gradient = batch * layer.outputs * OPERAND
    weights = batch * layer.inputs * OPERAND + gradient + layer.weights * ACCUMULATOR
    if layer.is_first:
        return weights
    inputs = layer.weights * OPERAND + gradient + written(batch * layer.inputs, scheme)
    return weights + inputs


def totals(layers: Iterable[Layer], scheme: str, batch: int = 1) -> dict[str, int]:
    """Bytes of a step over all layers: forward, backward, both, and of these the results'.

    Results are the activations that layers give and the gradients of those that they read, without
    operands and without gradients of weights, which are the same in every scheme.
    """
    layers = list(layers)
    ahead = sum(forward(layer, scheme, batch) for layer in layers)
    back = sum(backward(layer, scheme, batch) for layer in layers)
    sizes = [layer.outputs for layer in layers]
    sizes += [layer.inputs for layer in layers if not layer.is_first]
    results = sum(written(batch * size, scheme) for size in sizes)
    return {"forward": ahead, "backward": back, "both": ahead + back, "results": results}


def layers_of(model: nn.Module, sample: Tensor) -> list[Layer]:
    """The convolutions and linear layers of a model, in the order of their calls.

    Args:
        model: any module.
        sample: a batch of one.
    """
    found: list[Layer] = []
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        weight: Any = module.weight
        is_first = args[0] is sample
        sizes = weight.numel(), args[0].numel(), output.numel()
        found.append(Layer(names[module], *sizes, is_first=is_first))

    hooks = [
        module.register_forward_hook(note)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(sample)
    for hook in hooks:
        hook.remove()
    return found
