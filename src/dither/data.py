"""The user's samples, and how a model runs on them: one type for everything that takes data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map_only

from dither.core import SpecError

Forward = Callable[[nn.Module, Any], Any]
"""Runs a model on a batch of the loader; returns its output."""

Distance = Callable[[Any, Any], Tensor]
"""The output of the changed model and that of the original, to a scalar."""

Mask = Callable[[Any], Tensor | None]
"""A batch of the loader to bool ``(batch, positions)``, False where padding stands, or to None."""


def call(model: nn.Module, batch: object) -> object:
    """Run a model on a batch, moved to the model's device.

    A dict is passed by name. Of a tuple or a list the model gets the first element, or as many as
    its ``forward`` cannot do without; the others are labels.

    Raises:
        SpecError: the batch has fewer elements than ``forward`` needs.
    """
    args, kwargs = arguments(model, batch)
    return model(*args, **kwargs)


def arguments(model: nn.Module, batch: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What :func:`call` gives to the model: by position, and by name.

    Raises:
        SpecError: the batch has fewer elements than ``forward`` needs.
    """
    placed = moved(batch, device_of(model))
    if isinstance(placed, Mapping):
        return (), dict(placed)
    if isinstance(placed, PackedSequence) or not isinstance(placed, list | tuple):
        return (placed,), {}
    count = _inputs_of(model)
    if len(placed) < count:
        raise SpecError(
            f"{type(model).__name__}.forward takes {count} inputs, and a batch is a "
            f"{type(batch).__name__} of {len(placed)}: give batches with all of them, or "
            "Data(loader, forward=...), which says how the model is called"
        )
    return tuple(placed[:count]), {}


def _inputs_of(model: nn.Module) -> int:
    """How many positional arguments the model needs; 1 at least."""
    try:
        given = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # it has none that Python knows
        return 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(one.kind in kinds and one.default is one.empty for one in given))


def moved(batch: object, device: torch.device) -> object:
    """The tensors of a batch on a device; tuples, lists and dicts are followed."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, PackedSequence):
        return batch.to(device)  # type: ignore[arg-type]  # its stub knows types only
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

    Infinities that stand at the same places, as in masked scores, are no difference. Where outputs
    differ in length, as detections or decoded sequences do, what one lacks counts as zeros.
    """
    pairs = [_without_infinities(a, b) for a, b in _pairs(output, original)]
    total = torch.stack([(a.double() - b.double()).square().sum() for a, b in pairs]).sum()
    return total / torch.stack([b.double().square().sum() for _, b in pairs]).sum().clamp(min=1e-30)


def divergence(output: object, original: object) -> Tensor:
    """Mean Kullback-Leibler divergence in nats of the last axis' softmax: for classifiers.

    What one output lacks counts as zeros, of which all classes are equally likely.
    """
    terms = []
    for a, b in _pairs(output, original):
        wanted = b.double().log_softmax(-1)
        losses = wanted.exp() * (wanted - a.double().log_softmax(-1))
        terms.append(losses.masked_fill(wanted == -torch.inf, 0.0).sum(-1).mean())
    return torch.stack(terms).mean()


def attention_mask(batch: object) -> Tensor | None:
    """The ``attention_mask`` of a dict, ``(batch, positions)`` of whole numbers, as bool.

    >>> attention_mask({"attention_mask": torch.tensor([[1, 1, 0]])})
    tensor([[ True,  True, False]])
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.is_floating_point():
        return None
    return mask != 0


@dataclass(frozen=True)
class Data:
    """Samples, how the model is run on them, and how outputs are compared.

    Every function that takes data accepts this, or a plain loader, which means ``Data(loader)``.

    Attributes:
        loader: yields batches like those that the model will see, without labels. It is read more
            than once, so it must not be an iterator: :meth:`held` keeps the batches in memory.
        forward: runs the model on a batch; its output is what counts. By default :func:`call`.
        distance: of two outputs: :func:`squared`, :func:`divergence`, or your own function.
        batches: how many to read; None for all.
        mask: which positions of a batch are not padding. Only these count in moments of inputs, in
            token frequencies and in :func:`squared` and :func:`divergence`. By default
            :func:`attention_mask`; None if all count.

    >>> [batch.tolist() for batch in Data([torch.ones(1), torch.zeros(1)], batches=1)]
    [[1.0]]
    """

    loader: Iterable[Any]
    forward: Forward = call
    distance: Distance = squared
    batches: int | None = None
    mask: Mask | None = attention_mask

    def __post_init__(self) -> None:
        _check_loader(self.loader)
        for name, wanted in (("forward", self.forward), ("distance", self.distance)):
            if not callable(wanted):
                raise SpecError(f"{name}={wanted!r} cannot be called; give a function")
        if self.mask is not None and not callable(self.mask):
            raise SpecError(f"mask={self.mask!r}: give a function of a batch, or None")
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

    @property
    def count(self) -> int | None:
        """How many batches there are; None where the loader does not say."""
        if not isinstance(self.loader, Sized):
            return None
        try:
            return len(self.loader) if self.batches is None else min(len(self.loader), self.batches)
        except TypeError:  # one that streams has a length in name alone
            return None

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

    def shown(self, batch: object) -> Tensor | None:
        """Which positions of a batch count, bool ``(batch, positions)``; None where all do.

        Raises:
            SpecError: the mask is something else, or hides all of them.
        """
        mask: Any = None if self.mask is None else self.mask(batch)
        if mask is None:
            return None
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        if found != torch.bool or mask.ndim not in (1, 2):
            raise SpecError(f"a mask is bool (batch, positions), True where no padding is: {found}")
        if not bool(mask.any()):
            raise SpecError("the mask of a batch hides all its positions; leave that batch out")
        shown: Tensor | None = None if bool(mask.all()) else mask
        return shown

    def output(self, model: nn.Module, batch: object) -> object:
        """What :attr:`distance` gets of a model: ours, only positions that the mask shows.

        A model that draws random numbers draws the same ones each time.
        """
        device = device_of(model)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            return self.counted(self.forward(model, batch), batch)

    def counted(self, output: object, batch: object) -> object:
        """The same of an output."""
        mask = self.shown(batch) if self.distance in (squared, divergence) else None
        return output if mask is None else _at(output, mask)


def arranged(mask: Tensor, shape: Sequence[int]) -> Tensor | None:
    """The mask as the leading axes of a tensor have its positions, to index that tensor with.

    These are the mask's own axes, or time first, or all positions in one axis.

    Args:
        mask: bool ``(batch, positions)``.
        shape: of a tensor whose last axis is not of positions.

    Returns:
        None where the tensor has other positions.
    """
    dims = mask.ndim
    if len(shape) > dims and tuple(shape[:dims]) == tuple(mask.shape):
        return mask
    if len(shape) > dims and tuple(shape[:dims]) == tuple(mask.T.shape):
        return mask.T
    return mask.flatten() if len(shape) > 1 and shape[0] == mask.numel() else None


def _at(output: object, mask: Tensor) -> object:
    """The same, of tensors with the mask's positions those that it shows."""
    if (tensor := _float(output)) is not None:
        places = arranged(mask, tensor.shape)
        return tensor if places is None else tensor[places.to(tensor.device)]
    parts = _parts(output)
    return output if parts is None else {key: _at(part, mask) for key, part in parts.items()}


def _check_loader(loader: object) -> None:
    """Refuse what is no loader of batches, by what it is."""
    wanted = "data is a loader or a list of batches, or Data(loader, ...)"
    if isinstance(loader, Mapping):
        raise SpecError(f"a dict with {list(loader)[:3]} is one batch; give [batch]: {wanted}")
    if isinstance(loader, str | bytes):
        raise SpecError(f"data={loader[:40]!r} is text; give batches as the model reads: {wanted}")
    is_many = hasattr(type(loader), "__iter__") or hasattr(type(loader), "__getitem__")
    if isinstance(loader, nn.Module | type) or not is_many:
        hint = "; call it" if inspect.isroutine(loader) else ""
        raise SpecError(f"data is {type(loader).__name__}, not batches{hint}: {wanted}")


def _usual(batch: object) -> object:
    """The batch, with copies of tensors made in inference mode: those take part in no gradient."""
    if not any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in tree_leaves(batch)):
        return batch
    return tree_map_only(Tensor, Tensor.clone, batch)


def has_nan(output: object) -> bool:
    """Whether any floating-point tensor of an output holds what is no number."""
    return any(bool(tensor.isnan().any()) for tensor in _floats(output))


def floats_of(output: object) -> list[Tensor]:
    """The floating-point tensors of an output: of tuples, lists, dicts, data classes, arrays.

    Raises:
        SpecError: there is none.
    """
    found = _floats(output)
    if not found:
        raise SpecError(
            f"the model's output, {type(output).__name__}, holds no floating-point tensor; give "
            "Data(loader, forward=...) that returns what counts, such as scores"
        )
    return found


def _floats(output: object) -> list[Tensor]:
    if (tensor := _float(output)) is not None:
        return [tensor]
    return [tensor for part in (_parts(output) or {}).values() for tensor in _floats(part)]


def _float(output: object) -> Tensor | None:
    """A tensor or an array of floating-point numbers, as a tensor; complex ones as two planes."""
    if isinstance(output, np.ndarray) and output.dtype.kind in "fc":
        output = torch.tensor(output)
    if not isinstance(output, Tensor) or output.is_nested:
        return None
    output = output if output.layout == torch.strided else output.to_dense()
    if output.is_complex():
        return torch.view_as_real(output.resolve_conj())
    return output if output.is_floating_point() else None


def _parts(output: object) -> Mapping[Any, object] | None:
    """What an output is made of: tuples, lists, dicts, output objects and data classes."""
    if isinstance(output, Mapping):
        return output
    if isinstance(output, Tensor) and output.is_nested:
        return dict(enumerate(output.unbind()))
    if isinstance(output, list | tuple):
        return dict(enumerate(output))
    if is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in fields(output)}
    return None


def _pairs(output: object, original: object) -> list[tuple[Tensor, Tensor]]:
    found = list(_walk(output, original))
    if not found:
        floats_of(original)
    return found


def _walk(output: object, original: object) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors at the same places of two outputs; what one of them lacks is 0 in it."""
    one, other = _float(output), _float(original)
    if one is not None or other is not None:
        one = torch.zeros_like(other) if one is None and other is not None else one
        other = torch.zeros_like(one) if other is None and one is not None else other
        assert one is not None and other is not None  # noqa: S101, PT018 - for the type checker
        yield _of_one_shape(one, other)
        return
    parts, others = _parts(output) or {}, _parts(original) or {}
    for key in {**parts, **others}:
        yield from _walk(parts.get(key), others.get(key))


def _of_one_shape(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    if one.shape == other.shape:
        return one, other
    if one.ndim != other.ndim:
        raise SpecError(
            f"the encoded model's output is {tuple(one.shape)} where the original's is "
            f"{tuple(other.shape)}, which cannot be compared; give a forward that returns what "
            "both have, such as scores"
        )
    most = [max(sizes) for sizes in zip(one.shape, other.shape, strict=True)]

    def filled(tensor: Tensor) -> Tensor:
        missing = [(0, m - n) for m, n in zip(most, tensor.shape, strict=True)]
        return functional.pad(tensor, [n for pair in reversed(missing) for n in pair])

    return filled(one), filled(other)


def _without_infinities(output: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    same = original.isinf() & (output == original)
    return output.masked_fill(same, 0.0), original.masked_fill(same, 0.0)


def described(batch: object) -> str:
    """A batch for people: its parts, with the shapes of tensors.

    >>> described({"ids": torch.zeros(2, 5), "names": ["a"]})
    '{ids: (2, 5), names: [str]}'
    """
    if isinstance(batch, Tensor | np.ndarray):
        return str(tuple(batch.shape))
    if isinstance(batch, Mapping):
        return f"{{{', '.join(f'{name}: {described(part)}' for name, part in batch.items())}}}"
    if isinstance(batch, list | tuple):
        return f"[{', '.join(described(part) for part in batch[:5])}]"
    return type(batch).__name__
