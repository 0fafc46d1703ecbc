"""Files of ``numpy.savez``."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dither.checkpoint.kinds import guarded
from dither.core import CheckpointError


def read_npz(path: Path) -> dict[str, Tensor]:
    """All arrays of a file, by name."""

    def read() -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        with zipfile.ZipFile(path) as members:
            sizes = {info.filename: info.file_size for info in members.infolist()}
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                member = f"{name}.npy" if f"{name}.npy" in sizes else name
                _check_npy(path, member, sizes[member])
                tensors[name] = _from_numpy(path, name, arrays[name])
        return tensors

    return guarded(path, "NumPy .npz file", read)


def _check_npy(path: Path, member: str, size: int) -> None:
    """Refuse an array whose header asks for more memory than the file has bytes for it."""
    with zipfile.ZipFile(path) as members, members.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            return
        shape, _, dtype = read_header(file)
        need = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if not dtype.hasobject and need > size:
            raise CheckpointError(
                f"{str(path)!r}: {member!r} claims {need} bytes of values in {size} bytes"
            )


def _from_numpy(path: Path, name: str, array: object) -> Tensor:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fciub":
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise CheckpointError(
            f"{str(path)!r}: {name!r} has the type {kind}; expected numbers; convert it before"
        )
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.require(native, requirements=["W"]))
