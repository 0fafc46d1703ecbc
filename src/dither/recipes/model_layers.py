"""Which layers a recipe means: kernels and matrices in the model's order, tied ones as one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from dither.core import SpecError
from dither.train.plan import Plan, Spec, literal

_ATTENTION = re.compile(r"attn|attention|in_proj|out_proj|\b[qkv]_proj|query|key|value|qkv")


@dataclass(frozen=True)
class Layer:
    """A weight of two or more axes, and the module that holds it.

    Attributes:
        names: of the weight; a tied one has several.
        weight: the parameter.
        module: what holds it under its first name.
    """

    names: tuple[str, ...]
    weight: Tensor
    module: nn.Module

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    @property
    def is_embedding(self) -> bool:
        """Whether its rows are looked up."""
        return isinstance(self.module, nn.Embedding | nn.EmbeddingBag)

    @property
    def is_attention(self) -> bool:
        """Whether its name says that it belongs to attention."""
        return _ATTENTION.search(self.name.lower()) is not None

    @property
    def kernel(self) -> int:
        """Weights of one convolution kernel: 9 for 3x3, 1 for a matrix."""
        return self.weight[:1, :1].numel()


def layers(model: nn.Module) -> list[Layer]:
    """Every floating-point parameter of two or more axes, in the model's order."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim > 1 and parameter.is_floating_point():
            names.setdefault(id(parameter), []).append(name)
    return [_layer(model, tuple(own)) for own in names.values()]


def _layer(model: nn.Module, names: tuple[str, ...]) -> Layer:
    module = model.get_submodule(names[0].rpartition(".")[0])
    return Layer(names, model.get_parameter(names[0]), module)


def plan_of(model: nn.Module, choose: Callable[[Layer], Spec | None]) -> Plan:
    """The plan that gives each layer what ``choose`` says; the rest is stored as it is.

    Raises:
        SpecError: nothing was chosen.
    """
    found = {name: spec for layer in layers(model) for name, spec in _rules(layer, choose)}
    if not found:
        raise SpecError("this recipe finds no weight in the model that it would quantize")
    return Plan(found)


def _rules(layer: Layer, choose: Callable[[Layer], Spec | None]) -> Iterator[tuple[str, Spec]]:
    spec = choose(layer)
    if spec is not None:
        yield from ((literal(name), spec) for name in layer.names)
