"""Bias correction: encoded weights shift the mean of outputs, and biases can take it back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dither.core import SpecError
from dither.data import Data
from dither.model import evaluating
from dither.rewrite.channels import Layer, bias_of, layer, responses
from dither.rewrite.fold import Channels


def expected_input(channels: Channels, ceiling: float | None = None) -> Tensor:
    """Mean of a ReLU's outputs where its inputs are normal, ``(channels,)``.

    ``deviation * pdf(-mean / deviation) + mean * (1 - cdf(-mean / deviation))``.

    Args:
        channels: what is known of the inputs.
        ceiling: where outputs are clipped: 6 for a ReLU6, which is ``relu(x) - relu(x - 6)``.

    >>> expected_input(Channels(torch.zeros(1), torch.ones(1)))
    tensor([0.3989])
    """
    if ceiling is not None:
        above = Channels(channels.mean - ceiling, channels.deviation)
        return expected_input(channels) - expected_input(above)
    mean, deviation = channels.mean.double(), channels.deviation.double()
    ratio = mean / deviation.clamp(min=1e-30)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    share = (1 + torch.erf(ratio / math.sqrt(2))) / 2
    return (deviation * density + mean * share).to(channels.mean.dtype)


def correct_bias(module: Layer, original: Tensor, mean: Tensor) -> Tensor:
    """Take back what an encoded weight adds to the mean output, in place; no data is needed.

    Args:
        module: holds the encoded weight; a bias is registered where there is none.
        original: the weight before.
        mean: of each input channel, ``(channels,)``: from :func:`expected_input`, or measured.

    Returns:
        What was subtracted from the bias, ``(outputs,)``: ``dW E[x]``, borders apart.

    Raises:
        SpecError: the original weight has another shape.
    """
    if original.shape != module.weight.shape:
        raise SpecError(
            f"the original weight is {tuple(original.shape)}, not {tuple(module.weight.shape)}"
        )
    with torch.no_grad():
        error = module.weight.detach().double() - original.detach().double()
        shift = responses(module, mean, error)
        bias = bias_of(module)
        bias.sub_(shift.to(bias.dtype))
    return shift.to(module.weight.dtype)


def correct_biases(
    model: nn.Module,
    original: nn.Module,
    data: Data | Iterable[Any],
    *,
    names: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """Give every layer's outputs their original means, from data, in place.

    Layer by layer in the order of use, each behind those that are corrected already: the bias
    loses ``E[y'] - E[y]``. One pass over the data for each layer, and one of the original. Layers
    without a bias get one. Do not correct what AdaRound encoded (Nagel et al. 2021).

    Args:
        model: with encoded weights; is changed. Batch norms should be folded.
        original: the same layers before.
        data: a loader of batches, or :class:`~dither.Data`; kept in memory.
        names: of the layers, or all linear layers and convolutions.

    Returns:
        By name, what was subtracted, ``(outputs,)``.

    Raises:
        SpecError: a layer is missing, or the loader is empty.
    """
    samples = Data.of(data).held()
    wanted = None if names is None else list(names)
    if wanted is None:
        wanted = [name for name, module in original.named_modules() if isinstance(module, Layer)]
    for name in wanted:
        layer(model, name)
    means = _mean_outputs(original, samples, wanted)
    corrected = {}
    for name, mean in means.items():
        module = layer(model, name)
        shift = _mean_outputs(model, samples, [name])[name] - mean
        with torch.no_grad():
            bias = bias_of(module)
            bias.sub_(shift.to(bias.dtype))
        corrected[name] = shift.to(module.weight.dtype)
    return corrected


def _mean_outputs(model: nn.Module, samples: Data, names: list[str]) -> dict[str, Tensor]:
    """Mean outputs of layers, float64 ``(outputs,)``, in the order of their first use."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str, module: Layer) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            dims = 1 if isinstance(module, nn.Linear) else len(module.kernel_size) + 1
            rows = output.detach().movedim(-dims, -1).flatten(0, -2).double()
            sums[name] = sums.get(name, 0.0) + rows.sum(0)
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    handles = []
    try:
        for name in names:
            module = layer(model, name)
            handles.append(module.register_forward_hook(watch(name, module)))
        with evaluating(model), torch.no_grad():
            for batch in samples:
                samples.forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise SpecError("no layer was used: the names are of other layers")
    return {name: total / counts[name] for name, total in sums.items()}
