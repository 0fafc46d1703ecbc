"""Bayesian Bits (van Baalen et al., NeurIPS 2020, arXiv 2005.07093).

Gates open or close 2, 4, 8 and 16 bits of each tensor, and whole output channels; the penalty
counts expected bits, each tensor by its share of the multiplications. CIFAR-10 VGG: 93.23 % at
0.51 % of the bit operations with mu = 0.01, 91.96 % at 0.29 % with 0.1. Activations, which the
paper quantizes too, stay as they are here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dither.data import call
from dither.model import evaluating
from dither.recipes.model_layers import Layer, layers, plan_of
from dither.recipes.recipe import Recipe
from dither.train.bayesian_bits import BayesianBits, GatedBits, GatePenalty, is_open
from dither.train.run import Run

PENALTIES = {"mnist": 0.1, "cifar": 0.01, "imagenet": 0.03}
"""The paper's mu; it goes from 0.01 to 0.2 on ImageNet."""

_DECIDED = 20.0


def recipe(
    model: nn.Module,
    *,
    penalty: float = 0.01,
    inputs: Tensor | None = None,
    prune: bool = True,
    max_bits: int = 16,
    lr: float = 1e-3,
) -> Recipe:
    """Gates for all matrices and kernels; embeddings are not pruned.

    The paper ends with a quarter of its epochs at fixed gates: call :func:`fix_gates` then.

    Args:
        model: any module.
        penalty: mu, see :data:`PENALTIES`.
        inputs: an example of what the model takes, to count multiplications; without, all tensors
            count alike.
        prune: whether output channels have gates.
        max_bits: 8 on MNIST.
        lr: learning rate of gates and ranges, for Adam.
    """
    macs = {} if inputs is None else multiplications(model, inputs)

    def choose(layer: Layer) -> BayesianBits:
        return BayesianBits(max_bits, prune=prune and not layer.is_embedding, lr=lr)

    return Recipe(plan_of(model, choose), (GatePenalty(penalty, macs),))


def multiplications(model: nn.Module, inputs: Tensor) -> dict[str, float]:
    """Multiplications of each layer for one example, by the first name of its weight.

    Args:
        model: runs once, in evaluation mode, without gradients.
        inputs: ``(batch, ...)``.
    """
    found: dict[str, float] = {}
    hooks = []
    for layer in layers(model):
        found[layer.name] = 0.0

        def count(_: nn.Module, __: object, output: object, layer: Layer = layer) -> None:
            if isinstance(output, Tensor) and not layer.is_embedding:
                places = output.numel() / (len(output) * layer.weight.shape[0])
                found[layer.name] += layer.weight.numel() * places

        hooks.append(layer.module.register_forward_hook(count))
    try:
        with evaluating(model), torch.no_grad():
            call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def fix_gates(run: Run) -> None:
    """Decide all gates as the file would; from here on only weights and ranges learn."""
    for surrogate in run.surrogates.values():
        if isinstance(surrogate, GatedBits):
            for logits in (surrogate.logits, surrogate.keep):
                if logits is not None:
                    with torch.no_grad():
                        logits.copy_(torch.where(is_open(logits), _DECIDED, -_DECIDED))
                    logits.requires_grad, logits.grad = False, None


def bit_operations(run: Run, macs: Mapping[str, float], activations: int = 32) -> float:
    """Share of the bit operations of 32-bit weights and activations, as the file would have it.

    Args:
        run: of a :func:`recipe`.
        macs: of :func:`multiplications`.
        activations: bits of the activations.
    """
    spent = 0.0
    for name, surrogate in run.surrogates.items():
        if isinstance(surrogate, GatedBits):
            spent += macs[name] * float(surrogate.widths().double().mean()) * activations
    return spent / (32 * 32 * sum(macs.values()))
