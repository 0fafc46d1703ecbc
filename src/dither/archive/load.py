"""Bring archives back: as a dict of tensors, or into a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from dither.archive.reader import Archive
from dither.checkpoint import plain_names
from dither.core import CheckpointError
from dither.model import SITES, memory_of, refuse_attached, weights_of
from dither.terminal import some_names

Value = TypeVar("Value")


@dataclass(frozen=True)
class Loaded:
    """What :func:`load_into` found.

    Attributes:
        missing: names that the model has and the archive lacks.
        unexpected: names that the archive has and the model lacks.
        mismatched: names whose shapes differ, with both shapes.
        cast: names whose types differ and were converted to the model's.
        sites: where the archive quantizes activations and the model does not.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the model now computes with exactly the archive's numbers."""
        found = (self.missing, self.unexpected, self.mismatched, self.cast, self.sites)
        return not any(found)

    def __str__(self) -> str:
        """One line for each kind of difference."""
        kinds = {
            "missing in the archive": self.missing,
            "unknown to the model": self.unexpected,
            "of another shape": self.mismatched,
            "converted to the model's type": self.cast,
            "activations that the archive quantizes, and the model does not (call "
            "dither.activations.apply(model, archive.sites) first)": self.sites,
        }
        lines = [f"{kind}: {some_names(names)}" for kind, names in kinds.items() if names]
        return "\n".join(lines) or "all tensors match"


def load(path: str | os.PathLike[str], max_nbytes: int | None = None) -> dict[str, Tensor]:
    """All tensors of an archive, by name; tied weights share memory.

    Args:
        path: the file.
        max_nbytes: see :meth:`Archive.open`.

    Raises:
        ArchiveError: the file is no archive or is damaged.
    """
    with Archive.open(path, max_nbytes) as archive:
        return archive.state_dict()


def load_into(
    model: nn.Module,
    source: Archive | str | os.PathLike[str],
    *,
    strict: bool = True,
    max_nbytes: int | None = None,
) -> Loaded:
    """Copy an archive's tensors into a model's parameters and buffers, in place.

    A name that the archive lacks is not missing if the model ties it to one that is there. Either
    may have the names of a wrapper: torch.compile, data parallelism, an average of weights.

    Args:
        model: its own types and devices are kept.
        source: an archive or the path of one.
        strict: refuse, before anything is changed, where names or shapes differ, or activations
            are quantized in the archive only.
        max_nbytes: see :meth:`Archive.open`.

    Returns:
        What differed.

    Raises:
        SpecError: the model is attached to a run.
        CheckpointError: ``strict`` and a name, a shape or a site differs.
        ArchiveError: the file is no archive or is damaged.
    """
    if not isinstance(source, Archive):
        with Archive.open(source, max_nbytes) as archive:
            return load_into(model, archive, strict=strict)
    refuse_attached(model, "load_into")
    state = _plain(weights_of(model.state_dict(keep_vars=True)))
    held = _plain({name: name for name in source})
    entries, aliases = source.entries, source.aliases
    shapes = {plain: entries[aliases.get(name, name)].shape for plain, name in held.items()}
    mismatched = {
        name: f"{name} (archive {shapes[name]}, model {tuple(state[name].shape)})"
        for name in held
        if name in state and shapes[name] != tuple(state[name].shape)
    }
    fitting = [name for name in held if name in state and name not in mismatched]
    covered = {memory_of(state[name]) for name in fitting}
    found = Loaded(
        missing=tuple(
            name for name in state if name not in held and memory_of(state[name]) not in covered
        ),
        unexpected=tuple(name for name in held if name not in state),
        mismatched=tuple(mismatched.values()),
        sites=tuple(site for site in source.sites if not _is_quantized(model, site)),
    )
    if strict and not found.exact:
        raise CheckpointError(
            f"the archive does not fit the model, nothing was loaded\n{found}\n"
            "pass strict=False to load what fits"
        )
    tensors = {name: source[held[name]] for name in fitting}
    _copy(tensors, state)
    cast = tuple(name for name in fitting if tensors[name].dtype != state[name].dtype)
    return replace(found, cast=cast)


def _copy(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Write values in place; tensors made in inference mode can be written only there."""
    is_special = any(value.is_inference() for value in state.values())
    with torch.inference_mode() if is_special else torch.no_grad():
        for name, value in tensors.items():
            state[name].copy_(value)


def _plain(values: Mapping[str, Value]) -> dict[str, Value]:
    """By names without those of wrappers."""
    return {plain: values[name] for name, plain in plain_names(values).items()}


def _is_quantized(model: nn.Module, site: str) -> bool:
    path, _, end = site.rpartition("@")
    try:
        held = model.get_submodule(f"{path}.{SITES}" if path else SITES)
    except AttributeError:
        return False
    return isinstance(held, nn.ModuleDict) and end in held
