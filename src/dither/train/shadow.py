"""Let a module's `forward` read a surrogate where it reads a weight; the weight stays in place.

An instance attribute wins over ``nn.Module.__getattr__``, by which ``module.weight`` finds the
parameter. So the module's class is swapped for a generated subclass whose ``forward`` places the
surrogate's tensor in the instance's dict for the length of the call. Names in the state dict, ties,
pickling, copying, optimizers and checkpoints do not notice.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dither.activations.functions import apart
from dither.core import SpecError
from dither.model import SHADOWS, memory_of
from dither.train.surrogate import Surrogate

_PATHS = "dither_paths"
_FUSED = "dither_fused"
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
_VISITORS = "dither_visitors"
_LOCK = threading.Lock()
_STALE_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Hooks that make the weight before `forward` begins, from what `forward` never reads."""


class Site(NamedTuple):
    """Where a parameter is read.

    Attributes:
        owner: the module whose `forward` reads it.
        path: from the owner: ``weight``, or ``out_proj.weight`` for a child's.
        is_fused: only in evaluation, where a fused kernel reads what belongs to children.
    """

    owner: nn.Module
    path: str
    is_fused: bool = False


class _Shared(nn.Module):
    """A further site of a surrogate that is registered elsewhere: a tied weight has one."""

    def __init__(self, surrogate: Surrogate) -> None:
        super().__init__()
        self.__dict__["surrogate"] = surrogate

    def forward(self, weight: Tensor) -> Tensor:
        values: Tensor = self.__dict__["surrogate"](weight)
        return values


def _place(owner: nn.Module) -> list[tuple[nn.Module, str]]:
    """Put what surrogates return into the instance dicts; each place counts its visitors."""
    placed: list[tuple[nn.Module, str]] = []
    shadows: Any = owner._modules[SHADOWS]
    fused = owner.__dict__[_FUSED]
    try:
        for key, path in owner.__dict__[_PATHS].items():
            if owner.training and key in fused:
                continue
            child, _, name = path.rpartition(".")
            module = owner.get_submodule(child)
            if name not in module._parameters:
                raise SpecError(
                    f"{type(owner).__name__} no longer has the parameter {path!r}: it was renamed "
                    "or wrapped after attaching; call run.detach() first and attach again"
                )
            weight = module._parameters[name]
            values = None if weight is None else apart(shadows[key], weight)
            if values is weight or values is None:
                continue
            _enter(module, name, values)
            placed.append((module, name))
    except BaseException:
        _remove(placed)
        raise
    return placed


def _look_up(owner: Any, base: Any, input: Tensor) -> Tensor | None:  # noqa: A002 - torch's name
    """An embedding's rows without noise for the rest of its table, where a surrogate can."""
    surrogate = owner._modules[SHADOWS]["weight"]
    if isinstance(surrogate, _Shared):
        surrogate = surrogate.__dict__["surrogate"]
    if not owner.training or owner.sparse or not surrogate.reads_rows():
        return None
    rows = base.forward(owner, input)
    values: Tensor | None = surrogate.look_up(rows, input)
    if values is not None and owner.padding_idx is not None:  # it has no gradient
        used = (input != owner.padding_idx).unsqueeze(-1)
        values = torch.where(used, values, values.detach())
    return values


def _enter(module: nn.Module, name: str, values: Tensor) -> None:
    if is_compiling():
        module.__dict__[name] = values
        return
    with _LOCK:
        visitors: dict[str, int] = module.__dict__.setdefault(_VISITORS, {})
        visitors[name] = visitors.get(name, 0) + 1
        module.__dict__[name] = values
        if isinstance(module, nn.RNNBase):
            _list_weights(module)


def _remove(placed: list[tuple[nn.Module, str]]) -> None:
    for module, name in placed:
        if is_compiling():
            module.__dict__.pop(name, None)
            continue
        with _LOCK:
            visitors = module.__dict__[_VISITORS]
            visitors[name] -= 1
            if not visitors[name]:
                module.__dict__.pop(name, None)
                del visitors[name]
            if not visitors:
                del module.__dict__[_VISITORS]
            if isinstance(module, nn.RNNBase):
                _list_weights(module)


@contextmanager
def in_place(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules have what surrogates return in place of their weights, outside `forward` too."""
    placed: list[tuple[nn.Module, str]] = []
    try:
        for module in modules:
            if is_shadowed(module):
                placed += _place(module)
        yield
    finally:
        _remove(placed)


def _list_weights(module: nn.RNNBase) -> None:
    """Bring the list that recurrent layers read up to date with their attributes.

    Theirs (`_init_flat_weights`) would also move all weights on a GPU into one new buffer.
    """
    weights = [getattr(module, name, None) for name in module._flat_weights_names]
    module.__dict__["_flat_weights"] = weights
    module.__dict__["_flat_weight_refs"] = [
        None if weight is None else weakref.ref(weight) for weight in weights
    ]


def _shadow_class(base: type[nn.Module]) -> type[nn.Module]:
    """The generated subclass of a class: one for each, so that compilers and pickle agree."""
    if base in _CLASSES:
        return _CLASSES[base]

    is_table = base.forward is nn.Embedding.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_table and (rows := _look_up(self, base, *args, **kwargs)) is not None:
            return rows
        placed = _place(self)
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            _remove(placed)

    # Others bind calls to names by it. No `__wrapped__`: accelerate would unwrap to the base's.
    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]

    def reduce(self: nn.Module, protocol: int) -> Any:
        rebuilt = base.__reduce_ex__(self, protocol)
        return (_rebuild, (base,), *rebuilt[2:])

    def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("state_dict") is None:
            kwargs["state_dict"] = evaluated_state(self)
        save: Any = base.save_pretrained  # type: ignore[attr-defined]
        return save(self, *args, **kwargs)

    saves = hasattr(base, "save_pretrained")
    # The base's name, because others write it into files (a model's config, for one).
    shadow = type(
        base.__name__,
        (base,),
        {
            "forward": forward,
            "__reduce_ex__": reduce,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "_dither_base": base,
            **({"save_pretrained": save_pretrained} if saves else {}),
        },
    )
    _CLASSES[base] = shadow
    return shadow


def evaluated_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a finished model as it is evaluated, and nothing that only training knows.

    In training it is the state as it is. Names of a tied weight share memory.
    """
    state = model.state_dict()
    found: dict[str, Surrogate] = {}
    for prefix, owner in model.named_modules(remove_duplicate=False):
        if is_shadowed(owner):
            for key, path in owner.__dict__[_PATHS].items():
                surrogate: Any = owner._modules[SHADOWS]._modules[key]
                found[f"{prefix}.{path}".lstrip(".")] = surrogate.__dict__.get(
                    "surrogate", surrogate
                )
    if any(surrogate.committed is None for surrogate in found.values()):
        return state
    decoded = {
        id(surrogate): surrogate.committed.decode().to(state[name].device)
        for name, surrogate in found.items()
        if surrogate.committed is not None
    }
    plain = {name: value for name, value in state.items() if SHADOWS not in name.split(".")}
    return plain | {name: decoded[id(surrogate)] for name, surrogate in found.items()}


def _rebuild(base: type[nn.Module]) -> nn.Module:
    kind = _shadow_class(base)
    made: nn.Module = kind.__new__(kind)
    return made


def is_shadowed(module: nn.Module) -> bool:
    """Whether a module's forward reads surrogates."""
    return hasattr(type(module), "_dither_base")


def shadow_saving(model: nn.Module) -> None:
    """Let `save_pretrained` of a finished model write what is evaluated, if there is such."""
    if hasattr(model, "save_pretrained"):
        _become_shadow(model)


def _become_shadow(owner: nn.Module) -> None:
    if not is_shadowed(owner):
        owner.__class__ = _shadow_class(type(owner))
        owner.add_module(SHADOWS, nn.ModuleDict())
        owner.__dict__[_PATHS], owner.__dict__[_FUSED] = {}, set()


def shadow(site: Site, surrogate: Surrogate, *, is_first: bool) -> None:
    """Let ``site.owner.forward`` read ``surrogate(parameter)`` for the parameter at ``site.path``.

    Args:
        site: from :func:`find_sites`.
        surrogate: stands in.
        is_first: register it here; else it is registered elsewhere, as for tied weights.
    """
    owner, path, is_fused = site
    _become_shadow(owner)
    key = path.replace(".", "__")  # keys of a ModuleDict hold no dots
    shadows: Any = owner._modules[SHADOWS]
    shadows[key] = surrogate if is_first else _Shared(surrogate)
    shadows[key].train(owner.training)
    owner.__dict__[_PATHS][key] = path
    if is_fused:
        owner.__dict__[_FUSED].add(key)


def unshadow(owner: nn.Module) -> None:
    """Give a module its plain class back."""
    if not is_shadowed(owner):
        return
    owner.__class__ = type(owner)._dither_base  # type: ignore[attr-defined]
    del owner._modules[SHADOWS], owner.__dict__[_PATHS], owner.__dict__[_FUSED]
    owner.__dict__.pop(_VISITORS, None)


def find_sites(
    model: nn.Module, name: str, owners: Mapping[str, str], *, is_noisy: bool = True
) -> list[Site]:
    """Every place at which the parameter of a name is read, ties included.

    Args:
        model: any module.
        name: of the parameter.
        owners: see :class:`dither.Plan`.
        is_noisy: whether something else than the weight is read in training.

    Raises:
        SpecError: an owner that does not exist or does not hold the parameter, or a module in
            which no stand-in can be read.
    """
    parameter = model.get_parameter(name)
    modules = dict(model.named_modules())
    sites: dict[tuple[int, str], Site] = {}
    for path, module in modules.items():
        if SHADOWS in path.split("."):
            continue
        for local, value in module._parameters.items():
            if value is None or not _is_same(value, parameter):
                continue
            full = f"{path}.{local}" if path else local
            _refuse(full, module, is_noisy=is_noisy)
            reader = _named(modules, full, owners) if full in owners else _reader(modules, path)
            if reader is None:
                raise SpecError(
                    f"{full!r} is in a {type(module).__name__}, which has no forward of its own "
                    "and no module around it; put it in a module that reads it"
                )
            site = Site(modules[reader], full.removeprefix(f"{reader}.") if reader else full)
            sites[id(site.owner), site.path] = site
            for fused in _fused(modules, full, reader):
                sites.setdefault((id(fused.owner), fused.path), fused)
    return sorted(sites.values(), key=lambda site: site.is_fused)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """One parameter, or two that show the same memory in the same way."""
    if one is other or not one.numel():
        return one is other
    return memory_of(one) == memory_of(other)


def _refuse(full: str, module: nn.Module, *, is_noisy: bool) -> None:
    if any(isinstance(hook, _STALE_HOOKS) for hook in module._forward_pre_hooks.values()):
        raise SpecError(
            f"{full!r} belongs to a hook of torch.nn.utils (weight_norm, spectral_norm, prune), "
            "which reads it before forward; use torch.nn.utils.parametrizations, or remove the hook"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise SpecError(f"{full!r} is in a scripted module; attach to the module before scripting")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        raise SpecError(
            f"{full!r} is in an embedding with max_norm, which overwrites weights while it reads "
            "them; set max_norm=None and renormalise after optimizer steps, or leave it out of the "
            "plan"
        )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and is_noisy:
        raise SpecError(
            f"{full!r} is in an embedding with sparse gradients, which training methods do not "
            "have; set sparse=False, or give it a format, which is applied after training"
        )


def _reader(modules: Mapping[str, nn.Module], path: str) -> str | None:
    """Path of the module whose `forward` reads what the module at ``path`` holds."""
    parent, _, child = path.rpartition(".")
    around = modules[parent]
    if isinstance(around, nn.MultiheadAttention) and child == "out_proj":
        return parent  # attention reads it without calling it
    if type(modules[path]).forward is not nn.Module.forward:
        return path
    return _reader(modules, parent) if path else None  # ParameterList and its like


def _named(modules: Mapping[str, nn.Module], full: str, owners: Mapping[str, str]) -> str:
    reader = owners[full]
    if reader not in modules or not full.startswith(f"{reader}." if reader else ""):
        raise SpecError(
            f"owners says that {reader!r} reads {full!r}; name a module that holds it, directly or "
            'in its children, or "" for the whole model'
        )
    return reader


def _fused(modules: Mapping[str, nn.Module], full: str, reader: str) -> Iterator[Site]:
    """Layers around the reader whose fused kernels read for it in evaluation."""
    path = reader
    while path:
        path = path.rpartition(".")[0]
        if isinstance(modules[path], nn.TransformerEncoderLayer):
            inner = full.removeprefix(f"{path}.") if path else full
            yield Site(modules[path], inner, is_fused=True)
