"""Running a model as in evaluation, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from dither.core import SpecError

Call = Callable[[nn.Module, Any], Any]
"""Runs a model on a batch of the loader; returns its output."""


def call(model: nn.Module, batch: object) -> object:
    """Run a model on a batch, moved to the model's device.

    A dict is passed by name; of a tuple or a list the first element is the input, the others are
    labels.
    """
    placed = moved(batch, device_of(model))
    if isinstance(placed, Mapping):
        return model(**placed)
    return model(placed[0] if isinstance(placed, list | tuple) else placed)


def moved(batch: object, device: torch.device) -> object:
    """The tensors of a batch on a device; tuples, lists and dicts are followed."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: moved(part, device) for name, part in batch.items()}
    if isinstance(batch, list | tuple):
        return [moved(part, device) for part in batch]
    return batch


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter is; the CPU without parameters."""
    first = next(iter(model.parameters()), None)
    return torch.device("cpu") if first is None else first.device


def some_batches(loader: Iterable[Any], batches: int | None) -> Iterator[Any]:
    """The first batches of a loader, or all.

    Raises:
        SpecError: there is none.
    """
    if batches is not None and (batches < 1):
        raise SpecError(f"batches={batches!r}: give the number of batches to read, 1 or more")
    empty = True
    for batch in islice(loader, batches):
        empty = False
        yield batch
    if empty:
        raise SpecError("the loader gave no batch; a loader that is an iterator can be read once")


def parameters_of(model: nn.Module) -> dict[int, str]:
    """The first name of each floating-point parameter, by its identity."""
    return {
        id(parameter): name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
    }
