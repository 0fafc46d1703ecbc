"""The channels of layers' weights: which numbers make an output, which read an input."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dither.core import SpecError
from dither.disk import Use

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTransposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Layer = nn.Linear | Conv | ConvTransposed

_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")


def why_fixed(model: nn.Module, name: str) -> str:
    """Why a layer's numbers cannot be changed without changing something else; empty if they can.

    A weight that a parametrization or a hook makes is made anew from others before each call, and
    what is tied is read elsewhere too.
    """
    module = layer(model, name)
    held = dict(module.named_parameters(recurse=False))
    for local in ("weight", "bias"):
        if local not in held and getattr(module, local) is not None:
            return f"its {local} is made by a parametrization or a hook"
    hooks = (hook for kind in _HOOKS for hook in vars(module)[f"_{kind}_hooks"].values())
    if not all(isinstance(hook, Use) for hook in hooks):
        return "it has hooks"
    others = [owner for owner in model.modules() if owner is not module]
    for owner in others:
        for value in [*owner.parameters(recurse=False), *owner.buffers(recurse=False)]:
            if any(_overlap(value, mine) for mine in held.values()):
                return "its weight or bias is tied to that of another layer"
    return ""


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors may share memory, in whatever shapes."""
    if one is other or not (one.numel() and other.numel()) or one.device != other.device:
        return one is other
    starts, ends = zip(*(_extent(tensor) for tensor in (one, other)), strict=True)
    return bool(max(starts) < min(ends))


def _extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def free_pairs(
    model: nn.Module, pairs: Iterable[tuple[str, str]], layers: int = 2, *, say: bool = True
) -> list[tuple[str, str]]:
    """Pairs of layers that can be changed, or whose first can; a warning names the others.

    Args:
        model: holds them.
        pairs: names.
        layers: 1 where the second of a pair is no layer.
        say: whether to warn.
    """
    found = list(pairs)
    names = dict.fromkeys(name for pair in found for name in pair[:layers])
    fixed = {name: why for name in names if (why := why_fixed(model, name))}
    if fixed and say:
        said = "; ".join(f"{name}: {why}" for name, why in fixed.items())
        warnings.warn(
            f"left as they are, since a change would change the function: {said}", stacklevel=3
        )
    return [pair for pair in found if not fixed.keys() & set(pair[:layers])]


def layer(model: nn.Module, name: str) -> Layer:
    """A linear layer or convolution by its name.

    Raises:
        SpecError: there is none of this name.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise SpecError(f"the model has no layer {name!r}") from error
    if not isinstance(module, Layer):
        raise SpecError(f"{name!r} is a {type(module).__name__}; give a Linear or a convolution")
    return module


def output_channels(module: Layer) -> int:
    """How many outputs a layer has."""
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def by_output(module: Layer) -> Tensor:
    """The weight as a view ``(a, x, b, y)``, whose outputs are ``(a, b)`` in order."""
    weight = module.weight.data
    if isinstance(module, ConvTransposed):
        groups = module.groups
        return weight.view(groups, len(weight) // groups, weight.shape[1], -1)
    return weight.view(len(weight), 1, 1, -1)


def by_input(module: Layer, channels: int) -> Tensor:
    """The weight as a view ``(a, x, b, y)``, whose inputs are ``(a, b)`` in order.

    Args:
        module: the layer.
        channels: of its input; a Linear behind a flattened image has a multiple of them.

    Raises:
        SpecError: that many channels do not fit.
    """
    weight = module.weight.data
    if isinstance(module, nn.Linear):
        if module.in_features % channels:
            raise SpecError(f"{channels} channels do not fit {module.in_features} inputs")
        return weight.view(1, len(weight), channels, -1)
    if module.in_channels != channels:
        raise SpecError(f"{channels} channels do not fit {module.in_channels} inputs")
    if isinstance(module, ConvTransposed):
        return weight.view(len(weight), 1, 1, -1)
    groups = module.groups
    return weight.view(groups, len(weight) // groups, weight.shape[1], -1)


def ranges(view: Tensor) -> Tensor:
    """The greatest magnitude of each channel, ``(channels,)``."""
    return view.abs().amax((1, 3)).flatten()


def scale(view: Tensor, factors: Tensor) -> None:
    """Multiply each channel by a factor, in place."""
    view.mul_(factors.to(view.dtype).reshape(view.shape[0], 1, view.shape[2], 1))


def responses(module: Layer, inputs: Tensor, weight: Tensor | None = None) -> Tensor:
    """Outputs to an input that is constant in each channel, ``(outputs,)``; padding apart.

    Args:
        module: the layer; its bias is not added.
        inputs: ``(channels,)``.
        weight: instead of the module's own, of the same shape.
    """
    value = (module.weight.data if weight is None else weight).double()
    inputs = inputs.double()
    if isinstance(module, nn.Linear):
        return value.view(len(value), len(inputs), -1).sum(2) @ inputs
    taps = value.flatten(2).sum(2)
    groups = module.groups
    given = inputs.view(groups, -1)
    if isinstance(module, ConvTransposed):
        parts = taps.view(groups, -1, taps.shape[1])  # (group, inputs, outputs)
        # Each output meets, of the taps, one in as many as there are strides.
        strides = 1
        for stride in module.stride:
            strides *= stride
        return torch.einsum("gio,gi->go", parts, given).flatten() / strides
    return torch.einsum("goi,gi->go", taps.view(groups, -1, taps.shape[1]), given).flatten()


def bias_of(module: Layer) -> Tensor:
    """The bias; zeros are registered where there is none."""
    if module.bias is None:
        zeros = module.weight.new_zeros(output_channels(module))
        module.bias = nn.Parameter(zeros, requires_grad=module.weight.requires_grad)
    return module.bias.data
