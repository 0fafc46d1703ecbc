"""What may be odd in a model that is built: its tensors, its names, its modules."""

from __future__ import annotations

import threading
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

DEAD = (5.6e-45, 1e-30, 1e-10, 1e-8)
"""Variances of channels that say nothing."""


class Bare(nn.Module):
    """Holds a parameter."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        grad = values.is_floating_point() or values.is_complex()
        self.values_ = nn.Parameter(values, requires_grad=grad)


class WithExtraState(nn.Module):
    """Keeps what is no tensor in its state dict."""

    def get_extra_state(self) -> Any:  # noqa: ANN401 - as torch has it
        return {"steps": 3, "words": ["a"]}

    def set_extra_state(self, state: Any) -> None:  # noqa: ANN401 - as torch has it
        pass


def _layers(model: nn.Module) -> list[nn.Module]:
    """Modules with a plain weight matrix of their own."""
    found = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [m for m in model.modules() if type(m) in found and "weight" in dict(_own(m))]


def _own(module: nn.Module) -> list[tuple[str, Any]]:
    return list(module.named_parameters(recurse=False))


def _norms(model: nn.Module) -> list[Any]:
    found = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return [m for m in model.modules() if isinstance(m, found)]


def dead_channel(chance: Random, model: nn.Module) -> None:
    for norm in _norms(model):
        norm.running_var[chance.randrange(len(norm.running_var))] = chance.choice(DEAD)
        norm.running_mean.copy_(torch.randn(len(norm.running_mean)))


def zero_norm(chance: Random, model: nn.Module) -> None:
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1 and chance.random() < 0.7:
            nn.init.zeros_(weight)
            bias = getattr(module, "bias", None)
            if bias is not None and chance.random() < 0.5:
                nn.init.zeros_(bias)


def zero_layer(chance: Random, model: nn.Module) -> None:
    if layers := _layers(model):
        layer = chance.choice(layers)
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def dead_relu(chance: Random, model: nn.Module) -> None:
    biased = [x for x in _layers(model) if isinstance(x.bias, Tensor)]
    if biased:
        nn.init.constant_(chance.choice(biased).bias, -100.0)  # type: ignore[arg-type]


def constant_row(chance: Random, model: nn.Module) -> None:
    if layers := _layers(model):
        weight: Any = chance.choice(layers).weight
        weight[0] = chance.choice([1e-30, 1e4, 1.0])


def odd_scale(chance: Random, model: nn.Module) -> None:
    for layer in _layers(model):
        weight: Any = layer.weight
        weight.mul_(chance.choice([1e-5, 1e-3, 1.0, 1e3]))


def infinite_buffers(_: Random, model: nn.Module) -> None:
    model.register_buffer("least", torch.tensor(torch.inf))
    model.register_buffer("most", torch.full((3,), -torch.inf))
    mask = torch.full((5, 5), -torch.inf).triu(1)
    model.register_buffer("mask", mask)
    model.register_buffer("vast", torch.tensor([1e300, 1.0], dtype=torch.float64))


def nan_buffer(chance: Random, model: nn.Module) -> None:
    shape = chance.choice([(), (4,), (6, 8)])
    values = torch.randn(shape)
    values.view(-1)[0] = torch.nan
    model.register_buffer("unimportant", values)


def other_buffers(_: Random, model: nn.Module) -> None:
    model.register_buffer("counts", torch.randint(0, 1000, (20,)))
    model.register_buffer("flags", torch.rand(9) < 0.5)
    model.register_buffer("small", torch.randint(-128, 127, (5, 7), dtype=torch.int8))
    model.register_buffer("angles", torch.randn(3, 2, dtype=torch.complex64))
    model.register_buffer("tiny", torch.randn(4, 8).to(torch.float8_e4m3fn))
    model.register_buffer("kept_out", torch.randn(4), persistent=False)


def other_parameters(_: Random, model: nn.Module) -> None:
    model.add_module("whole", Bare(torch.randint(-8, 8, (6, 10))))
    model.add_module("phases", Bare(torch.randn(6, 10, dtype=torch.complex64)))
    model.add_module("long", Bare(torch.randn(8, 9, dtype=torch.float64)))
    model.add_module("short", Bare(torch.randn(8, 9, dtype=torch.bfloat16)))


def odd_shapes(_: Random, model: nn.Module) -> None:
    shapes: list[tuple[int, ...]] = [(0,), (3, 0), (0, 4, 2), (1,), (), (1, 1), (1, 1, 1, 1)]
    for number, shape in enumerate(shapes):
        model.add_module(f"shape{number}", Bare(torch.randn(shape)))
    model.add_module("thin", Bare(torch.randn(1, 200)))
    model.add_module("tall", Bare(torch.randn(200, 1)))
    model.add_module("deep", Bare(torch.randn(2, 1, 3, 1, 2, 2)))


def odd_strides(chance: Random, model: nn.Module) -> None:
    model.add_module("turned", Bare(torch.randn(12, 8).t()))
    model.add_module("sliced", Bare(torch.randn(16, 8)[::2, 1:5]))
    model.add_module("same", Bare(torch.randn(1, 6).expand(5, 6)))
    for layer in _layers(model):
        weight: Any = layer.weight
        if weight.ndim == 4 and chance.random() < 0.5:
            weight.data = weight.data.to(memory_format=torch.channels_last)


def overlapping(_: Random, model: nn.Module) -> None:
    store = torch.randn(60)
    model.add_module("head_part", Bare(store[:40].view(5, 8)))
    model.add_module("tail_part", Bare(store[20:].view(8, 5)))


def constants(_: Random, model: nn.Module) -> None:
    model.add_module("ones", Bare(torch.ones(6, 7)))
    model.add_module("zeros", Bare(torch.zeros(9, 5)))
    model.add_module("steps", Bare(torch.arange(30.0).view(5, 6)))
    model.add_module("signs", Bare(torch.randn(8, 8).sign()))
    model.add_module("denormal", Bare(torch.randn(4, 4) * 1e-42))
    model.add_module("huge", Bare(torch.randn(4, 6) * 1e37))


def odd_names(_: Random, model: nn.Module) -> None:
    for name in ("*", "a b", "ä", "[0]", "file", "x@in", "weight?", "_orig_mod"):
        model.add_module(name, Bare(torch.randn(3, 4)))


def tied(_: Random, model: nn.Module) -> None:
    layers: list[Any] = _layers(model)
    for a in layers:
        for b in layers:
            if a is not b and a.weight.shape == b.weight.shape and a.weight is not b.weight:
                b.weight = a.weight
                return


def shared_module(chance: Random, model: nn.Module) -> None:
    if layers := _layers(model):
        model.add_module("again", chance.choice(layers))


def old_weight_norm(chance: Random, model: nn.Module) -> None:
    if layers := _layers(model):
        nn.utils.weight_norm(chance.choice(layers))


def new_weight_norm(chance: Random, model: nn.Module) -> None:
    if layers := _layers(model):
        parametrizations.weight_norm(chance.choice(layers))


def spectral_norm(chance: Random, model: nn.Module) -> None:
    if layers := _layers(model):
        parametrizations.spectral_norm(chance.choice(layers))


def orthogonal(chance: Random, model: nn.Module) -> None:
    if layers := [x for x in _layers(model) if isinstance(x, nn.Linear)]:
        parametrizations.orthogonal(chance.choice(layers))


def pruned(chance: Random, model: nn.Module) -> None:
    if layers := _layers(model):
        prune.l1_unstructured(chance.choice(layers), "weight", 0.5)


def lock(chance: Random, model: nn.Module) -> None:
    layers = _layers(model) or [model]
    chance.choice(layers).lock = threading.Lock()  # type: ignore[assignment]


def generator(_: Random, model: nn.Module) -> None:
    model.noise = torch.Generator().manual_seed(0)  # type: ignore[assignment]


def extra_state(_: Random, model: nn.Module) -> None:
    model.add_module("more", WithExtraState())


def frozen(chance: Random, model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(chance.random() < 0.5 and parameter.requires_grad)


def none_parts(_: Random, model: nn.Module) -> None:
    model.register_parameter("absent", None)
    model.register_buffer("missing", None)
    model.register_module("nobody", None)


Oddity = Callable[[Random, nn.Module], None]

ODDITIES: tuple[Oddity, ...] = (
    dead_channel,
    zero_norm,
    zero_layer,
    dead_relu,
    constant_row,
    odd_scale,
    infinite_buffers,
    nan_buffer,
    other_buffers,
    other_parameters,
    odd_shapes,
    odd_strides,
    overlapping,
    constants,
    odd_names,
    tied,
    shared_module,
    old_weight_norm,
    new_weight_norm,
    spectral_norm,
    orthogonal,
    pruned,
    lock,
    generator,
    extra_state,
    frozen,
    none_parts,
)

WRAPPERS: tuple[Callable[[nn.Module], nn.Module], ...] = (nn.DataParallel, AveragedModel)
