"""Walk a model or a state dict once: names, tensors and ties."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn, strided
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from dither.core import CheckpointError, SpecError, dtype_name, is_extra_state, without_extra_state
from dither.disk import copies_on_disk

SITES = "dither_sites"
"""Reserved in state dicts: ranges of activations stand there as ``<module>.dither_sites.*``. They
are no weights: no plan matches them, and the file has a place of its own for them."""

SHADOWS = "dither_shadows"
"""Reserved likewise: what a model in training learns besides, `<module>.dither_shadows.*`."""

SHADOW_OF = "_dither_base"
"""Where the class of a module in training keeps the module's own."""

TABLE_NAMES = ("emb", "wte", "shared.weight", "vocab", "token")
"""Parts of the names of token tables."""

_LEAST_SIDE = 8
"""Rows and columns of a matrix in a stack, at least: kernels are narrower."""

_WIDE = 32
"""No kernel of a convolution is as wide, about."""


def is_weight(name: str) -> bool:
    """Whether a name in a state dict is one of the model's own, and not of its sites."""
    return SITES not in name.split(".")


def weights_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """What is the model's own in a state dict: no sites, and no extra state that is no tensor.

    Modules may keep anything under ``_extra_state``: a file has no place for it, and a model that
    is loaded keeps its own.
    """
    return {
        name: value
        for name, value in state.items()
        if is_weight(str(name)) and not is_extra_state(name, value)
    }


@dataclass(frozen=True)
class Tensors:
    """What a model holds.

    Attributes:
        values: each tensor once, under the first of its names.
        aliases: further names of tied tensors, ``{alias: name}``.
        stacks: names of tensors that hold several matrices, see :func:`stacks_of`.
    """

    values: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    stacks: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes of all values, each tied tensor counted once."""
        return sum(value.numel() * value.element_size() for value in self.values.values())


def collect(source: nn.Module | Mapping[str, Tensor]) -> Tensors:
    """Parameters and persistent buffers of a model, or the tensors of a state dict.

    They come in the order of their names, whatever the order of the dict, as everything that is
    made of them depends on it. Two names are tied when they show the same memory in the same way;
    the first is the model's first, or in a dict the one that a table would have. Extra state of
    modules that is no tensor is left out, with a warning.

    Raises:
        CheckpointError: something is not a plain tensor with data.

    >>> from torch import nn
    >>> embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    >>> head.weight = embedding.weight
    >>> dict(collect(nn.Sequential(embedding, head)).aliases)
    {'1.weight': '0.weight'}
    """
    state = source.state_dict() if isinstance(source, nn.Module) else source
    given = weights_of(without_extra_state(state))
    for name, value in given.items():
        _check(name, value)
    values: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name in given if isinstance(source, nn.Module) else sorted(given, key=_as_first):
        # A conjugate view shares memory with numbers that differ.
        tensor = given[name].detach().resolve_conj().resolve_neg()
        place = memory_of(tensor)
        if tensor.numel() and place in seen:
            aliases[name] = seen[place]
        else:
            seen[place] = name
            values[name] = tensor
    values = {name: values[name] for name in sorted(values, key=by_number)}
    aliases = {name: aliases[name] for name in sorted(aliases, key=by_number)}
    return Tensors(values, aliases, stacks_of(values, source))


def by_number(name: str) -> list[tuple[int, str]]:
    """The key that sorts names as people count.

    >>> sorted(["h.10.weight", "h.9.weight", "h.weight"], key=by_number)
    ['h.9.weight', 'h.10.weight', 'h.weight']
    """
    parts = re.split(r"([0-9]+)", name)
    return [(len(part.lstrip("0")) if n % 2 else -1, part) for n, part in enumerate(parts)]


def _as_first(name: str) -> tuple[bool, list[tuple[int, str]]]:
    """The key that puts names of tables before those of the heads that are tied to them."""
    return not any(part in name.lower() for part in TABLE_NAMES), by_number(name)


def stacks_of(
    values: Mapping[str, Tensor], source: nn.Module | Mapping[str, Tensor]
) -> frozenset[str]:
    """Names of tensors ``(matrices, outputs, inputs)``: all experts of a layer, for one.

    So are the parameters of three axes of a model that belong to no convolution; where modules are
    not known, those that are called experts. Those that are ``(matrices, inputs, outputs)`` are
    left out.

    >>> weights = {"mlp.experts.up": torch.ones(4, 16, 8), "conv.weight": torch.ones(4, 16, 8)}
    >>> sorted(stacks_of(weights, weights))
    ['mlp.experts.up']
    """
    found, held = set(), set()
    if isinstance(source, nn.Module):
        held = {name for name, _ in source.named_parameters(remove_duplicate=False)}
    for name, value in values.items():
        if value.ndim != 3 or value.shape[0] < 2 or min(value.shape[1:]) < _LEAST_SIDE:
            continue
        if isinstance(source, nn.Module):
            owner = _owner(source, name)
            is_conv = isinstance(owner, nn.Conv1d | nn.ConvTranspose1d)
            is_stack = name in held and not is_conv and "conv" not in type(owner).__name__.lower()
            is_turned = bool(getattr(owner, "is_transposed", False))
        else:
            path, _, leaf = name.rpartition(".")
            is_stack = "expert" in path.lower() and (leaf != "weight" or value.shape[2] >= _WIDE)
            is_turned = False
        if is_stack and not is_turned and not _is_turned(name, values):
            found.add(name)
    return frozenset(found)


def _owner(model: nn.Module, name: str) -> nn.Module:
    """The module that a parameter belongs to, behind its parametrizations."""
    path, _, behind = name.partition(".parametrizations.")
    return model.get_submodule(path if behind else name.rpartition(".")[0])


def _is_turned(name: str, values: Mapping[str, Tensor]) -> bool:
    """Whether two projections fit each other only as ``(matrices, inputs, outputs)``."""
    path = name.rpartition(".")[0]
    up, down = (values.get(f"{path}.{leaf}") for leaf in ("gate_up_proj", "down_proj"))
    if up is None or down is None or up.ndim != down.ndim or up.ndim != 3:
        return False
    return up.shape[2] != down.shape[1] and up.shape[1] == down.shape[2]


def inner(model: nn.Module) -> nn.Module:
    """The model in its wrappers: torch.compile, data parallelism, averages of weights.

    >>> inner(nn.DataParallel(nn.Linear(2, 3)))
    Linear(in_features=2, out_features=3, bias=True)
    """
    while True:
        if isinstance(model, nn.DataParallel | DistributedDataParallel | AveragedModel):
            model = model.module
        elif list(model._modules) == ["_orig_mod"]:  # noqa: SLF001 - of torch.compile
            model = model.get_submodule("_orig_mod")
        else:
            return model


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has without a run that it may be attached to."""
    found: type[nn.Module] = getattr(type(module), SHADOW_OF, type(module))
    return found


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy with tensors of its own, on its disk if it is on one.

    Locks, generators, open files and what else cannot be copied are shared with the original;
    weights that a hook makes anew before each call (old `weight_norm`, pruning) are copied without
    their history.

    Raises:
        SpecError: it cannot be copied all the same.
    """
    try:
        return copy.deepcopy(model, copies_on_disk(model))
    except Exception:  # noqa: BLE001 - whatever the parts of a model raise
        memo = copies_on_disk(model)
        for value in (v for module in model.modules() for v in vars(module).values()):
            if isinstance(value, Tensor):
                memo[id(value)] = value.detach().clone()
            elif id(value) not in memo and not _can_copy(value):
                memo[id(value)] = value
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise SpecError(
            f"this {type(model).__name__} cannot be copied ({error}), and files are tried on "
            "copies; take out what cannot be copied, give its module a __deepcopy__, or compress "
            "without data"
        ) from error


def _can_copy(value: object) -> bool:
    """Whether a module's attribute is among its tensors and modules, or can be copied."""
    if isinstance(value, dict) and any(isinstance(v, nn.Module | Tensor) for v in value.values()):
        return True
    try:
        copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - as above
        return False
    return True


def refuse_attached(source: nn.Module | Mapping[str, Any], what: str) -> None:
    """Refuse a model in training, or its state: what it holds is not what it computes with.

    Raises:
        SpecError: the model is attached to a run.
    """
    held = source.named_modules() if isinstance(source, nn.Module) else source.items()
    if any(SHADOWS in str(name).split(".") for name, _ in held):
        raise SpecError(
            f"{what}: this model is attached to a run. Call run.finish() and run.save(path) for "
            "the file of what was trained, or run.detach() first, which gives the plain model back"
        )


def memory_of(tensor: Tensor) -> tuple[object, ...]:
    """What two names of one tied tensor have in common: the same memory, shown in the same way."""
    if tensor.is_meta:
        return (tensor.device, id(tensor))
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def overlapping(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that cannot be written without changing other values, too.

    Those are expanded (several values share one place), or show a part of what another shows; tied
    ones show the same.

    >>> table = torch.zeros(6)
    >>> overlapping({"a": table[:4], "b": table[2:], "c": torch.zeros(1).expand(3)})
    ['a', 'b', 'c']
    >>> overlapping({"a": table[:3], "b": table[3:], "c": table[:3]})
    []
    """
    spans: dict[tuple[object, ...], tuple[int, int, Tensor]] = {}
    for value in tensors.values():
        if value.numel() and not value.is_meta and not hasattr(value, "full_tensor"):
            start, size = value.data_ptr(), value.element_size()
            last = sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
            spans[memory_of(value)] = start, start + (last + 1) * size, value
    shared: set[tuple[object, ...]] = set()
    group: list[tuple[object, ...]] = []
    end = 0
    for place in sorted(spans, key=lambda key: spans[key][:2]):
        if spans[place][0] >= end:
            group = []
        group.append(place)
        end = max(end, spans[place][1])
        if not _are_apart([spans[key][2] for key in group]):
            shared.update(group)
    return [name for name, value in tensors.items() if memory_of(value) in shared]


def separate(tensors: Mapping[str, Tensor]) -> None:
    """Give tensors that cannot be written alone memory of their own."""
    for name in overlapping(tensors):
        value = tensors[name]
        value.data = value.detach().clone(memory_format=torch.contiguous_format)


def _are_apart(tensors: list[Tensor]) -> bool:
    """Whether no two values of tensors, whose memory is near, stand at one place."""
    if len(tensors) == 1 and tensors[0].is_contiguous():
        return True
    least = min(value.data_ptr() for value in tensors)
    found = []
    for value in tensors:
        places = torch.tensor(value.data_ptr() - least)
        for n, step in zip(value.shape, value.stride(), strict=True):
            places = places[..., None] + torch.arange(n) * step * value.element_size()
        found.append(places.reshape(-1))
    every = torch.cat(found)
    return len(every.unique()) == len(every)


def _check(name: object, value: object) -> None:
    if not isinstance(name, str):
        raise CheckpointError(f"a state dict has strings as names, not {name!r}")
    if not isinstance(value, Tensor):
        raise CheckpointError(
            f"{name!r} is {type(value).__name__}, not a tensor; pass a state dict of tensors only"
        )
    if is_lazy(value):
        raise CheckpointError(f"{name!r} is lazy and has no shape yet; run one batch first")
    if value.layout != strided or value.is_quantized or value.is_meta or value.is_nested:
        raise CheckpointError(
            f"{name!r} is a {value.layout}, quantized, nested or meta tensor; pass plain (strided) "
            "tensors with data"
        )
    dtype_name(value.dtype)


class Added(nn.Module):
    """What we add to a model, to learn or note: checkpoints may lack it, and it keeps its types."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """All of it may be absent: a plain checkpoint loads strictly."""
        metadata, strict, _, unexpected, errors = rest
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, [], unexpected, errors)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        """Follow the model to its device, but stay in float32 when it goes to another type."""

        def keep(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        made: Self = super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return made


def parameters_of(model: nn.Module) -> dict[int, str]:
    """The first name of each floating-point parameter, by its identity."""
    return {
        id(parameter): name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
    }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module gets its own mode back.

    Neither running statistics nor dropout are at work, and attention takes its plain path, on
    which all calls are seen.
    """
    modes = {module: module.training for module in model.modules()}
    with _PLAIN_ATTENTION:
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


class _PlainAttention:
    """Keeps attention off its fast path, for the whole process, while any thread asks for it."""

    def __init__(self) -> None:
        self._lock, self._asking, self._before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if not self._asking:
                self._before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self._asking += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._asking -= 1
            if not self._asking:
                torch.backends.mha.set_fastpath_enabled(self._before)


_PLAIN_ATTENTION = _PlainAttention()
