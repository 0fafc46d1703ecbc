"""What a joint search decides of: kernels of layers, in the order of their importance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dither.core import SpecError
from dither.data import Data
from dither.model import Tensors, evaluating
from dither.rewrite.channels import ConvTransposed, Layer, why_fixed
from dither.rewrite.graph import Graph
from dither.search.predict import can_quantize

FEATURES = 8
"""Numbers of :attr:`Kernels.features`."""


@dataclass(frozen=True)
class Kernels:
    """One weight, whose kernels (first axis) are told apart.

    Attributes:
        name: of the weight.
        order: of kernels, the most important first.
        norms: how important they are, in that order, of 1 at most.
        features: what is known of the layer, each about 0 to 1: its place, inputs, outputs, the
            kernel's size, the stride, the side of its input, its share of all weights and
            of all multiplications.
        macs: multiplications for one sample; 0 where nobody has looked.
        followers: vectors that have one number for each kernel, and go with it: the layer's bias,
            and weight and bias of the batch norm behind it.
        can_prune: whether kernels may be taken away.
    """

    name: str
    order: tuple[int, ...]
    norms: tuple[float, ...]
    features: tuple[float, ...]
    macs: int
    followers: tuple[str, ...]
    can_prune: bool

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.order)


def kernels_of(
    model: nn.Module, tensors: Tensors, power: float, data: Data | None = None
) -> tuple[Kernels, ...]:
    """All weights of two axes or more that can be rounded, in the order of the model.

    The last of them is never pruned: its outputs are the model's.

    Args:
        model: is run on one batch, if there are data.
        tensors: of it.
        power: of the norm that tells how important a kernel is: 1 or 2.
        data: a batch tells how large inputs are, and how often a weight is used.

    Raises:
        SpecError: the model has no such weight.
    """
    modules = {f"{name}.weight": module for name, module in model.named_modules()}
    names = [
        name
        for name, _ in model.named_parameters()
        if (value := tensors.values.get(name)) is not None
        and value.ndim > 1
        and can_quantize(value)
    ]
    if not names:
        raise SpecError("the model has no matrix or kernel that could be rounded")
    sides, uses = _seen(model, data)
    norms = _norms_behind(model)
    macs = {n: tensors.values[n].numel() * uses.get(n.removesuffix(".weight"), 0) for n in names}
    everything = (sum(tensors.values[n].numel() for n in names), max(1, sum(macs.values())))
    found = []
    for place, name in enumerate(names):
        value, module = tensors.values[name], modules.get(name)
        path = name.removesuffix(".weight")
        shares = (value.numel() / everything[0], macs[name] / everything[1])
        features = (place / len(names), *_shape(value, module, sides.get(path, 1)), *shares)
        importance = value.detach().float().cpu().flatten(1).norm(power, dim=1)
        is_plain = isinstance(module, Layer) and not isinstance(module, ConvTransposed)
        free = is_plain and place < len(names) - 1 and not why_fixed(model, path)
        followers = [f"{path}.bias"] + [f"{norms.get(path)}.{end}" for end in ("weight", "bias")]
        order = tuple(importance.argsort(descending=True, stable=True).tolist())
        largest = max(float(importance.max()), 1e-12)
        ranked = tuple(float(importance[n]) / largest for n in order)
        kept = tuple(n for n in followers if free and n in tensors.values)
        found.append(Kernels(name, order, ranked, features, macs[name], kept, free))
    return tuple(found)


def _shape(value: Tensor, module: nn.Module | None, side: int) -> tuple[float, ...]:
    """Inputs, outputs, kernel, stride and side of the input, on scales of 0 to about 1."""
    outputs, inputs = value.shape[:2]
    kernel = math.prod(value.shape[2:])
    stride = getattr(module, "stride", 1)
    stride = stride[0] if isinstance(stride, tuple) else stride
    sizes = (inputs, outputs, kernel, float(stride), side)
    return tuple(
        math.log2(max(1.0, size)) / scale for size, scale in zip(sizes, _SCALES, strict=True)
    )


_SCALES = (12, 12, 6, 3, 10)
"""Logarithms of the largest that are usual."""


def _norms_behind(model: nn.Module) -> Mapping[str, str]:
    """By layer the batch norm that alone reads it; none where torch.fx cannot trace the model."""
    try:
        return dict(Graph(model).pairs(Layer, _BatchNorm))
    except SpecError:
        return {}


def _seen(model: nn.Module, data: Data | None) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """By layer the side of its input, and how often its weight is used for one sample."""
    sides: dict[str, int] = {}
    uses: dict[str, int] = {}

    def look(name: str, module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        channels = made.shape[-1] if isinstance(module, nn.Linear) else made.shape[1]
        if given and not isinstance(module, nn.Linear):
            sides[name] = given[0].shape[-1]
        uses[name] = uses.get(name, 0) + max(1, made[:1].numel() // max(1, channels))

    if data is None:
        return sides, uses
    handles = [
        module.register_forward_hook(partial(look, name))
        for name, module in model.named_modules()
        if isinstance(module, Layer)
    ]
    try:
        with evaluating(model), torch.no_grad():
            data.output(model, next(iter(data)))
    finally:
        for handle in handles:
            handle.remove()
    return sides, uses
