"""Batch norm's running statistics, moved into its weight and bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dither.core import SpecError


def norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms of a model that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def absorbed(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias that do in evaluation, with mean 0 and variance 1, what the norm does now.

    ``weight * sqrt((1 + eps) / (var + eps))`` and ``bias - mean * weight / sqrt(var + eps)``: four
    numbers for each channel become two. Training on with them starts from another function, because
    it takes the statistics of its batches instead.

    Args:
        norm: with weight, bias and running statistics, ``(channels,)`` each.

    >>> norm = nn.BatchNorm1d(2).eval()
    >>> _ = norm.running_mean.fill_(3), norm.running_var.fill_(4)
    >>> weight, bias = absorbed(norm)
    >>> bool((weight[0] * 5 + bias[0] - norm(torch.full((1, 2), 5.0))[0, 0]).abs() < 1e-4)
    True
    """
    if norm.running_mean is None or not norm.affine:
        raise SpecError("absorbed() needs a batch norm with weight, bias and running statistics")
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    with torch.no_grad():
        scale = _whole(norm.weight).double() / (variance.double() + norm.eps).sqrt()
        weight = scale * (1 + norm.eps) ** 0.5
        bias = _whole(norm.bias).double() - mean.double() * scale
    return weight.to(norm.weight.dtype), bias.to(norm.bias.dtype)


def _whole(parameter: Tensor) -> Tensor:
    """A parameter as buffers are, of which FSDP2 shards none."""
    gather = getattr(parameter, "full_tensor", None)
    found: Tensor = parameter if gather is None else gather()
    return found
