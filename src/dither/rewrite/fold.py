"""Batch norm, folded into the layer before it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dither.core import SpecError
from dither.rewrite.channels import (
    Layer,
    bias_of,
    by_output,
    free_pairs,
    layer,
    output_channels,
    scale,
)
from dither.rewrite.graph import Graph


@dataclass(frozen=True, eq=False)
class Channels:
    """What a folded batch norm said about a layer's outputs: about normal, in each channel.

    Attributes:
        mean: ``(channels,)``, the norm's bias.
        deviation: ``(channels,)``, the magnitude of its weight.
    """

    mean: Tensor
    deviation: Tensor

    def scaled(self, factors: Tensor) -> Channels:
        """The same of outputs times ``factors``."""
        return Channels(self.mean * factors, self.deviation * factors)


def fold_batch_norm(
    model: nn.Module, pairs: Iterable[tuple[str, str]] | None = None
) -> dict[str, Channels]:
    """Fold batch norms into the convolutions and linear layers before them, in place.

    In evaluation the model computes what it did, but for rounding; norms become ``nn.Identity``,
    and layers without a bias get one. A layer is folded where the norm alone reads its output.

    Args:
        model: is changed, but for layers whose weights are parametrized, hooked or tied: these are
            named in a warning.
        pairs: names of layers and of their norms; None finds them with torch.fx.

    Returns:
        By the name of the layer, what the norm said: for :func:`absorb_biases` and
        :func:`expected_input`.

    Raises:
        SpecError: torch.fx cannot trace the model, or a pair does not fit.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).eval()
    >>> list(fold_batch_norm(model)), model[1]
    (['0'], Identity())
    """
    found = Graph(model).pairs(Layer, _BatchNorm) if pairs is None else list(pairs)
    found = free_pairs(model, found, layers=1)
    folded = {}
    for name, norm_name in found:
        module, norm = layer(model, name), model.get_submodule(norm_name)
        if not isinstance(norm, _BatchNorm):
            raise SpecError(f"{norm_name!r} is a {type(norm).__name__}; give a batch norm")
        if norm.running_mean is None or norm.running_var is None:
            if pairs is None:
                continue  # it takes the statistics of its batch
            raise SpecError(f"{norm_name!r} keeps no running statistics, so that it cannot fold")
        if norm.num_features != output_channels(module):
            raise SpecError(f"{norm_name!r} does not have the channels of {name!r}")
        folded[name] = _fold(module, norm)
        path, _, local = norm_name.rpartition(".")
        setattr(model.get_submodule(path), local, nn.Identity().train(norm.training))
    return folded


def _fold(module: Layer, norm: _BatchNorm) -> Channels:
    with torch.no_grad():
        mean, variance = (
            norm.get_buffer(name).double() for name in ("running_mean", "running_var")
        )
        gain = norm.weight.double() if norm.affine else torch.ones_like(mean)
        shift = norm.bias.double() if norm.affine else torch.zeros_like(mean)
        factors = gain / (variance + norm.eps).sqrt()
        bias = bias_of(module)
        bias.copy_(shift + (bias.double() - mean) * factors)
        wide = module.weight.data
        module.weight.data = wide.double()
        scale(by_output(module), factors)
        wide.copy_(module.weight.data)
        module.weight.data = wide
    return Channels(shift.float(), gain.abs().float())
