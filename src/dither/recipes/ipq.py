"""Iterative product quantization, after Quant-Noise or by itself.

Stock et al., "And the bit goes down", ICLR 2020, arXiv 1907.05686: layer after layer, with the
error of the outputs, distilled from the original, no labels; ResNet-50 73.79 % in 5.09 MiB (small
blocks), 68.21 % in 3.19 MiB (large). Fan, Stock et al., ICLR 2021, arXiv 2004.07320: in three
groups, feed-forward, embeddings and attention; with Quant-Noise before, perplexity 20.7 in 38 MiB
on WikiText-103 (Table 1) and MNLI 83.6 in 38 MiB (Table 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dither.core import SpecError
from dither.data import Data
from dither.formats import Product
from dither.recipes.model_layers import Layer, layers, plan_of
from dither.recipes.quant_noise import block, product
from dither.recipes.recipe import Recipe
from dither.train.ipq import IterativePQ, ProductCodes, StillNorms, published_nbytes
from dither.train.plan import Plan
from dither.train.quant_noise import QuantNoise

STEPS = {"language model": 13_500, "roberta": 3 * 2_036}
"""Optimizer steps of the whole stage in Fan, Stock et al., shared equally by the three groups."""


def plan(
    model: nn.Module,
    *,
    p: float = 0.0,
    blocks: str = "quant-noise",
    lr: float = 1e-3,
    dtype: torch.dtype = torch.float16,
) -> Plan:
    """Codebooks with learned centroids for all matrices and kernels.

    Args:
        model: any module.
        p: train with Quant-Noise until a layer is placed: this share of its blocks is dropped.
        blocks: ``"quant-noise"``: as in :func:`dither.recipes.quant_noise.block`; ``"small"`` or
            ``"large"``: Stock et al.'s for ResNets: 9 or 18 for 3x3, 4 for the classifier, whose
            codebook has 2,048 centroids, and 4 for 1x1. Where most kernels are 1x1, as in
            ResNet-50, the classifier has 1,024 and large blocks of 1x1 are 8. The first layer stays
            as it is.
        lr: learning rate of the centroids, for Adam.
        dtype: of the centroids; ``torch.int8`` as in Fan, Stock et al., table 1, last row.

    Raises:
        SpecError: unknown blocks.
    """
    if blocks not in {"quant-noise", "small", "large"}:
        raise SpecError(f"blocks are quant-noise, small or large, not {blocks!r}")
    first, last = layers(model)[0].name, layers(model)[-1].name
    kernels = [layer.kernel == 1 for layer in layers(model) if layer.weight.ndim > 2]
    is_deep = 2 * sum(kernels) > len(kernels)

    def choose(layer: Layer) -> ProductCodes | None:
        fmt = product(layer)
        if blocks != "quant-noise":
            if layer.name == first:
                return None
            points = 256 if layer.name != last else 1024 if is_deep else 2048
            fmt = product(layer, _resnet_block(layer, blocks, is_deep=is_deep), points)
        if fmt is None:
            return None
        fmt = replace(fmt, dtype=dtype)
        return ProductCodes(fmt, QuantNoise(fmt, p, kind="proxy") if p else None, lr=lr)

    return plan_of(model, choose)


def recipe(
    model: nn.Module,
    *,
    steps: int,
    start: int = 0,
    p: float = 0.0,
    stages: str | Sequence[str | Sequence[str]] = "transformer",
    blocks: str | Plan | None = None,
    data: Data | Iterable[Any] | None = None,
    lr: float = 1e-3,
) -> Recipe:
    """The :func:`plan`, and what places group after group.

    With ``stages="layers"``, layers are placed in the first half of the steps, while batch norms
    stand still; in the second half all centroids and the norms train (Stock et al.: ResNet-18 has
    50,000 and 90,000).

    Fan, Stock et al. make a new optimizer for each group; Adam's averages of centroids begin when
    these are placed, which serves the same end.

    Args:
        model: any module.
        steps: optimizer steps in all.
        start: of these, before the first group is placed: training with Quant-Noise.
        p: share of blocks that Quant-Noise drops until then.
        stages: ``"transformer"``, or ``"layers"`` as in Stock et al., or anything that
            :class:`~dither.train.IterativePQ` takes.
        blocks: see :func:`plan`; by default ``"small"`` for stages by layers, and else
            ``"quant-noise"``. Or a plan, for which ``p`` and ``lr`` do not count.
        data: batches for the error of the outputs; without, that of the weights is minimised.
        lr: learning rate of the centroids, for Adam.

    Raises:
        SpecError: no step is left after ``start``.
    """
    if not 0 <= start < steps:
        raise SpecError(f"start={start} leaves no step of {steps} for placing layers")
    usual = "small" if stages == "layers" else "quant-noise"
    rules = blocks or usual
    if isinstance(rules, str):
        rules = plan(model, p=p, blocks=rules, lr=lr)
    placed = [name for name, spec in rules.resolve(model).items() if isinstance(spec, ProductCodes)]
    groups = len(IterativePQ(1, stages).groups(placed))
    parts = 2 * groups if stages == "layers" else groups
    schedule = IterativePQ(max(1, (steps - start) // parts), stages, start, data)
    still = (StillNorms(schedule.last(placed)),) if stages == "layers" else ()
    return Recipe(rules, schedules=(schedule, *still), steps=steps)


def size_mib(model: nn.Module, rules: Plan) -> float:
    """The papers' size in MiB (2**20 bytes): codes, float16 centroids, and float32 for the rest.

    Without entropy coding: files are smaller. Count before attaching, which adds parameters.
    """
    quantized = []
    for layer in layers(model):
        spec = rules.find(layer.name)
        fmt = spec.format if isinstance(spec, ProductCodes | QuantNoise) else None
        if isinstance(fmt, Product):
            quantized.append((layer.weight.numel(), fmt.block, fmt.points))
    everything = sum(parameter.numel() for parameter in model.parameters())
    rest = everything - sum(numel for numel, _, _ in quantized)
    return published_nbytes(quantized, rest) / 2**20


def _resnet_block(layer: Layer, blocks: str, *, is_deep: bool) -> int:
    if layer.kernel > 1:
        return layer.kernel * (2 if blocks == "large" else 1)
    is_pointwise = layer.weight.ndim > 2
    return 8 if is_pointwise and is_deep and blocks == "large" else min(4, block(layer))
