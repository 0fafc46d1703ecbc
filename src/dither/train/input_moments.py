"""What the inputs of layers say about errors of their weights, while a network is quantized."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dither.calibrate.data import call
from dither.train.shadow import find_sites

if TYPE_CHECKING:
    from dither.train.run import Run


def input_metrics(run: Run, blocks: Mapping[str, int], data: Iterable[Any]) -> dict[str, Tensor]:
    """Second moments of inputs, summed over blocks: ``(block, block)`` for each weight.

    The network runs as it is quantized so far, without noise and as in evaluation. Weights whose
    module is no Linear or Conv2d without groups, or whose inputs the block does not divide, are
    left out.
    """
    found: dict[str, Tensor] = {}
    hooks = []
    for name, block in blocks.items():
        for site in find_sites(run.model, name, run.plan.owners):
            if site.path == "weight" and _has_inputs(site.owner, block):
                hook = _watch(found, name, block)
                hooks.append(site.owner.register_forward_pre_hook(hook))
    try:
        with torch.no_grad(), quiet(run):
            for batch in data:
                call(run.model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _has_inputs(module: nn.Module, block: int) -> bool:
    if isinstance(module, nn.Linear):
        return module.in_features % block == 0
    is_plain = isinstance(module, nn.Conv2d) and module.groups == 1
    return is_plain and math.prod(module.get_parameter("weight").shape[1:]) % block == 0


def _watch(found: dict[str, Tensor], name: str, block: int) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].detach().float()
        if isinstance(module, nn.Conv2d):
            pad = module.padding if isinstance(module.padding, tuple) else 0
            values = nn.functional.unfold(
                values, module.kernel_size, module.dilation, pad, module.stride
            ).transpose(1, 2)
        rows = values.reshape(-1, block)
        moment = (rows.T @ rows).double()
        found[name] = found[name] + moment if name in found else moment

    return hook


@contextmanager
def quiet(run: Run) -> Iterator[None]:
    """The model as in evaluation, but with weights that are not placed as they are trained."""
    modes = {module: module.training for module in run.model.modules()}
    active = {surrogate: surrogate.active for surrogate in run.surrogates.values()}
    run.model.eval()
    for surrogate in active:
        surrogate.training = True
        surrogate.active = getattr(surrogate, "is_placed", False)
    try:
        yield
    finally:
        for surrogate, was in active.items():
            surrogate.active = was
        for module, mode in modes.items():
            module.training = mode
