"""Where a parameter is read: by which module's `forward`, under which names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dither.core import SpecError
from dither.model import SHADOWS, memory_of

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
