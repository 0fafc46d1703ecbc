"""Where the bytes of an archive come from: memory, a file that many may read at once, a URL."""

from __future__ import annotations

import json
import os
import struct
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

from dither.archive.layout import (
    HEAD,
    MAGIC,
    TAIL,
    Index,
    check_head,
    index_room,
    unpack_index,
    unpack_tail,
)
from dither.archive.remote import FIRST, RemoteSource, is_url
from dither.checkpoint import archive_in
from dither.core import ArchiveError

_TAIL = 16
"""Bytes at the end of an archive that tell it from others: lengths and checksum of its index."""

WRAPPER_NBYTES = 128
"""Bytes of :func:`wrapper`."""
_LENGTH = struct.Struct("<Q")


def wrapper(nbytes: int) -> bytes:
    """What makes a file of safetensors of an archive of ``nbytes`` that follows.

    The file has one tensor of bytes, ``dither``. Loaders that want safetensors pass it on, and
    :func:`unwrapped` reads the archive where it stands.

    >>> from safetensors.torch import load
    >>> bytes(load(wrapper(3) + b"abc")["dither"].tolist())
    b'abc'
    """
    tensor = {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}
    text = json.dumps({"__metadata__": {"format": "pt"}, "dither": tensor}, separators=(",", ":"))
    header = text.encode().ljust(WRAPPER_NBYTES - _LENGTH.size)
    return _LENGTH.pack(len(header)) + header


class Near:
    """Bytes that are read in small pieces at no cost."""

    ahead = 0
    """Bytes to ask for at once."""

    def bringing(self, begin: int, end: int) -> AbstractContextManager[None]:
        """Nothing is brought."""
        return nullcontext()

    def check_unchanged(self) -> None:
        """Nothing is known of changes."""


class BytesSource(Near):
    """Bytes in memory."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = data
        self.size = len(data)

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on."""
        return bytes(self._data[offset : offset + length])

    def close(self) -> None:
        """Nothing is open."""

    def __reduce__(self) -> tuple[object, ...]:
        """Copies have the bytes, wherever they were."""
        return BytesSource, (bytes(self._data),)


class FileSource(Near):
    """A file, read at any place by any thread of any process that shares its descriptor.

    A forked process shares the place at which a file is read, too: it is never used, but where the
    system has no reading at a place, and no fork either. A copy, a pickle and a spawned process
    open the file anew, by the path that it had, and refuse another that stands there by then.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path).absolute()
        self._file: BinaryIO = Path(path).open("rb")  # noqa: SIM115 - closed with the archive
        self._lock = threading.Lock()
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on.

        Raises:
            ArchiveError: the file has become shorter.
            OSError: it cannot be read.
        """
        pieces: list[bytes] = []
        left = length
        while left:  # a system may read less than asked for, and reads 2 GiB at most
            piece = self._read(offset + length - left, left)
            if not piece:
                raise ArchiveError(f"the file ended at {left} bytes before its size")
            pieces.append(piece)
            left -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read(self, offset: int, length: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), length, offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.read(length)

    def close(self) -> None:
        """Close this process's descriptor."""
        self._file.close()

    def __reduce__(self) -> tuple[object, ...]:
        """By path, with what the file ends in."""
        return _reopened, (self._path, self.size, self._tail())

    def _tail(self) -> bytes:
        if self._file.closed:
            raise ValueError(f"the archive {str(self._path)!r} is closed; copy it while it is open")
        return self.read(self.size - _TAIL, _TAIL)


def _reopened(path: Path, size: int, tail: bytes) -> FileSource:
    source = FileSource(path)
    if source.size != size or source._tail() != tail:  # noqa: SLF001 - its own kind
        source.close()
        raise ArchiveError(
            f"{str(path)!r} is no longer the archive that was pickled; open it again"
        )
    return source


class WrappedSource:
    """An archive that is one tensor of a file of safetensors: see :func:`wrapper`."""

    def __init__(self, whole: BytesSource | FileSource | RemoteSource) -> None:
        self._whole = whole
        self.size, self.ahead = whole.size - WRAPPER_NBYTES, whole.ahead

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on."""
        return self._whole.read(offset + WRAPPER_NBYTES, length)

    def bringing(self, begin: int, end: int) -> AbstractContextManager[None]:
        """Ask for a range at once, and read from it within the block."""
        return self._whole.bringing(begin + WRAPPER_NBYTES, end + WRAPPER_NBYTES)

    def check_unchanged(self) -> None:
        """See that the file is the one that was opened, as far as that is known."""
        self._whole.check_unchanged()

    def close(self) -> None:
        """End reading."""
        self._whole.close()


Source = BytesSource | FileSource | RemoteSource | WrappedSource


def source_of(path: str | os.PathLike[str]) -> Source:
    """The archive in a file, a model folder or behind a URL; the file may be one of safetensors.

    A URL costs a request more to see that, so it says so by its end.
    """
    if is_url(path):
        remote = RemoteSource(path)
        return unwrapped(remote) if path.partition("?")[0].endswith(".safetensors") else remote
    return unwrapped(FileSource(archive_in(Path(path))))


def unwrapped(whole: BytesSource | FileSource | RemoteSource) -> Source:
    """The archive within a file of safetensors, if it is one."""
    within = whole.size - WRAPPER_NBYTES
    if within > 0 and whole.read(0, WRAPPER_NBYTES) == wrapper(within):
        return WrappedSource(whole)
    return whole


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an archive by its name or its first bytes, also one in safetensors.

    So is a model folder that holds one.
    """
    path = archive_in(Path(path))
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(WRAPPER_NBYTES + len(MAGIC))
    inner_size = max(path.stat().st_size - WRAPPER_NBYTES, 0)
    is_wrapped = head == wrapper(inner_size) + MAGIC
    return path.suffix.lower() == ".dither" or head.startswith(MAGIC) or is_wrapped


def read_index(source: Source, max_nbytes: int, *, is_default: bool) -> Index:
    """The index of an archive; where it is none, the source is closed.

    Args:
        source: of bytes.
        max_nbytes: most memory.
        is_default: whether that is what nobody asked for.
    """
    room = index_room(source.size, max_nbytes, is_default=is_default)
    try:
        with source.bringing(max(source.size - FIRST, 0), source.size):
            start = source.read(0, min(HEAD.size, source.size))
            check_head(start)
            tail = source.read(max(source.size - TAIL.size, 0), min(TAIL.size, source.size))
            offset, packed = unpack_tail(tail, source.size, room)
            return unpack_index(start, source.read(offset, packed), tail, offset)
    except BaseException:
        source.close()
        raise
