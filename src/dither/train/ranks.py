"""Processes that train one model: each sees other batches, and all must end with one file.

What is learned is alike in all of them, because gradients are. Running statistics are not: DDP
makes them so before its next forward pass, which is too late for what is measured, and FSDP2 never.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed, nn

from dither.team import is_alone

STATISTICS = ("running_mean", "running_var")
"""What batch and instance norm call theirs."""

_COUNT = "num_batches_tracked"


def together() -> bool:
    """Whether this process trains with others: in a group, and not within :func:`dither.alone`."""
    is_member = distributed.is_available() and distributed.is_initialized()
    return is_member and distributed.get_world_size() > 1 and not is_alone()


def take_first(model: nn.Module) -> None:
    """Let all processes have the running statistics of the first, as DDP does before a pass."""
    if together():
        _exchange(_statistics(model), lambda flat: distributed.broadcast(flat, 0))


def average(model: nn.Module) -> None:
    """Let all have the mean of statistics that are averages over batches of their own."""
    if not together():
        return
    found = _statistics(model)
    _exchange(found, distributed.all_reduce)
    for value in found:
        value.copy_(value / distributed.get_world_size())


def _statistics(model: nn.Module) -> list[Tensor]:
    names = (*STATISTICS, _COUNT)
    return [value for name, value in model.named_buffers() if name.rpartition(".")[2] in names]


def _exchange(values: Sequence[Tensor], how: Callable[[Tensor], object]) -> None:
    """One exchange for all tensors of a type on a device."""
    kinds: dict[object, list[Tensor]] = {}
    for value in values:
        kinds.setdefault((value.dtype, value.device), []).append(value)
    for alike in kinds.values():
        flat = torch.cat([value.reshape(-1) for value in alike])
        how(flat)
        for value, part in zip(alike, flat.split([v.numel() for v in alike]), strict=True):
            value.copy_(part.reshape(value.shape))
