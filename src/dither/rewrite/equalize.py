"""Cross-layer equalization and absorption of high biases (Nagel et al. 2019, arXiv 1906.04721)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dither.core import SpecError
from dither.disk import touched
from dither.rewrite.channels import (
    Layer,
    bias_of,
    by_input,
    by_output,
    free_pairs,
    layer,
    output_channels,
    ranges,
    responses,
    scale,
)
from dither.rewrite.fold import Channels
from dither.rewrite.graph import Graph

_TOLERANCE = 1e-4


def chains(model: nn.Module) -> list[tuple[str, str]]:
    """Names of layers with nothing between but positively homogeneous functions, such as ReLU.

    Fold batch norms first. ReLU6 is not homogeneous; the paper puts ReLU in its place, which
    changes the function.

    Raises:
        SpecError: torch.fx cannot trace the model.
    """
    return Graph(model).pairs(Layer, Layer, between=True)


def replace_relu6(model: nn.Module) -> list[str]:
    """Put ``nn.ReLU`` in the place of every ``nn.ReLU6``, in place, as equalization needs it.

    The function changes where values are above 6, which is to be measured: MobileNetV2 keeps its
    accuracy (Nagel et al. 2019, table 1), EfficientNet-lite0 does not.

    Returns:
        Names of the modules that were changed.
    """
    names = [name for name, module in model.named_modules() if type(module) is nn.ReLU6]
    for name in names:
        path, _, local = name.rpartition(".")
        parent = model.get_submodule(path)
        setattr(parent, local, nn.ReLU().train(parent.training))
    return names


def equalize(
    model: nn.Module,
    pairs: Iterable[tuple[str, str]] | None = None,
    *,
    iterations: int = 20,
) -> dict[str, Tensor]:
    """Give the channels between layers like ranges on both sides, in place.

    Output channel ``i`` of the first layer is divided by ``s``, input channel ``i`` of the second
    multiplied: ``s = sqrt(r1 r2) / r2``, with ``r`` the greatest magnitudes. Pairs take turns until
    nothing changes, so that chains and depthwise triples come to rest too. The function stays what
    it was, but for rounding, if what lies between is positively homogeneous.

    Args:
        model: is changed, but for layers whose weights are parametrized, hooked or tied: these are
            named in a warning.
        pairs: names of layers that follow each other; None finds them, see :func:`chains`.
        iterations: rounds over all pairs, at most.

    Returns:
        By the name of the first layer, what its outputs were multiplied by, ``(channels,)``.

    Raises:
        SpecError: a pair does not fit, or torch.fx cannot trace the model.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> _ = equalize(model)
    >>> bool(torch.allclose(model[0].weight.abs().amax(1), model[2].weight.abs().amax(0)))
    True
    """
    found = free_pairs(model, chains(model) if pairs is None else pairs)
    total: dict[str, Tensor] = {}
    with torch.no_grad():
        for _ in range(iterations):
            change = 0.0
            for first, second in found:
                factors = _equalize(layer(model, first), layer(model, second))
                known = total.get(first)
                total[first] = factors if known is None else known * factors
                change = max(change, float(factors.log().abs().max()))
            if change < _TOLERANCE:
                break
    return total


def _equalize(first: Layer, second: Layer) -> Tensor:
    """Balance one pair; returns what the outputs of the first were multiplied by."""
    touched(first.weight)
    touched(second.weight)
    before, after = by_output(first), by_input(second, output_channels(first))
    one, other = ranges(before).double(), ranges(after).double()
    factors = torch.sqrt(other / one)  # 1 / s
    # A channel that is zero on one side stays: nothing can be balanced.
    factors = torch.where((one > 0) & (other > 0), factors, 1.0)
    scale(before, factors)
    scale(after, 1 / factors)
    if first.bias is not None:
        first.bias.data.mul_(factors.to(first.bias.dtype))
    return factors.to(first.weight.dtype)


def absorb_biases(
    model: nn.Module,
    channels: Mapping[str, Channels],
    pairs: Iterable[tuple[str, str]] | None = None,
) -> dict[str, Tensor]:
    """Move high biases through a ReLU into the next layer, in place.

    ``c = max(0, mean - 3 deviation)`` leaves the first layer's bias, and the second layer's output
    for a constant ``c`` goes to its bias. Exact for inputs of the ReLU that are at least ``c``
    (99.865 % of a normal distribution's), but at borders that the second layer pads with zeros.
    After :func:`equalize`, give ``channels[name].scaled(factors)``.

    Args:
        model: is changed.
        channels: what is known of outputs: from :func:`fold_batch_norm`.
        pairs: names of layers with a ReLU between; None finds them, see :func:`chains`.

    Returns:
        By the name of the first layer, ``c``, ``(channels,)``.

    Raises:
        SpecError: a pair does not fit, or torch.fx cannot trace the model.
    """
    found = free_pairs(model, chains(model) if pairs is None else pairs)
    absorbed = {}
    with torch.no_grad():
        for name, next_name in found:
            if name not in channels:
                continue
            first, second = layer(model, name), layer(model, next_name)
            known = channels[name]
            if len(known.mean) != output_channels(first):
                raise SpecError(f"{name!r} has {output_channels(first)} channels, not those given")
            excess = (known.mean - 3 * known.deviation).clamp(min=0)
            bias = bias_of(first)
            bias.sub_(excess.to(bias.dtype))
            behind = bias_of(second)
            behind.add_(responses(second, _spread(second, excess)).to(behind.dtype))
            absorbed[name] = excess
    return absorbed


def _spread(module: Layer, inputs: Tensor) -> Tensor:
    """Inputs by channel, refused where they do not fit."""
    by_input(module, len(inputs))
    return inputs
