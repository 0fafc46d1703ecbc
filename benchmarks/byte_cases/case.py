"""What a case is, and how its result becomes bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path

import torch
from torch import Tensor

from dither.archive import Archive, write
from dither.core import Encoded
from dither.formats import Raw


@dataclass(frozen=True)
class Case:
    """One file.

    Attributes:
        name: ``room/what/how``.
        make: the bytes of the file; the seed is 0 and one thread computes when it is called.
        is_slow: takes more than a few seconds.
        needs_data: reads the folder that ``DITHER_DATA`` names.
    """

    name: str
    make: Callable[[], bytes]
    is_slow: bool = False
    needs_data: bool = False


def saved(archive: Archive) -> bytes:
    """An archive's file."""
    with _path() as path:
        archive.save(path)
        return path.read_bytes()


def written(encoded: Mapping[str, Encoded]) -> bytes:
    """The file of tensors that are encoded already."""
    with _path() as path:
        write(path, encoded)
        return path.read_bytes()


def stored(tensors: Mapping[str, Tensor]) -> bytes:
    """The file of plain tensors."""
    return written({name: Raw().encode(value) for name, value in tensors.items()})


def short(spec: object) -> str:
    """An encoder or method with the settings that are not defaults."""
    if not is_dataclass(spec):
        return str(spec).removeprefix("torch.")
    given = [(item, getattr(spec, item.name)) for item in fields(spec)]
    shown = [
        f"{item.name}={short(value)}"
        for item, value in given
        if item.default is MISSING or value != item.default
    ]
    return f"{type(spec).__name__}({', '.join(shown)})"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal weights of one seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def _path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "case.dither"
