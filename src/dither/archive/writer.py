"""Write archives: one pass, the index last, so that nothing but one tensor need be in memory."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dither.archive.atomic import atomic_write
from dither.archive.base import Base
from dither.archive.layout import INLINE_NBYTES, Entry, Index, Part, head, pack_index
from dither.archive.reader import Archive
from dither.coding import crc32, encode_array, encode_codes
from dither.core import ArchiveError, Codes, Encoded, Format, dtype_name


class Writable(Protocol):
    """Anything with a ``write``; it need not be seekable."""

    def write(self, data: bytes, /) -> object:
        """Take all of ``data``."""
        ...


@dataclass(frozen=True)
class Payload:
    """Bytes of a part, in memory or where they can be read again.

    Attributes:
        nbytes: how many.
        crc: their CRC-32.
        read: gives them.
    """

    nbytes: int
    crc: int
    read: Callable[[], bytes]

    def __reduce__(self) -> tuple[object, ...]:
        """What is sent to another process is the bytes, wherever they are."""
        return Payload, (self.nbytes, self.crc, partial(bytes, self.read()))

    @classmethod
    def of(cls, data: bytes) -> Payload:
        """Bytes in memory."""
        return cls(len(data), crc32(data), partial(bytes, data))


class CodedPart(NamedTuple):
    """One part, coded: ``alphabet`` is set for codes, ``dtype`` for numbers."""

    codec: str
    shape: tuple[int, ...]
    alphabet: int | None
    dtype: str | None
    payload: Payload


class CodedTensor(NamedTuple):
    """One tensor ready to be stored: its parts coded, independent of any archive.

    Where it rests ``on_base``, they are those of the difference, or none: see :class:`Entry`.
    """

    format: Format
    shape: tuple[int, ...]
    dtype: str
    parts: Mapping[str, CodedPart]
    on_base: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the payloads; the index is not included."""
        return sum(part.payload.nbytes for part in self.parts.values())


class ArchiveWriter:
    """Writes tensors to a binary stream one after another.

    Nothing is readable before :meth:`finish`. The stream need not be seekable; without one, bytes
    are counted, and large payloads are not read. Tensors may rest on a base whose hash is given.

    >>> stream = io.BytesIO()
    >>> writer = ArchiveWriter(stream)
    >>> from dither.formats import Affine
    >>> writer.add("weight", Affine(4).encode(torch.linspace(-1, 1, 64))).name
    'weight'
    >>> writer.finish() == len(stream.getvalue())
    True
    """

    def __init__(self, stream: Writable | None, base: str | None = None) -> None:
        self._stream, self._base = stream, base
        self._entries: dict[str, Entry] = {}
        self._aliases: dict[str, str] = {}
        self._offset = 0
        self._write(head(on_base=base is not None))

    def add(self, name: str, tensor: Encoded | CodedTensor) -> Entry:
        """Write the payloads of one tensor, coding it first if need be; returns its entry."""
        coded = code(tensor) if isinstance(tensor, Encoded) else tensor
        if coded.on_base and self._base is None:
            raise ArchiveError(f"tensor {name!r} rests on a base, and none is named; give its hash")
        self._claim(name)
        parts = tuple(self._part(key, part) for key, part in coded.parts.items())
        entry = Entry(name, coded.format, coded.dtype, coded.shape, parts, coded.on_base)
        self._entries[name] = entry
        return entry

    def alias(self, name: str, target: str) -> None:
        """Store a second name of a tensor that has been added."""
        if target not in self._entries:
            raise ArchiveError(f"alias {name!r}: there is no tensor {target!r}; add it first")
        self._claim(name)
        self._aliases[name] = target

    def finish(
        self, metadata: Mapping[str, Any] | None = None, sites: Mapping[str, Any] | None = None
    ) -> int:
        """Write the index; returns the size of the archive in bytes."""
        entries = tuple(self._entries.values())
        index = Index(entries, self._aliases, metadata or {}, sites or {}, self._base)
        self._write(pack_index(index))
        return self._offset

    def _claim(self, name: str) -> None:
        if name in self._entries or name in self._aliases:
            raise ArchiveError(f"the name {name!r} is taken; every tensor needs its own")

    def _part(self, name: str, part: CodedPart) -> Part:
        codec, shape, alphabet, dtype, payload = part
        nbytes, offset = payload.nbytes, self._offset
        if nbytes <= INLINE_NBYTES:
            return Part(name, codec, shape, alphabet, dtype, nbytes, inline=payload.read())
        if self._stream is not None:
            self._stream.write(payload.read())
        self._offset += nbytes
        return Part(name, codec, shape, alphabet, dtype, nbytes, payload.crc, offset)

    def _write(self, data: bytes) -> None:
        if self._stream is not None:
            self._stream.write(data)
        self._offset += len(data)


def code(encoded: Encoded) -> CodedTensor:
    """Code every part of a tensor with the smallest codec."""
    parts: dict[str, CodedPart] = {}
    for name, part in encoded.codes.items():
        parts[name] = _code_codes(part, encoded.format.machine(name))
    for name, values in encoded.params.items():
        codec, payload = encode_array(_to_bytes(values), values.element_size())
        shape = tuple(values.shape)
        kept = Payload.of(payload)
        parts[name] = CodedPart(codec, shape, None, dtype_name(values.dtype), kept)
    return CodedTensor(encoded.format, encoded.shape, dtype_name(encoded.dtype), parts)


def _code_codes(part: Codes, machine: tuple[int, int] | None) -> CodedPart:
    values = part.values.detach().cpu().numpy()
    codec, payload = encode_codes(values, part.alphabet, machine)
    return CodedPart(codec, tuple(part.values.shape), part.alphabet, None, Payload.of(payload))


def _to_bytes(values: Tensor) -> NDArray[np.uint8]:
    flat = values.detach().cpu().contiguous().reshape(-1)
    if flat.stride() != (1,):  # a single value that was expanded: there is no view of it as bytes
        flat = flat.clone(memory_format=torch.contiguous_format)
    raw: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return raw


def pack(
    tensors: Mapping[str, Encoded | CodedTensor],
    aliases: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    sites: Mapping[str, Any] | None = None,
    base: Base | None = None,
) -> Archive:
    """An archive in memory.

    Args:
        tensors: tensors by name.
        aliases: second names, ``{alias: name}``.
        metadata: JSON values of the user's own.
        sites: encodings of activations, as ``dither.activations.Encodings.to_json`` gives them.
        base: what tensors rest on.
    """
    stream = io.BytesIO()
    _write_all(_writer(stream, base), tensors, aliases, metadata, sites)
    return Archive.from_bytes(stream.getvalue(), base=base)


def pack_into(
    memory: Callable[[int], memoryview],
    tensors: Mapping[str, Encoded | CodedTensor],
    aliases: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Archive:
    """The same in memory that somebody gives, for a number of bytes."""
    view = memory(packed_nbytes(tensors, aliases, metadata))
    _write_all(ArchiveWriter(_Filling(view)), tensors, aliases, metadata, None)
    return Archive.from_bytes(view)


class _Filling:
    """Writes into memory, from its beginning."""

    def __init__(self, memory: memoryview) -> None:
        self._memory, self._end = memory, 0

    def write(self, data: bytes, /) -> None:
        self._memory[self._end : self._end + len(data)] = data
        self._end += len(data)


def packed_nbytes(
    tensors: Mapping[str, Encoded | CodedTensor],
    aliases: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    sites: Mapping[str, Any] | None = None,
    base: Base | None = None,
) -> int:
    """The exact size of the archive that :func:`pack` would make."""
    return _write_all(_writer(None, base), tensors, aliases, metadata, sites)


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Encoded | CodedTensor],
    aliases: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    sites: Mapping[str, Any] | None = None,
    base: Base | None = None,
) -> int:
    """Write an archive to ``path``, which appears whole or not at all; returns its bytes."""
    with atomic_write(path) as file:
        return _write_all(_writer(file, base), tensors, aliases, metadata, sites)


def _writer(stream: Writable | None, base: Base | None) -> ArchiveWriter:
    return ArchiveWriter(stream, None if base is None else base.digest)


def _write_all(
    writer: ArchiveWriter,
    tensors: Mapping[str, Encoded | CodedTensor],
    aliases: Mapping[str, str] | None,
    metadata: Mapping[str, Any] | None,
    sites: Mapping[str, Any] | None,
) -> int:
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    for name, target in (aliases or {}).items():
        writer.alias(name, target)
    return writer.finish(metadata, sites)
