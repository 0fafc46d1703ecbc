"""Read any checkpoint: a file, a folder, or the index of one in shards."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePath

import torch
from torch import Tensor

from dither.checkpoint.kinds import NUMPY, SAFETENSORS, SHARDS, TORCH, UNDERSTOOD, guarded, kind_of
from dither.checkpoint.numpy_files import read_npz
from dither.checkpoint.safetensors_files import read_safetensors
from dither.checkpoint.torch_files import read_torch
from dither.core import DTYPES, CheckpointError
from dither.terminal import some_names

ARCHIVE_IN_FOLDER, ADAPTER_IN_FOLDER = (
    "model.dither.safetensors",
    "adapter_model.dither.safetensors",
)
"""What dither calls its archive in a folder that transformers or peft reads."""
_WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def read_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name; files are mapped into memory where that is possible.

    In PyTorch files the state dict may be nested (``{"state_dict": ..., "epoch": 3}``); the
    prefixes ``module.`` and ``_orig_mod.``, which wrappers add, are removed when all names have
    them.

    Args:
        path: a ``.safetensors``, ``.pt``, ``.pth``, ``.th``, ``.bin``, ``.ckpt`` or ``.npz``
            file, a Hugging Face model folder, or the ``*.index.json`` of a sharded one.
        key: where the state dict of a PyTorch file stands, when there are several: ``"ema"``,
            or ``"checkpoint.model"`` for one that is nested twice.

    Raises:
        CheckpointError: there is no such file, it is damaged, or of a kind not understood.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no file or folder {str(path)!r}; check the path")
    if key is not None and (path.is_dir() or kind_of(path) != TORCH):
        raise CheckpointError(
            f"a key ({key!r}) is for PyTorch files with several state dicts; {str(path)!r} is none"
        )
    tensors = _read_folder(path) if path.is_dir() else _read_file(path, key)
    if not tensors:
        raise CheckpointError(f"{str(path)!r} holds no tensors")
    for name, tensor in tensors.items():
        if str(tensor.dtype).removeprefix("torch.") not in DTYPES or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{str(path)!r}: {name!r} is a {tensor.layout} tensor of {tensor.dtype}; "
                f"expected dense tensors of {', '.join(DTYPES)}; convert it before"
            )
    return tensors


def archive_in(path: Path) -> Path:
    """The archive in a model folder that holds one; any other path as it is."""
    for name in (ARCHIVE_IN_FOLDER, ADAPTER_IN_FOLDER):
        if (path / name).is_file():
            return path / name
    return path


def _read_file(path: Path, key: str | None = None) -> dict[str, Tensor]:
    kind = kind_of(path)
    if kind == TORCH:
        return read_torch(path, key)
    return {SHARDS: _read_shards, SAFETENSORS: read_safetensors, NUMPY: read_npz}[kind](path)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    if (held := archive_in(folder)) != folder:
        return _read_file(held)  # which says that it is an archive
    modules = _modules(folder)
    for name in (*_WHOLE_FILES[:1], *_INDEX_FILES[:1], *_WHOLE_FILES[1:], *_INDEX_FILES[1:]):
        if (folder / name).is_file():
            return _read_file(folder / name) | modules
    if modules:
        return modules
    others = sorted(folder.glob("*.index.json")) or sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return _read_file(others[0])
    found = f"it has {some_names([path.name for path in others])}; name one; " if others else ""
    raise CheckpointError(
        f"the folder {str(folder)!r} has none of {', '.join((*_WHOLE_FILES, *_INDEX_FILES))}; "
        f"{found}{UNDERSTOOD}"
    )


def _modules(folder: Path) -> dict[str, Tensor]:
    """Weights in the folders that a ``modules.json`` of sentence-transformers lists.

    Those of ``2_Dense`` are called ``2_Dense.linear.weight`` and so on.
    """
    listed = folder / "modules.json"
    if not listed.is_file():
        return {}

    def read() -> list[str]:
        return [str(module["path"]) for module in json.loads(listed.read_text(encoding="utf-8"))]

    tensors: dict[str, Tensor] = {}
    for name in guarded(listed, "list of modules", read):
        inside = PurePath(name).name == name and name not in ("", "..")
        for whole in _WHOLE_FILES:
            if inside and (folder / name / whole).is_file():
                found = _read_file(inside_folder(folder / name / whole, folder))
                tensors |= {f"{name}.{key}": value for key, value in found.items()}
                break
    return tensors


def _read_shards(index: Path) -> dict[str, Tensor]:
    def read() -> dict[str, str]:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weights, dict) or not weights:
            raise CheckpointError(f"{str(index)!r} has no weight_map of names to files")
        return {str(name): str(shard) for name, shard in weights.items()}

    weights = guarded(index, "index of shards", read)
    shards = sorted(set(weights.values()))
    outside = [repr(name) for name in shards if PurePath(name).name != name or "\\" in name]
    if outside:
        raise CheckpointError(
            f"{str(index)!r} names shards outside its folder: {some_names(outside)}; expected "
            "plain file names"
        )
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{str(index)!r} needs {len(shards)} shards, of which {len(missing)} are missing: "
            f"{some_names(missing)}; download them into the same folder"
        )
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if shard.endswith(".index.json"):
            raise CheckpointError(f"{str(index)!r} names the index {shard!r} as one of its shards")
        tensors |= _read_file(inside_folder(index.parent / shard, index.parent))
    if lost := [repr(name) for name in weights if name not in tensors]:
        raise CheckpointError(
            f"{str(index)!r} names {len(lost)} tensors that its shards lack: {some_names(lost)}; "
            "download the folder again"
        )
    return tensors


def inside_folder(path: Path, folder: Path) -> Path:
    """A file that a file of the folder names; refused where it is a link out of it.

    The cache of Hugging Face is one: links to its own ``blobs``.
    """
    target, home = path.resolve(), folder.resolve()
    homes = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    if not any(target.is_relative_to(place) for place in homes):
        raise CheckpointError(
            f"{str(path)!r} is a link to {str(target)!r}, out of its folder; copy that file to "
            "where the link is, if it is the right one"
        )
    return path
