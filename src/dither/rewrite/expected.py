"""What batch norms say about everything that passes through a network, without data.

Nagel et al. 2019 (arXiv 1906.04721, section 4.2) and 2021 (arXiv 2106.08295, sections 3.1 and 3.3):
outputs of a batch norm are taken for normal, with its bias as mean and its weight as deviation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from dither.core import SpecError
from dither.rewrite.bias import correct_bias
from dither.rewrite.channels import (
    Layer,
    by_input,
    free_pairs,
    layer,
    output_channels,
    responses,
)
from dither.rewrite.fold import Channels
from dither.rewrite.graph import Graph

DEVIATIONS = 6.0
"""Ranges reach as far on both sides of the mean (alpha of the white paper)."""

_NODES, _REACH = 4001, 8.0

_ELEMENTWISE: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.ELU, nn.CELU, nn.SELU, nn.Softplus),
    *(nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh),
)
_ELEMENTWISE_FUNCTIONS: set[Any] = {
    *(torch.relu, functional.relu, functional.relu6, functional.leaky_relu, functional.hardtanh),
    *(functional.silu, functional.gelu, functional.hardswish, functional.hardsigmoid),
    *(torch.sigmoid, torch.tanh, functional.elu, functional.mish, torch.clamp),
}
_ELEMENTWISE_METHODS = {"relu", "relu_", "sigmoid", "tanh", "clamp"}
_SAME: tuple[type[nn.Module], ...] = (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout2d)
_SAME_CALLS: set[Any] = {torch.flatten, functional.dropout, "flatten", "contiguous"}
_AVERAGES: tuple[type[nn.Module], ...] = (
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
)
_GREATEST: tuple[type[nn.Module], ...] = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_SUMS: set[Any] = {operator.add, operator.iadd, torch.add, "add", "add_"}


@dataclass(frozen=True, eq=False)
class Passing:
    """What is known of a tensor in each channel; None where nothing is known.

    Attributes:
        mean: ``(channels,)``, float64.
        deviation: ``(channels,)``.
        low: ``(channels,)``, the least value that is expected.
        high: ``(channels,)``, the greatest.
    """

    mean: Tensor | None = None
    deviation: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None

    @property
    def knows(self) -> bool:
        """Whether anything is known."""
        return self.mean is not None or self.low is not None

    @classmethod
    def normal(cls, channels: Channels, deviations: float = DEVIATIONS) -> Passing:
        """Of a normal distribution: ends are so many deviations from the mean."""
        mean, deviation = channels.mean.double(), channels.deviation.double()
        reach = deviations * deviation
        return cls(mean, deviation, mean - reach, mean + reach)

    def through(self, function: Callable[[Tensor], Tensor]) -> Passing:
        """After a function of single values, of what is taken for normal; by quadrature."""
        mean, deviation = None, None
        if self.mean is not None and self.deviation is not None:
            at = torch.linspace(-_REACH, _REACH, _NODES, dtype=torch.float64)[:, None]
            shares = torch.exp(-at.square() / 2)
            shares /= shares.sum()
            values = function(self.mean.cpu() + self.deviation.cpu() * at)
            centre = (shares * values).sum(0)
            mean = centre.to(self.mean.device)
            variance = (shares * (values - centre).square()).sum(0)
            deviation = variance.sqrt().to(self.mean.device)
        low, high = None, None
        if self.low is not None and self.high is not None:
            part = torch.linspace(0, 1, _NODES, dtype=torch.float64, device=self.low.device)
            values = function(self.low + (self.high - self.low) * part[:, None])
            low, high = values.amin(0), values.amax(0)
        return Passing(mean, deviation, low, high)

    def plus(self, other: Passing, deviations: float = DEVIATIONS) -> Passing:
        """The sum with something that is independent of it."""
        mean = _sum(self.mean, other.mean)
        variance = _sum(_square(self.deviation), _square(other.deviation))
        low, high = _sum(self.low, other.low), _sum(self.high, other.high)
        deviation = None if variance is None else variance.sqrt()
        if mean is not None and deviation is not None and low is not None and high is not None:
            # Both extremes at once are as rare as the square of one.
            low = torch.maximum(low, mean - deviations * deviation)
            high = torch.minimum(high, mean + deviations * deviation)
        return Passing(mean, deviation, low, high)


def expected_inputs(
    model: nn.Module,
    channels: Mapping[str, Channels] | None = None,
    *,
    inputs: Channels | None = None,
    deviations: float = DEVIATIONS,
) -> dict[str, Passing]:
    """What goes into each linear layer and convolution, as far as batch norms tell, without data.

    What a norm gives is taken for normal. Known from there: means, deviations and ends behind
    activation functions (by quadrature; :func:`expected_input` is the closed form for ReLU and
    ReLU6), of sums (of independent parts), of averages (no deviation), of maxima (ends alone); and
    means behind layers without a norm, padding apart.

    Args:
        model: is left as it was; torch.fx must be able to trace it.
        channels: of layers whose norm has been folded, from :func:`fold_batch_norm`. After
            :func:`equalize` give them ``scaled``, after :func:`absorb_biases` without what was
            absorbed.
        inputs: of the model's first argument.
        deviations: ends are so far from the mean of what a norm gives.

    Returns:
        By the name of the layer; layers of which nothing is known are missing, as are those that
        are called several times.

    Raises:
        SpecError: torch.fx cannot trace the model, or channels do not fit.
    """
    graph, known = Graph(model), dict(channels or {})
    state: dict[fx.Node, Passing] = {}
    found: dict[str, Passing] = {}
    with torch.no_grad():
        for node in graph.nodes:
            given = [state.get(a, Passing()) for a in node.args if isinstance(a, fx.Node)]
            if node.op == "placeholder":
                if inputs is not None and not state:
                    state[node] = Passing.normal(inputs, deviations)
            elif node.op == "call_module" and given:
                name, module = str(node.target), graph.module(node)
                if isinstance(module, Layer):
                    passing = given[0] if _fits(module, given[0]) else Passing()
                    if graph.is_called_once(node) and passing.knows:
                        found[name] = passing
                    state[node] = _behind(name, module, passing, known)
                elif isinstance(module, _BatchNorm):
                    known[name] = _said(module)
                else:
                    state[node] = _module(module, given[0])
                if name in known:
                    state[node] = Passing.normal(known[name], deviations)
            elif node.op in {"call_function", "call_method"} and given:
                state[node] = _call(node, given, deviations)
    return found


def correct_biases_by_norms(
    model: nn.Module, original: nn.Module, expected: Mapping[str, Passing]
) -> dict[str, Tensor]:
    """Give every layer's outputs their original means, in place, from batch norms alone.

    The analytic correction of Nagel et al. 2019: ``bias -= dW E[x]``. What goes into a layer has
    its original mean once those before are corrected, so that all are corrected at once. As exact
    as what norms say; :func:`correct_biases` measures. Do not correct what AdaRound encoded.

    Args:
        model: with encoded weights; is changed, but for layers that are parametrized, hooked or
            tied: these are named in a warning.
        original: the same layers before.
        expected: from :func:`expected_inputs`, of either.

    Returns:
        By name, what was subtracted, ``(outputs,)``; layers whose inputs have no known mean are
        missing.

    Raises:
        SpecError: a layer is missing, or has another shape.
    """
    names = [(name, "") for name, passing in expected.items() if passing.mean is not None]
    corrected = {}
    for name, _ in free_pairs(model, names, layers=1):
        mean = expected[name].mean
        assert mean is not None  # noqa: S101 - for mypy
        corrected[name] = correct_bias(layer(model, name), layer(original, name).weight, mean)
    return corrected


def _said(norm: _BatchNorm) -> Channels:
    """Mean and deviation of a norm's outputs."""
    if norm.affine:
        return Channels(norm.bias.detach(), norm.weight.detach().abs())
    zeros = torch.zeros(norm.num_features)
    return Channels(zeros, zeros + 1)


def _fits(module: Layer, passing: Passing) -> bool:
    """Whether a layer has inputs for these channels."""
    vector = passing.mean if passing.mean is not None else passing.low
    if vector is None:
        return False
    try:
        by_input(module, len(vector))
    except SpecError:
        return False  # the channels are on another axis, or were cut and joined
    return True


def _behind(name: str, module: Layer, passing: Passing, known: Mapping[str, Channels]) -> Passing:
    """The outputs of a layer without a norm: their means, padding apart."""
    if name in known:
        if len(known[name].mean) != output_channels(module):
            raise SpecError(f"{name!r} has {output_channels(module)} channels, not those given")
        return Passing()
    if passing.mean is None:
        return Passing()
    mean = responses(module, passing.mean)
    return Passing(mean if module.bias is None else mean + module.bias.detach().double())


def _module(module: nn.Module, passing: Passing) -> Passing:
    if isinstance(module, _ELEMENTWISE):
        return passing.through(module)
    if isinstance(module, _SAME):
        return passing
    if isinstance(module, _AVERAGES) and not getattr(module, "padding", 0):
        return replace(passing, deviation=None)
    if isinstance(module, _GREATEST):
        return Passing(low=passing.low, high=passing.high)
    return Passing()


def _call(node: fx.Node, given: list[Passing], deviations: float) -> Passing:
    """What a function or a method gives."""
    target, first = node.target, given[0]
    if target in _SUMS and len(given) == 2 and not node.kwargs:
        return first.plus(given[1], deviations)
    if len(given) > 1 or any(isinstance(v, fx.Node) for v in node.kwargs.values()):
        return Passing()
    if target in _SAME_CALLS:
        return first
    if target in {"mean", torch.mean} and _is_over_places(node):
        return replace(first, deviation=None)
    if target is functional.adaptive_avg_pool2d:
        return replace(first, deviation=None)
    if target in _ELEMENTWISE_FUNCTIONS or target in _ELEMENTWISE_METHODS:
        return first.through(_function(node))
    return Passing()


def _is_over_places(node: fx.Node) -> bool:
    """Whether a mean is over the two axes of images."""
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(axes, tuple | list) and set(axes) in ({2, 3}, {-1, -2})


def _function(node: fx.Node) -> Callable[[Tensor], Tensor]:
    """A call as a function of the tensor that it is about."""

    def call(values: Tensor) -> Tensor:
        rest = node.args[1:]
        if isinstance(node.target, str):
            found = getattr(values, node.target)(*rest, **node.kwargs)
        else:
            found = node.target(values, *rest, **node.kwargs)
        assert isinstance(found, Tensor)  # noqa: S101 - the tables hold no others
        return found

    return call


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None or one.shape != other.shape:
        return None
    return one + other


def _square(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.square()
