"""Let a module's `forward` read a surrogate where it reads a weight; the weight stays in place.

An instance attribute wins over ``nn.Module.__getattr__``, by which ``module.weight`` finds the
parameter. So the module's class is swapped for a generated subclass whose ``forward`` places the
surrogate's tensor in the instance's dict for the length of the call. Names in the state dict, ties,
pickling, copying, optimizers and checkpoints do not notice.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from dither.train.surrogate import Surrogate

SHADOWS = "dither_shadows"
"""The one reserved name: learned extras stand in state dicts as ``<module>.dither_shadows.*``."""

_PATHS = "dither_paths"
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
_LOCK = threading.Lock()


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
    try:
        for key, path in owner.__dict__[_PATHS].items():
            child, _, name = path.rpartition(".")
            module = owner.get_submodule(child)
            weight = module._parameters[name]
            if weight is None:
                continue
            values = shadows[key](weight)
            if values is weight:
                continue
            _enter(module, name, values)
            placed.append((module, name))
    except BaseException:
        _remove(placed)
        raise
    return placed


def _enter(module: nn.Module, name: str, values: Tensor) -> None:
    if is_compiling():
        module.__dict__[name] = values
        return
    with _LOCK:
        visitors: dict[str, int] = module.__dict__.setdefault("_dither_visitors", {})
        visitors[name] = visitors.get(name, 0) + 1
        module.__dict__[name] = values


def _remove(placed: list[tuple[nn.Module, str]]) -> None:
    for module, name in placed:
        if is_compiling():
            module.__dict__.pop(name, None)
            continue
        with _LOCK:
            visitors = module.__dict__["_dither_visitors"]
            visitors[name] -= 1
            if not visitors[name]:
                module.__dict__.pop(name, None)
                del visitors[name]


def _shadow_class(base: type[nn.Module]) -> type[nn.Module]:
    """The generated subclass of a class: one for each, so that compilers and pickle agree."""
    if base in _CLASSES:
        return _CLASSES[base]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        placed = _place(self)
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            _remove(placed)
            if isinstance(self, nn.RNNBase):
                self._init_flat_weights()  # they would hold tensors with a graph

    def reduce(self: nn.Module, protocol: int) -> Any:
        rebuilt = base.__reduce_ex__(self, protocol)
        return (_rebuild, (base,), *rebuilt[2:])

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
        },
    )
    _CLASSES[base] = shadow
    return shadow


def _rebuild(base: type[nn.Module]) -> nn.Module:
    kind = _shadow_class(base)
    made: nn.Module = kind.__new__(kind)
    return made


def _no_fast_path(module: nn.Module, args: object) -> None:
    """Does nothing; any hook keeps TransformerEncoderLayer off its fused path in evaluation.

    That path reads the raw weights of its children.
    """


def is_shadowed(module: nn.Module) -> bool:
    """Whether a module's forward reads surrogates."""
    return hasattr(type(module), "_dither_base")


def shadow(owner: nn.Module, path: str, surrogate: Surrogate, *, is_first: bool) -> None:
    """Let ``owner.forward`` read ``surrogate(parameter)`` wherever it reads the one at ``path``.

    Args:
        owner: a module whose ``forward`` reads the parameter.
        path: from the owner: ``weight``, or ``out_proj.weight`` for a child's.
        surrogate: stands in.
        is_first: register it here; else it is registered elsewhere, as for tied weights.
    """
    if not is_shadowed(owner):
        owner.__class__ = _shadow_class(type(owner))
        owner.add_module(SHADOWS, nn.ModuleDict())
        owner.__dict__[_PATHS] = {}
        owner.__dict__["_dither_hook"] = owner.register_forward_pre_hook(_no_fast_path).id
    key = path.replace(".", "__")  # keys of a ModuleDict hold no dots
    shadows: Any = owner._modules[SHADOWS]
    shadows[key] = surrogate if is_first else _Shared(surrogate)
    shadows[key].train(owner.training)
    owner.__dict__[_PATHS][key] = path


def unshadow(owner: nn.Module) -> None:
    """Give a module its plain class back."""
    if not is_shadowed(owner):
        return
    owner._forward_pre_hooks.pop(owner.__dict__.pop("_dither_hook"), None)
    owner.__class__ = type(owner)._dither_base  # type: ignore[attr-defined]
    del owner._modules[SHADOWS], owner.__dict__[_PATHS]
    owner.__dict__.pop("_dither_visitors", None)


def find_sites(model: nn.Module, name: str, owners: dict[str, str]) -> list[tuple[nn.Module, str]]:
    """Every ``(owner, path)`` at which the parameter of a name is read, ties included."""
    parameter = model.get_parameter(name)
    sites: dict[tuple[int, str], tuple[nn.Module, str]] = {}
    heads = {
        id(module.out_proj): (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    for path, module in model.named_modules():
        if SHADOWS in path.split("."):
            continue
        for local, value in module._parameters.items():
            if value is not parameter:
                continue
            full = f"{path}.{local}" if path else local
            if full in owners:
                owner, inner = _named_owner(model, full, owners[full])
            elif id(module) in heads:  # attention reads it without calling `out_proj`
                owner, inner = heads[id(module)][1], f"out_proj.{local}"
            else:
                owner, inner = module, local
            sites[id(owner), inner] = (owner, inner)
    return list(sites.values())


def _named_owner(model: nn.Module, full: str, path: str) -> tuple[nn.Module, str]:
    inner = full.removeprefix(f"{path}.") if path else full
    return model.get_submodule(path), inner
