"""Bring archives back: as a dict of tensors, or into a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dither.archive.reader import Archive, BaseSource
from dither.archive.source import is_archive
from dither.checkpoint import converted, plain_names, read_checkpoint
from dither.core import DTYPES, CheckpointError, SpecError
from dither.disk import touched
from dither.model import SITES, inner, memory_of, refuse_attached, separate, weights_of
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


def load(
    path: str | os.PathLike[str],
    max_nbytes: int | None = None,
    *,
    base: BaseSource | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """All tensors of an archive, by name; tied weights share memory.

    Tensors are decoded in parallel, one per torch thread, and each is converted and moved as soon
    as it is decoded: besides the result, at most that many are in memory, in the types of the file
    and with their codes. The values do not depend on the number of threads.

    Args:
        path: the file, or a URL: see :meth:`Archive.open`.
        max_nbytes: a limit on memory, in bytes: see :meth:`Archive.open`.
        base: the weights that the file stores differences to, if it does: see
            :meth:`Archive.open`.
        dtype: what floating-point tensors are converted to; None keeps the type of each.
        device: where tensors go; None is the CPU.

    Raises:
        SpecError: ``dtype`` is not a floating-point type.
        ArchiveError: the file is not an archive, or is damaged.

    >>> import tempfile
    >>> import dither
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dither.compress({"w": torch.randn(64, 64)}, size="2kB").save(f"{folder}/w.dither")
    ...     weights = load(f"{folder}/w.dither", dtype=torch.float16)
    >>> weights["w"].shape, weights["w"].dtype
    (torch.Size([64, 64]), torch.float16)
    """
    with Archive.open(path, max_nbytes, base=base) as archive:
        return archive.state_dict(dtype=dtype, device=device)


def load_weights(path: str | os.PathLike[str], key: str | None = None) -> dict[str, Tensor]:
    """All tensors of an archive or of any other checkpoint, by name; tied ones share memory.

    Args:
        path: the file or folder.
        key: see :func:`~dither.checkpoint.read_checkpoint`.

    Raises:
        CheckpointError: there is no such file, it is damaged, or of a kind not understood.
        ArchiveError: an archive is damaged.
    """
    if not is_archive(path):
        return read_checkpoint(path, key)
    with Archive.open(path) as archive:
        archive.check_total()
        return archive.state_dict()


def load_into(
    model: nn.Module,
    source: Archive | str | os.PathLike[str],
    *,
    strict: bool = True,
    device: torch.device | str | None = None,
    max_nbytes: int | None = None,
    base: BaseSource | None = None,
) -> Loaded:
    """Copy an archive's tensors into a model's parameters and buffers, in place.

    Tensors on the meta device, which have no memory, are replaced by new ones; buffers there that
    are in no state dict count as missing, since no file has their values. A tied name needs only
    one of its names in the archive. Both sides may have the names of a wrapper (torch.compile, data
    parallelism, averaged weights), and the archive those of a Hugging Face folder.

    Unless the source is a URL, checksums are verified first, so that a damaged file changes
    nothing. Tensors are then decoded in place and in parallel; besides the model, at most one per
    torch thread is in memory, or all of them where transformers has to convert names.

    Args:
        model: keeps its types, and its devices except for the meta device.
        source: an archive, or the path or URL of one.
        strict: refuse, before anything is changed, if names or shapes differ, or if only the
            archive quantizes activations.
        device: where tensors on the meta device go; None is the CPU.
        max_nbytes: see :meth:`Archive.open`.
        base: see :meth:`Archive.open`; only with a path.

    Returns:
        What differed.

    Raises:
        SpecError: the model is attached to a run; or an open archive comes with a base.
        CheckpointError: ``strict``, and a name, a shape or a site differs.
        ArchiveError: the file is not an archive, or is damaged. A malicious file whose checksums
            all hold may have changed part of the model by then.

    >>> import dither
    >>> model = nn.Linear(64, 64)
    >>> print(load_into(model, dither.compress(model, "8x")))
    all tensors match
    """
    if not isinstance(source, Archive):
        with Archive.open(source, max_nbytes, base=base) as archive:
            return load_into(model, archive, strict=strict, device=device)
    if base is not None:
        raise SpecError("an archive takes its base when it is opened: dither.open(path, base=...)")
    refuse_attached(model, "load_into")
    state = _plain(weights_of(model.state_dict(keep_vars=True)))
    held, found = _compared(model, source, state)
    if strict and not found.exact:
        raise CheckpointError(
            f"the archive does not fit the model, nothing was loaded\n{found}\n"
            "pass strict=False to load what fits"
        )
    names = _fitting(state, held)
    made = _place(source, {name: (held[name], state[name]) for name in names}, device)
    _materialize(model, made)
    return replace(found, cast=tuple(n for n in names if held[n].dtype != state[n].dtype))


class _Held(NamedTuple):
    """A tensor of an archive: its name there, if it stands there as it is, and what reads it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def _same(value: Tensor) -> Tensor:
    return value


def _held(source: Archive) -> dict[str, _Held]:
    """What an archive has, by names without those of wrappers."""
    found = {}
    for plain, name in _plain({name: name for name in source}).items():
        entry = source.entries[source.aliases.get(name, name)]
        read = partial(source.__getitem__, name)
        found[plain] = _Held(name, entry.shape, DTYPES[entry.dtype], read)
    return found


def _compared(
    model: nn.Module, source: Archive, state: Mapping[str, Tensor]
) -> tuple[dict[str, _Held], Loaded]:
    """What an archive has, by the names of the model if transformers knows them; what differs."""
    held = _held(source)
    found = _differences(model, source, state, held)
    if found.missing or found.unexpected:
        stored = held
        other = converted(inner(model), lambda: {n: part.read() for n, part in stored.items()})
        if other is not None:
            held = {
                name: _Held("", tuple(value.shape), value.dtype, partial(_same, value))
                for name, value in other.items()
            }
            found = _differences(model, source, state, held)
    return held, found


def _fitting(state: Mapping[str, Tensor], held: Mapping[str, _Held]) -> list[str]:
    return [n for n, part in held.items() if n in state and part.shape == tuple(state[n].shape)]


def _differences(
    model: nn.Module, source: Archive, state: Mapping[str, Tensor], held: Mapping[str, _Held]
) -> Loaded:
    fitting = _fitting(state, held)
    covered = {memory_of(state[name]) for name in fitting}
    absent = [n for n in state if n not in held and memory_of(state[n]) not in covered]
    return Loaded(
        missing=(*absent, *_unheld(model, state)),
        unexpected=tuple(name for name in held if name not in state),
        mismatched=tuple(
            f"{name} (archive {part.shape}, model {tuple(state[name].shape)})"
            for name, part in held.items()
            if name in state and part.shape != tuple(state[name].shape)
        ),
        sites=tuple(site for site in source.sites if not _is_quantized(model, site)),
    )


def _place(
    source: Archive,
    pairs: Mapping[str, tuple[_Held, Tensor]],
    device: torch.device | str | None,
) -> dict[int, Tensor]:
    """Read values into the memory of tensors; new ones for those on the meta device, by identity.

    Tensors made in inference mode can be written only there. Those that show each other's memory
    get their own: the archive holds each by itself. Of names of one tensor the last one counts.
    """
    is_special = any(old.is_inference() for _, old in pairs.values())
    mode = torch.inference_mode if is_special else torch.no_grad
    source.check([held.name for held, _ in pairs.values() if held.name])
    with mode():
        separate({name: old for name, (_, old) in pairs.items()})
    places = {memory_of(old): name for name, (_, old) in pairs.items()}
    made: dict[int, Tensor] = {}

    def place(name: str) -> None:
        held, old = pairs[name]
        with mode():  # which holds for this thread alone
            value = held.read()
            if old.is_meta:
                own = _owned(value.to(old.dtype), is_fresh=bool(held.name))
                made[id(old)] = own.to(device)
            else:
                touched(old)
                old.copy_(value)

    stored = [name for name in places.values() if pairs[name][0].name]
    by_name = {pairs[name][0].name: name for name in stored}
    source.each(lambda name: place(by_name[name]), list(by_name))
    for name in places.values():
        if not pairs[name][0].name:
            place(name)
    return made


def _owned(value: Tensor, *, is_fresh: bool) -> Tensor:
    """The same in memory that nothing else has, and that has nothing else."""
    whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
    return value if is_fresh and whole and not value.is_inference() else value.clone()


def _unheld(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Buffers on the meta device that are in no state dict."""
    held = {id(value) for value in state.values()}
    return tuple(n for n, value in model.named_buffers() if value.is_meta and id(value) not in held)


def _materialize(model: nn.Module, values: Mapping[int, Tensor]) -> None:
    """Put values in the place of tensors on the meta device, by identity, so that ties stay."""
    made: dict[int, Tensor] = {}
    for module in model.modules() if values else ():
        for places in (module._parameters, module._buffers):  # noqa: SLF001 - names as placed
            for name, old in places.items():
                if old is None or id(old) not in values:
                    continue
                if id(old) not in made:
                    made[id(old)] = _like(old, values[id(old)])
                places[name] = made[id(old)]  # type: ignore[assignment,unused-ignore]


def _like(old: Tensor, value: Tensor) -> Tensor:
    if not isinstance(old, nn.Parameter):
        return value
    return nn.Parameter(value, requires_grad=old.requires_grad)


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
