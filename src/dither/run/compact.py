"""Models whose weights stay packed in memory, as a file has them, and are decoded when used."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from dither.activations import apply, placed
from dither.archive import Archive, load_into
from dither.core import CheckpointError
from dither.model import inner, memory_of, refuse_attached, weights_of
from dither.terminal import some_names

_WORTH_PACKING = 1 << 14
"""Bytes of a tensor from which decoding it at each use is worth its memory."""

_HELD = "_dither_compact"
"""The attribute of a module that knows which of its tensors are packed."""

_READ_ONLY = "is packed in memory, and cannot be loaded into; load into a plain model"


class PackedWeights:
    """Tensors of an archive, decoded when they are read; those read last are kept.

    Safe from several threads: they may decode one tensor twice, and get the same numbers. A copy
    keeps nothing at first; it shares the archive.

    Attributes:
        archive: in memory.
        keep: most bytes of decoded tensors that are kept.
        kept: bytes of those that are kept now.
        decodings: how many tensors were decoded so far.
    """

    def __init__(self, archive: Archive, keep: int) -> None:
        self.archive = archive
        self.keep = keep
        self.decodings = 0
        self._kept: OrderedDict[tuple[str, torch.device, torch.dtype], Tensor] = OrderedDict()
        self.kept = 0
        self._lock = threading.Lock()

    def read(self, name: str, like: Tensor) -> Tensor:
        """A tensor, on the device and in the floating-point type of another."""
        key = (self.archive.aliases.get(name, name), like.device, like.dtype)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        # Tensors made in inference mode could not be used outside.
        with torch.inference_mode(False), torch.no_grad():  # noqa: FBT003 - torch's own
            value = self.archive[name].to(like.device, like.dtype)
        with self._lock:
            self.decodings += 1
            if key not in self._kept and value.nbytes <= self.keep:
                self._kept[key] = value
                self.kept += value.nbytes
                while self.kept > self.keep:
                    _, old = self._kept.popitem(last=False)
                    self.kept -= old.nbytes
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that keeps nothing; archives do not change."""
        return type(self)(self.archive, self.keep)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles hold the archive's bytes."""
        return type(self), (self.archive, self.keep)


class _Held:
    """Which tensors of a module are packed, and what it had in their places, without numbers."""

    def __init__(self, weights: PackedWeights, names: Mapping[str, tuple[str, Tensor]]) -> None:
        self.weights = weights
        self.names = dict(names)

    def read(self, leaf: str) -> Tensor:
        """Numbers as those were: kernels of recurrent layers differ for what requires gradients."""
        name, like = self.names[leaf]
        value = self.weights.read(name, like)
        if torch.is_grad_enabled() or not like.requires_grad:
            return value
        with torch.inference_mode(False):  # noqa: FBT003 - torch's own
            return value.detach().requires_grad_()

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Go where the module goes."""
        with torch.no_grad():
            for leaf, (name, like) in self.names.items():
                self.names[leaf] = name, fn(like).requires_grad_(like.requires_grad)


def compact(model: nn.Module, archive: Archive, keep: int | None = None) -> nn.Module:
    """Let a model keep its weights packed in memory, as in the archive, and decode them on use.

    What a module reads, ``module.weight`` and so on, is decoded then, and is bit for bit what
    :func:`~dither.load_into` would have put there; so are outputs without gradients. Small tensors
    and buffers are loaded as they are. Packed weights are no parameters: they are not trained, and
    are in `state_dict` as numbers; copies share the packed bytes. Models on the meta device are
    filled without ever being whole.

    Args:
        model: is changed in place. Its names must be those of the archive.
        archive: is read into memory.
        keep: most bytes of decoded weights that are kept for their next use, those used last; by
            default as many as the largest has. If fewer than a pass reads one after the other, each
            pass decodes all of them.

    Returns:
        The model.

    Raises:
        SpecError: the model is attached to a run.
        CheckpointError: names or shapes differ; nothing is changed then.

    >>> import dither
    >>> archive = dither.compress(nn.Linear(64, 128), size="12%")
    >>> small = compact(nn.Linear(64, 128), archive)
    >>> small(torch.ones(1, 64)).shape, [name for name, _ in small.named_parameters()]
    (torch.Size([1, 128]), ['bias'])
    """
    refuse_attached(model, "compact")
    whole = inner(model)
    names = _names(whole, archive)
    places = list(_places(whole, archive, names))
    held = Archive.from_bytes(archive.to_bytes(), archive.max_nbytes)
    sizes = [archive.entries[name].decoded_nbytes for *_, name in places]
    weights = PackedWeights(held, max(sizes, default=0) if keep is None else keep)
    if archive.sites and not placed(whole):
        apply(whole, archive.sites)
    found: dict[nn.Module, dict[str, tuple[str, Tensor]]] = {}
    for module, leaf, name in places:
        old = module.get_parameter(leaf)
        del module._parameters[leaf]  # noqa: SLF001 - what a class gives is no parameter
        device = torch.device("cpu") if old.is_meta else old.device
        like = torch.empty(0, dtype=old.dtype, device=device, requires_grad=old.requires_grad)
        found.setdefault(module, {})[leaf] = (name, like)
    load_into(whole, held, strict=False)
    for module, read in found.items():
        vars(module)[_HELD] = _Held(weights, read)
        vars(module).pop("_flat_weights", None)
        module.__class__ = _class_of(cast("Any", type(module)), tuple(read))
    return model


def packed_weights(model: nn.Module) -> PackedWeights | None:
    """What a compact model reads its weights from; None of another model."""
    for module in model.modules():
        if _HELD in vars(module):
            found: PackedWeights = vars(module)[_HELD].weights
            return found
    return None


def _names(model: nn.Module, archive: Archive) -> dict[tuple[object, ...], str]:
    """Where the archive has what a model has, by its memory.

    Raises:
        CheckpointError: one lacks what the other has, or shapes differ.
    """
    state = weights_of(model.state_dict(keep_vars=True))
    stored = {name: archive.aliases.get(name, name) for name in archive}
    pairs = [(state[name], own) for name, own in stored.items() if name in state]
    names = {memory_of(value): own for value, own in pairs}
    differing = {
        "missing": [name for name, value in state.items() if memory_of(value) not in names],
        "unknown to the model": [name for name in stored if name not in state],
        "of another shape": [
            own for value, own in pairs if archive.entries[own].shape != tuple(value.shape)
        ],
    }
    for kind, found in differing.items():
        if found:
            raise CheckpointError(
                f"the archive does not fit the model: {some_names(found)} are {kind}; give a model "
                "with the archive's names, or load it whole, with load_into"
            )
    return names


def _places(
    model: nn.Module, archive: Archive, names: Mapping[tuple[object, ...], str]
) -> Iterator[tuple[nn.Module, str, str]]:
    """Module and attribute of parameters to be packed, and their names in the archive."""
    for module in model.modules():
        for leaf, value in module.named_parameters(recurse=False):
            entry = archive.entries.get(names.get(memory_of(value), ""))
            if entry is None or not value.is_floating_point():
                continue
            if entry.decoded_nbytes >= _WORTH_PACKING and entry.nbytes < entry.decoded_nbytes:
                yield module, leaf, entry.name


@cache
def _class_of(base: Any, leaves: tuple[str, ...]) -> type[nn.Module]:
    """A subclass whose attributes of these names are decoded when they are read."""

    def save(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:  # noqa: FBT001
        base._save_to_state_dict(self, destination, prefix, keep_vars)  # noqa: SLF001
        destination.update({f"{prefix}{leaf}": getattr(self, leaf) for leaf in leaves})

    def load(self: Any, state: Any, prefix: str, *rest: Any) -> None:
        given = [leaf for leaf in leaves if f"{prefix}{leaf}" in state]
        own = {name: v for name, v in state.items() if name.removeprefix(prefix) not in given}
        base._load_from_state_dict(self, own, prefix, *rest)  # noqa: SLF001
        rest[-1].extend(f"{prefix}{leaf} {_READ_ONLY}" for leaf in given)

    def move(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:  # noqa: FBT001, FBT002
        made = base._apply(self, fn, recurse)  # noqa: SLF001
        vars(self)[_HELD].move(fn)
        return made

    def reduce(self: Any, protocol: int) -> Any:
        return (_rebuild, (base, leaves), *base.__reduce_ex__(self, protocol)[2:])

    members: dict[str, Any] = {leaf: property(partial(_read, leaf=leaf)) for leaf in leaves}
    if issubclass(base, nn.RNNBase):
        # A list of its weights, which such a layer sets when it moves.
        members["_flat_weights"] = property(
            lambda self: [getattr(self, name, None) for name in self._flat_weights_names],
            lambda *_: None,
        )
    members |= {
        "_save_to_state_dict": save,
        "_load_from_state_dict": load,
        "_apply": move,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
    }
    return type(base.__name__, (base,), members)


def _read(module: nn.Module, leaf: str) -> Tensor:
    value: Tensor = vars(module)[_HELD].read(leaf)
    return value


def _rebuild(base: Any, leaves: tuple[str, ...]) -> nn.Module:
    """An empty module of a compact class, for copies and pickles."""
    kind = _class_of(base, leaves)
    return kind.__new__(kind)
