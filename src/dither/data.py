"""The user's samples, and how a model runs on them: one type for everything that takes data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dither.core import SpecError

Forward = Callable[[nn.Module, Any], Any]
"""Runs a model on a batch of the loader; returns its output."""

Distance = Callable[[Any, Any], Tensor]
"""The output of the changed model and that of the original, to a scalar."""


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


def squared(output: object, original: object) -> Tensor:
    """Mean squared difference over the mean square, of all tensors of an output.

    Infinities that stand at the same places, as in masked scores, are no difference.
    """
    pairs = [_without_infinities(a, b) for a, b in _pairs(output, original)]
    total = torch.stack([(a.double() - b.double()).square().sum() for a, b in pairs]).sum()
    return total / torch.stack([b.double().square().sum() for _, b in pairs]).sum().clamp(min=1e-30)


def divergence(output: object, original: object) -> Tensor:
    """Mean Kullback-Leibler divergence in nats of the last axis' softmax: for classifiers."""
    terms = []
    for a, b in _pairs(output, original):
        wanted = b.double().log_softmax(-1)
        losses = wanted.exp() * (wanted - a.double().log_softmax(-1))
        terms.append(losses.masked_fill(wanted == -torch.inf, 0.0).sum(-1).mean())
    return torch.stack(terms).mean()


@dataclass(frozen=True)
class Data:
    """Samples, how the model reads them, and what counts as a difference of outputs.

    Whatever takes data takes this, or a plain loader, which stands for ``Data(loader)``.

    Attributes:
        loader: of batches as the model will meet them, without labels. Read more than once, it must
            not be an iterator: :meth:`held` keeps the batches in memory.
        forward: runs the model on a batch; its output is what counts. By default :func:`call`.
        distance: of outputs: :func:`squared`, :func:`divergence`, or one's own.
        batches: how many to read, or all.

    >>> [batch.tolist() for batch in Data([torch.ones(1), torch.zeros(1)], batches=1)]
    [[1.0]]
    """

    loader: Iterable[Any]
    forward: Forward = call
    distance: Distance = squared
    batches: int | None = None

    def __post_init__(self) -> None:
        if self.batches is not None and self.batches < 1:
            raise SpecError(f"batches={self.batches!r}: give how many to read, 1 or more")

    @classmethod
    def of(cls, data: Data | Iterable[Any]) -> Data:
        """Data as they are, or a plain loader as data."""
        return data if isinstance(data, Data) else cls(data)

    def __iter__(self) -> Iterator[Any]:
        """The batches, one after another.

        Raises:
            SpecError: there is none.
        """
        empty = True
        for batch in islice(self.loader, self.batches):
            empty = False
            yield batch
        if empty:
            raise SpecError(
                "the loader gave no batch; a loader that is an iterator can be read once"
            )

    def held(self) -> Data:
        """The same with all batches in memory, to be read again and again.

        Raises:
            SpecError: there is none.
        """
        return replace(self, loader=[_usual(batch) for batch in self], batches=None)

    def first(self, batches: int | None) -> Data:
        """The same with that many batches at most; None for all."""
        if batches is None or (self.batches is not None and self.batches <= batches):
            return self
        return replace(self, batches=batches)


def _usual(batch: object) -> object:
    """The batch, with copies of tensors made in inference mode: those take part in no gradient."""
    if not any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in tree_leaves(batch)):
        return batch
    return tree_map_only(Tensor, Tensor.clone, batch)


def has_nan(output: object) -> bool:
    """Whether any floating-point tensor of an output holds what is no number."""
    return any(bool(tensor.isnan().any()) for tensor in _floats(output))


def floats_of(output: object) -> list[Tensor]:
    """The floating-point tensors of an output: tuples, lists, dicts and output objects.

    Raises:
        SpecError: there is none.
    """
    found = _floats(output)
    if not found:
        raise SpecError("the model's output holds no floating-point tensor; give a forward")
    return found


def _floats(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [tensor for part in output.values() for tensor in _floats(part)]
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in _floats(part)]
    return []


def _pairs(output: object, original: object) -> list[tuple[Tensor, Tensor]]:
    return list(zip(floats_of(output), floats_of(original), strict=True))


def _without_infinities(output: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    same = original.isinf() & (output == original)
    return output.masked_fill(same, 0.0), original.masked_fill(same, 0.0)
