"""The sites that integer layers need: what goes into every module that holds weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dither.activations.sites import on_input
from dither.data import Data
from dither.model import evaluating


def inputs_of_layers(model: nn.Module, data: Data | Iterable[Any]) -> list[str]:
    """Sites ``path@in`` of modules that hold weights and that a floating-point tensor goes into.

    A batch norm is left out: in integer arithmetic it is folded into the layer before it. The input
    of a layer norm is the sum of a residual branch, which must be quantized somewhere.

    Args:
        model: any module; is left as it was.
        data: a loader, or :class:`~dither.Data`; its first batch is run.

    >>> inputs_of_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), [torch.ones(1, 2)])
    ['0@in']
    """
    found: dict[str, None] = {}
    samples = Data.of(data)

    def seeing(site: str) -> Callable[..., None]:
        def note(values: Tensor) -> Tensor:
            found[site] = None
            return values

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            on_input(note, args, kwargs)

        return hook

    handles = []
    try:
        for path, module in model.named_modules():
            held = (p.is_floating_point() for p in module.parameters(recurse=False))
            if any(held) and not isinstance(module, _BatchNorm):
                hook = seeing(f"{path}@in")
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        with evaluating(model), torch.no_grad():
            samples.forward(model, next(iter(samples)))
    finally:
        for handle in handles:
            handle.remove()
    return list(found)
