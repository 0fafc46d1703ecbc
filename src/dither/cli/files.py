"""Read any source, write any kind of checkpoint."""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from dither.archive import Archive, atomic_write, is_archive
from dither.archive.layout import MAGIC
from dither.checkpoint import ALIASES_KEY, TORCH_SUFFIXES, read_checkpoint
from dither.core import DTYPES, ArchiveError, CheckpointError
from dither.integrations.model_folder import check_target, is_model_folder
from dither.progress import steps

OUTPUT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES, ".npz")

_SAFETENSORS_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "bool": "BOOL",
}
_PAGE = b"<!doctype html"
_NUMPY_LACKS = ("bfloat16", "float8_e4m3fn", "float8_e5m2")


@contextmanager
def open_source(
    path: Path, max_nbytes: int | None = None, base: Path | None = None
) -> Iterator[Mapping[str, Tensor]]:
    """The tensors of an archive, read when asked for, or of any other checkpoint.

    A base is for an archive that rests on one, and not looked at for others.
    """
    if not is_archive(path):
        yield read_checkpoint(path)
        return
    with open_archive(path, max_nbytes, base) as archive:
        archive.check_total()
        yield archive


def open_archive(path: Path, max_nbytes: int | None, base: Path | None) -> Archive:
    """An archive, on a base if it rests on one."""
    if base is not None:
        with Archive.open(path, max_nbytes) as archive:
            base = None if archive.base is None else base
    return Archive.open(path, max_nbytes, base)


def check_archive_output(output: Path, source: Path) -> None:
    """Refuse, before any work, to write an archive where it would destroy something else."""
    _check_output(output, source)
    if output.exists() and output.stat().st_size and not _begins_as_archive(output):
        raise CheckpointError(
            f"{str(output)!r} exists and is no archive; remove it, or name another file with -o"
        )


def names_folder(output: str) -> bool:
    """Whether an output is meant as a folder: its path ends as one, or it is one."""
    return output.endswith(("/", os.sep)) or Path(output).is_dir()


def check_folder_output(output: Path, source: Path) -> None:
    """Refuse, before any work, to write a model folder where none can be, or is another."""
    if not is_model_folder(source):
        raise CheckpointError(
            f"the output {str(output)!r} is a folder, and {str(source)!r} is no model folder with "
            "a config.json; name a file"
        )
    check_target(output, source)


def check_tensor_output(output: Path, source: Path, *, named: bool) -> None:
    """Refuse, before any work, to write tensors where it would destroy something else."""
    if output.suffix.lower() not in OUTPUT_SUFFIXES:
        raise CheckpointError(
            f"{str(output)!r} has the suffix {output.suffix!r}; expected one of "
            f"{', '.join(OUTPUT_SUFFIXES)}"
        )
    _check_output(output, source)
    if output.exists() and not named:
        raise CheckpointError(
            f"{str(output)!r} exists, perhaps the file that was compressed; name the output with -o"
        )


def check_page_output(output: Path, source: Path, against: Path | None) -> None:
    """Refuse, before any work, to write a page where it would destroy something else."""
    for other in (source, against):
        if other is not None:
            _check_output(output, other)
    if not output.exists() or not output.stat().st_size:
        return
    with output.open("rb") as file:
        if not file.read(len(_PAGE)).lower().startswith(_PAGE):
            raise CheckpointError(
                f"{str(output)!r} exists and is no HTML page; remove it, or name another file "
                "with -o"
            )


def check_export_output(output: Path, source: Path) -> None:
    """Refuse, before any work, to write an ONNX file where it would destroy something else."""
    if output.suffix.lower() != ".onnx":
        raise CheckpointError(f"{str(output)!r} has the suffix {output.suffix!r}; expected .onnx")
    _check_output(output, source)


def _check_output(output: Path, source: Path) -> None:
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir():
        raise CheckpointError(
            f"the output {str(output)!r} lies in {str(above)!r}, which is no folder; name another"
        )
    if output.is_dir():
        raise CheckpointError(f"the output {str(output)!r} is a folder; name a file")
    if not output.exists():
        return
    if not output.is_file():
        raise CheckpointError(f"the output {str(output)!r} is no ordinary file; name another")
    if source.exists() and output.samefile(source):
        raise CheckpointError(
            f"the output {str(output)!r} is the source itself; name another file with -o"
        )


def make_folder(output: Path) -> None:
    """The folder of an output, where it is new."""
    output.absolute().parent.mkdir(parents=True, exist_ok=True)


def _begins_as_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def write_tensors(path: Path, archive: Archive) -> None:
    """Write a decoded archive in the kind that the suffix of ``path`` names, whole or not at all.

    ``.safetensors`` and ``.npz`` are written one tensor at a time. Ties are kept as shared tensors
    in PyTorch files and as a note in the metadata of ``.safetensors``; in ``.npz`` each name has
    its values.
    """
    suffix = path.suffix.lower()
    lacking = {".safetensors": set(DTYPES) - set(_SAFETENSORS_TYPES), ".npz": set(_NUMPY_LACKS)}
    for entry in archive.entries.values():
        if entry.dtype in lacking.get(suffix, ()):
            raise CheckpointError(
                f"tensor {entry.name!r} is of type {entry.dtype}, which {suffix} files cannot "
                "hold; write a .pt file"
            )
    if archive.original_nbytes > archive.max_nbytes:
        raise ArchiveError(
            f"the tensors would take {archive.original_nbytes} bytes, more than "
            f"max_nbytes={archive.max_nbytes}; if you trust the file, allow more"
        )
    archive.check_total()
    _check_names(path, suffix, archive)
    with atomic_write(path) as file:
        if suffix == ".safetensors":
            _write_safetensors(file, archive)
        elif suffix == ".npz":
            _write_npz(file, archive)
        else:
            _write_torch(file, archive)


def _check_names(path: Path, suffix: str, archive: Archive) -> None:
    """Refuse names that the file could not hold, or that would name other files than its own."""
    for name in archive:
        steps = re.split(r"[/\\]", name)
        if suffix == ".npz" and (not name.isprintable() or ".." in steps or "" in steps[:-1]):
            why = "a path out of the folder, or what is no text, as the name of a member"
        elif suffix == ".safetensors" and _has_surrogates(name):
            why = "a name that is no Unicode text"
        else:
            continue
        raise CheckpointError(
            f"{str(path)!r}: tensor {name!r} would be {why}; write a .pt file, which takes any"
        )


def _has_surrogates(name: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in name)


def _write_safetensors(file: BinaryIO, archive: Archive) -> None:
    """Write the format by hand: the library's writer holds all tensors, and all bytes, at once."""
    # Large items first keep every tensor aligned; the format allows no gaps.
    entries = sorted(archive.entries.values(), key=lambda e: (-DTYPES[e.dtype].itemsize, e.name))
    ties = json.dumps(dict(archive.aliases), sort_keys=True)
    header: dict[str, object] = {"__metadata__": {"format": "pt", ALIASES_KEY: ties}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.decoded_nbytes
        if entry.name == "__metadata__":
            raise CheckpointError(
                "a .safetensors file cannot hold a tensor named '__metadata__'; write a .pt file"
            )
        header[entry.name] = {
            "dtype": _SAFETENSORS_TYPES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    sizes = {entry.name: entry.decoded_nbytes for entry in entries}
    file.writelines(
        archive[name].contiguous().reshape(-1).view(torch.uint8).numpy().data
        for name in steps("writing", sizes, sizes.__getitem__)
    )


def _write_npz(file: BinaryIO, archive: Archive) -> None:
    """As ``numpy.savez``, which takes no array called ``file`` and holds all of them at once."""
    with zipfile.ZipFile(file, "w") as members:
        for name in steps("writing", archive):
            with members.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, archive[name].numpy(), allow_pickle=False)


class _Kept:
    """A file that keeps the first error of writing: torch raises one of its own, without a cause.

    Attributes:
        error: of the system.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes, /) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def _write_torch(file: BinaryIO, archive: Archive) -> None:
    state, kept = archive.state_dict(), _Kept(file)
    try:
        torch.save(state, cast(BinaryIO, kept))  # it takes whatever can write
    except RuntimeError:
        if kept.error is not None:
            raise kept.error from None
        raise
