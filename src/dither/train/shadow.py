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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.fx import GraphModule
from torch.nn import functional

from dither.activations.functions import apart
from dither.core import SpecError
from dither.model import SHADOW_OF, SHADOWS, own_class
from dither.train.sites import Site
from dither.train.surrogate import Surrogate

_PATHS = "dither_paths"
_FUSED = "dither_fused"
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
_VISITORS = "dither_visitors"
_ROOT = "dither_root"
_LOCK = threading.Lock()


_Placed = tuple[nn.Module, str, bool]
"""A module, the name of a weight, and whether this visitor is counted: compilers trace none."""


class _Calls(threading.local):
    """How deep a thread is in forward passes of attached models."""

    depth = 0


_CALLS = _Calls()


class _Shared(nn.Module):
    """A further site of a surrogate that is registered elsewhere: a tied weight has one."""

    def __init__(self, surrogate: Surrogate) -> None:
        super().__init__()
        self.__dict__["surrogate"] = surrogate

    def forward(self, weight: Tensor) -> Tensor:
        values: Tensor = self.__dict__["surrogate"](weight)
        return values


def _place(owner: nn.Module) -> list[_Placed]:
    """Put what surrogates return into the instance dicts; each place counts its visitors."""
    placed: list[_Placed] = []
    shadows: Any = owner._modules.get(SHADOWS)
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
            placed.append((module, name, _enter(module, name, values)))
    except BaseException:
        _remove(placed)
        raise
    return placed


def _look_up(owner: Any, input: Tensor) -> Tensor | None:  # noqa: A002 - torch's name
    """An embedding's rows without noise for the rest of its table, where a surrogate can."""
    surrogate = owner._modules[SHADOWS]["weight"]
    if isinstance(surrogate, _Shared):
        surrogate = surrogate.__dict__["surrogate"]
    if not owner.training or owner.sparse or not surrogate.reads_rows():
        return None
    surrogate.expect(owner._parameters["weight"])
    rows = _rows(owner, input)
    values: Tensor | None = surrogate.look_up(rows, input)
    if values is not None and owner.padding_idx is not None:  # it has no gradient
        used = (input != owner.padding_idx).unsqueeze(-1)
        values = torch.where(used, values, values.detach())
    return values


def _rows(owner: Any, input: Tensor) -> Tensor:  # noqa: A002 - as above
    """What `nn.Embedding.forward` gives, of the weight itself."""
    kept = owner.padding_idx, owner.max_norm, owner.norm_type, owner.scale_grad_by_freq
    rows: Tensor = functional.embedding(input, owner._parameters["weight"], *kept, owner.sparse)
    return rows


def _enter(module: nn.Module, name: str, values: Tensor) -> bool:
    if is_compiling():
        module.__dict__[name] = values
        return False
    with _LOCK:
        visitors: dict[str, int] = module.__dict__.setdefault(_VISITORS, {})
        visitors[name] = visitors.get(name, 0) + 1
        module.__dict__[name] = values
        if isinstance(module, nn.RNNBase):
            _list_weights(module)
    return True


def _remove(placed: list[_Placed]) -> None:
    for module, name, is_counted in placed:
        if not is_counted:
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
    placed: list[_Placed] = []
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
    held = {**module._parameters, **module.__dict__}
    weights = [held.get(name) for name in module._flat_weights_names]
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
        if is_table and (rows := _look_up(self, *args, **kwargs)) is not None:
            return rows
        placed = _place(self)
        deeper = 0 if is_compiling() else 1
        if deeper:
            _CALLS.depth += deeper
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            if deeper:
                _CALLS.depth -= deeper
            _remove(placed)

    def getattribute(self: nn.Module, name: str) -> Any:
        return _read(self, name, base.__getattr__(self, name))

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
            "__getattr__": getattribute,
            **_added_last(base),
            "__reduce_ex__": reduce,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            SHADOW_OF: base,
            **({"save_pretrained": save_pretrained} if saves else {}),
        },
    )
    _CLASSES[base] = shadow
    return shadow


def _added_last(base: type[nn.Module]) -> dict[str, Any]:
    """Methods by which what was added to an attached model comes last in its lists."""

    def named_modules(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        named = base.named_modules(self, *args, **kwargs)
        if _ROOT not in self.__dict__:
            return iter(named)
        return iter(sorted(named, key=lambda item: _is_added(item[0])))

    def state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = base.state_dict(self, *args, **kwargs)
        if _ROOT in self.__dict__:
            for name in filter(_is_added, list(state)):
                state.move_to_end(name)
        return state

    return {"named_modules": named_modules, "state_dict": state_dict}


def _is_added(name: str) -> bool:
    return SHADOWS in name.split(".")


def _read(owner: nn.Module, name: str, value: object) -> object:
    """A parameter that is asked for by its name: its surrogate's values, where a forward asks.

    So another module's forward reads what its owner's does, as that of a tied output head. In the
    owner's own, values stand in the instance dict, and nothing is asked for.
    """
    # What compilers trace is a forward pass.
    if not isinstance(value, nn.Parameter) or not (is_compiling() or _CALLS.depth or _recomputes()):
        return value
    if owner.__dict__.get(_PATHS, {}).get(name) != name:
        return value
    shadows: Any = owner._modules[SHADOWS]
    if any(hasattr(v, "full_tensor") for v in (value, *shadows[name].parameters())):
        return value  # sharded: FSDP asks, while it gathers the unit
    return apart(shadows[name], value)


def _recomputes() -> bool:
    """Whether checkpointing runs a part of a forward pass again, for its gradients.

    Backward is under way then, and gradients are asked for within it.
    """
    return torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()


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
    return hasattr(type(module), SHADOW_OF)


def become_root(model: nn.Module) -> None:
    """Mark the model that was attached: what was added to it comes last in its lists.

    Averages of weights that were copied before, like all who pair tensors by their order, go on.
    """
    if isinstance(model, GraphModule) and not is_shadowed(model):
        _count_calls(model)  # it writes its forward into its class, and would do so into ours
        getattr(model, "_deepcopy_hooks", []).append(_count_calls)
        return
    become_shadow(model)
    model.__dict__[_ROOT] = True


def _count_calls(model: nn.Module) -> None:
    """By hooks, which copies of traced models lose."""
    model.register_forward_pre_hook(_goes_in)
    model.register_forward_hook(_comes_out, always_call=True)


def _goes_in(*_: object) -> None:
    _CALLS.depth += 0 if is_compiling() else 1


def _comes_out(*_: object) -> None:
    _CALLS.depth -= 0 if is_compiling() else 1


def become_shadow(owner: nn.Module) -> None:
    """Swap a module's class: its forward is known as such, and it saves what is evaluated."""
    if not is_shadowed(owner):
        owner.__class__ = _shadow_class(type(owner))
        owner.__dict__[_PATHS], owner.__dict__[_FUSED] = {}, set()


def base_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, attached or not."""
    kind = type(module)
    base: type[nn.Module] = getattr(kind, "_dither_base", kind)
    return base


def rebase(module: nn.Module, base: type[nn.Module]) -> None:
    """Give a module another class; if it is attached, it stays so."""
    module.__class__ = _shadow_class(base) if is_shadowed(module) else base


def shadow(site: Site, surrogate: Surrogate, *, is_first: bool) -> None:
    """Let ``site.owner.forward`` read ``surrogate(parameter)`` for the parameter at ``site.path``.

    Args:
        site: from :func:`~dither.train.sites.find_sites`.
        surrogate: stands in.
        is_first: register it here; else it is registered elsewhere, as for tied weights.
    """
    owner, path, is_fused = site
    become_shadow(owner)
    key = path.replace(".", "__")  # keys of a ModuleDict hold no dots
    if SHADOWS not in owner._modules:  # not before: a container calls all that it holds
        owner.add_module(SHADOWS, nn.ModuleDict())
    shadows: Any = owner._modules[SHADOWS]
    shadows[key] = surrogate if is_first else _Shared(surrogate)
    shadows[key].train(owner.training)
    owner.__dict__[_PATHS][key] = path
    if is_fused:
        owner.__dict__[_FUSED].add(key)


def unshadow(owner: nn.Module) -> None:
    """Give a module its plain class back."""
    for hooks in (owner._forward_pre_hooks, owner._forward_hooks):
        for key in [k for k, hook in hooks.items() if hook in (_goes_in, _comes_out)]:
            del hooks[key]
            owner._forward_hooks_always_called.pop(key, None)
    copying = getattr(owner, "_deepcopy_hooks", []) if isinstance(owner, GraphModule) else []
    if _count_calls in copying:
        copying.remove(_count_calls)
    if not is_shadowed(owner):
        return
    owner.__class__ = own_class(owner)
    owner._modules.pop(SHADOWS, None)
    del owner.__dict__[_PATHS], owner.__dict__[_FUSED]
    for name in (_VISITORS, _ROOT):
        owner.__dict__.pop(name, None)
