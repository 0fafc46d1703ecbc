"""What tensors of an archive may rest on: the weights of a checkpoint, known by their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dither.archive.layout import Entry
from dither.checkpoint import plain_names
from dither.core import DTYPES, ArchiveError, dtype_name, without_extra_state
from dither.formats.grid_rounding import restore
from dither.model import inner, refuse_attached, weights_of

_PIECE = 1 << 26


@dataclass(frozen=True, eq=False)
class Base:
    """Tensors by name, and the hash that tells them from others.

    Attributes:
        tensors: on the CPU; nobody else changes them.
        digest: of their content, see :func:`content_hash`.
    """

    tensors: Mapping[str, Tensor]
    digest: str

    @classmethod
    def of(cls, source: nn.Module | Mapping[str, Tensor], *, is_own: bool = False) -> Base:
        """The weights of a model or of a dict, copied unless they are nobody else's.

        Raises:
            SpecError: the model is attached to a run.
        """
        refuse_attached(source, "base")
        state = inner(source).state_dict() if isinstance(source, nn.Module) else source
        given = weights_of(without_extra_state(state))
        plain = {name: given[key] for key, name in plain_names(given).items()}
        held = {
            name: value.detach().to("cpu", copy=not is_own).resolve_conj().resolve_neg()
            for name, value in plain.items()
        }
        return cls(held, content_hash(held))

    def value(self, entry: Entry, difference: Tensor | None) -> Tensor:
        """A tensor that rests on one of these: see :func:`resting`.

        Raises:
            ArchiveError: there is no such tensor of that shape, or it is of another kind.
        """
        own = self.tensors.get(entry.name)
        if own is None or tuple(own.shape) != entry.shape:
            found = "has none" if own is None else f"has one of shape {tuple(own.shape)}"
            raise ArchiveError(
                f"tensor {entry.name!r} of shape {entry.shape} rests on the base's, which {found}"
            )
        dtype = DTYPES[entry.dtype]
        if own.dtype != dtype and not (own.is_floating_point() and dtype.is_floating_point):
            raise ArchiveError(
                f"tensor {entry.name!r} of {dtype} cannot rest on one of {own.dtype}"
            )
        return resting(own, difference, entry.dtype)


def checked(named: str | None, read: Callable[[], Base]) -> Base:
    """A base that is the one that an archive names.

    Raises:
        ArchiveError: it is not, or the archive names none.
    """
    if named is None:
        raise ArchiveError("the archive rests on no base, all is in it: leave out base")
    base = read()
    if base.digest != named:
        raise ArchiveError(
            f"the base has the hash {base.digest}, and the archive stores differences to {named}: "
            "give the very weights from which it was made"
        )
    return base


def needed(base: Base | None, named: str | None, entries: Iterable[Entry]) -> Base | None:
    """The base, where one of some tensors rests on it.

    Raises:
        ArchiveError: it was not given.
    """
    if not any(entry.on_base for entry in entries):
        return None
    if base is None:
        raise ArchiveError(
            "the archive stores differences, and needs the base to which: give the weights with "
            f"the hash {named} as base= (of a command: --base)"
        )
    return base


def wide(dtype: str) -> torch.dtype:
    """The type of differences to tensors of a type: float32, for float64 that."""
    return torch.float64 if dtype == "float64" else torch.float32


def resting(base: Tensor, difference: Tensor | None, dtype: str) -> Tensor:
    """A base's tensor and a difference, added in float32 (float64 in that), and then restored.

    Without a difference, the base's tensor is only converted to the type.

    >>> resting(torch.tensor([1.0]), torch.tensor([0.5]), "bfloat16")
    tensor([1.5000], dtype=torch.bfloat16)
    """
    if difference is None:
        return base.to(DTYPES[dtype], copy=True, memory_format=torch.contiguous_format)
    kind = wide(dtype)
    return restore(base.to(kind) + difference.to(kind), DTYPES[dtype])


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """What tells weights from others, whatever they are kept in, as 64 hexadecimal digits.

    SHA-256 of a line for each tensor, in the order of names in UTF-8: the SHA-256 of its bytes (in
    the order of indices, little-endian), type, shape, the name's length in bytes, and the name.

    >>> content_hash({"w": torch.zeros(2, 3)})[:16]
    '17f05f5e3ad691b8'
    """
    whole = hashlib.sha256()
    for name in sorted(tensors, key=str.encode):
        value, label = tensors[name], name.encode()
        shape = "x".join(map(str, value.shape))
        line = f"{_digest(value)} {dtype_name(value.dtype)} {shape} {len(label)} ".encode()
        whole.update(line + label + b"\n")
    return whole.hexdigest()


def _digest(value: Tensor) -> str:
    found = hashlib.sha256()
    flat = value.detach().reshape(-1)
    for piece in flat.split(_PIECE):
        own = piece.contiguous() if piece.stride() == (1,) else piece.clone()
        found.update(own.view(torch.uint8).numpy().data)
    return found.hexdigest()
