"""What a file is, by its first bytes, or else by its name."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dither.core import CheckpointError
from dither.terminal import printable

T = TypeVar("T")

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin", ".ckpt")

UNDERSTOOD = (
    f"understood are .safetensors, {', '.join(TORCH_SUFFIXES)} (PyTorch), .npz (NumPy) and "
    "Hugging Face model folders (also a *.index.json of shards)"
)
SAFETENSORS, TORCH, NUMPY, SHARDS = "safetensors", "torch", "numpy", "shards"

ZIP_MARK = b"PK\x03\x04"
PICKLE_MARK = b"\x80"
_ARCHIVE_MARK = b"\x8dDITHER\x1a"
_WRAPPED = slice(128, 136)
"""Where the mark stands in an archive that is one tensor of a file of safetensors."""
_HEAD = 512
_TAR = slice(257, 262)

_OTHERS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, and what it stands for was not downloaded; run: git lfs pull",
    ),
    (b"<!doctype html", "an HTML page, perhaps an error of a server; download the file again"),
    (b"<html", "an HTML page, perhaps an error of a server; download the file again"),
    (b"\x1f\x8b", "compressed by gzip; unpack it first"),
    (b"\xfd7zXZ", "compressed by xz; unpack it first"),
    (b"BZh", "compressed by bzip2; unpack it first"),
    (b"(\xb5/\xfd", "compressed by zstd; unpack it first"),
    (b"gguf", "a GGUF file, whose weights are quantized; take the .safetensors of that model"),
    (b"\x89hdf\r\n\x1a\n", "an HDF5 file (Keras, h5py); save its arrays with numpy.savez"),
)
"""First bytes, letters in lower case, of what is no checkpoint."""


def kind_of(path: Path) -> str:
    """One of :data:`SAFETENSORS`, :data:`TORCH`, :data:`NUMPY` and :data:`SHARDS`.

    Raises:
        CheckpointError: the file is none of these; the error says what it is, if that can be seen.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    name, suffix = path.name.lower(), path.suffix.lower()
    start = head.lstrip().lower()
    for mark, what in _OTHERS:
        if start.startswith(mark.lower()):
            raise CheckpointError(f"{str(path)!r} is {what}")
    if _ARCHIVE_MARK in (head[:8], head[_WRAPPED]) or suffix == ".dither":
        raise CheckpointError(f"{str(path)!r} is an archive; read it with dither.load or open")
    if name.endswith(".index.json"):
        return SHARDS
    if found := _by_content(path, head):
        return found
    if suffix == ".safetensors":
        return SAFETENSORS
    if suffix in TORCH_SUFFIXES or name.endswith(".pth.tar"):
        return TORCH
    if suffix == ".npz":
        return NUMPY
    raise CheckpointError(f"{str(path)!r} is not a checkpoint of a known kind; {UNDERSTOOD}")


def _by_content(path: Path, head: bytes) -> str | None:
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= path.stat().st_size - 8:
        return SAFETENSORS
    if head.startswith(PICKLE_MARK) or head[_TAR] == b"ustar":
        return TORCH
    if not head.startswith(ZIP_MARK):
        return None
    try:
        with zipfile.ZipFile(path) as members:
            names = members.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    if any(name.endswith(".pkl") for name in names):
        return TORCH
    return NUMPY if any(name.endswith(".npy") for name in names) else None


def guarded(path: Path, what: str, read: Callable[[], T]) -> T:
    """Call ``read``, whose library may raise anything on hostile bytes."""
    with path.open("rb"):  # so that a file that may not be read is an OSError of the usual kind
        pass
    try:
        return read()
    except CheckpointError:
        raise
    except (Exception, MemoryError) as error:
        reason = str(error).strip().splitlines() or [""]
        raise CheckpointError(
            f"{str(path)!r} is no {what}, or it is damaged or cut off "
            f"({type(error).__name__}: {printable(reason[0][:200])})"
        ) from error
