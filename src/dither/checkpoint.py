"""Read checkpoints as others write them: safetensors, PyTorch, Hugging Face folders, NumPy.

Nothing in a file is executed: PyTorch files are read with ``weights_only=True`` and NumPy files
without pickle. Tied weights, where a file records them, share memory in the result.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from dither.core import DTYPES, CheckpointError, some_names

T = TypeVar("T")

ALIASES_KEY = "dither.aliases"
"""Key of the metadata of a ``.safetensors`` file under which ties stand: JSON, alias to name."""

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin", ".ckpt")

_UNDERSTOOD = (
    f"understood are .safetensors, {', '.join(TORCH_SUFFIXES)} (PyTorch), .npz (NumPy) and "
    "Hugging Face model folders (also a *.index.json of shards)"
)
_WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_MODEL_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "model_state",
    "net",
    "network",
    "params",
    "params_ema",
    "ema",
    "ema_state_dict",
    "module",
    "weights",
)
_TRAINING_KEYS = re.compile(r"optim|sched|scaler|callbacks|loops|(^|_)rng", re.IGNORECASE)
_WRAPPERS = ("module.", "_orig_mod.")
_DEEPEST = 4
_ZIP_MARK = b"PK\x03\x04"


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
    if key is not None and path.suffix.lower() not in TORCH_SUFFIXES:
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


def _read_file(path: Path, key: str | None = None) -> dict[str, Tensor]:
    suffix = path.suffix.lower()
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if suffix == ".safetensors":
        return _read_safetensors(path)
    if suffix in TORCH_SUFFIXES:
        return _read_torch(path, key)
    if suffix == ".npz":
        return _read_npz(path)
    if suffix == ".dither":
        raise CheckpointError(f"{str(path)!r} is an archive; read it with dither.load or open")
    raise CheckpointError(f"{str(path)!r} is not a checkpoint of a known kind; {_UNDERSTOOD}")


def _guarded(path: Path, what: str, read: Callable[[], T]) -> T:
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
            f"({type(error).__name__}: {reason[0][:200]})"
        ) from error


# --- safetensors ---------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    def read() -> dict[str, Tensor]:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        ties = _recorded_ties(metadata, tensors)
        tensors |= {alias: tensors[name] for alias, name in ties.items()}
        # Our own files keep their names as they are; others may come from a wrapped model.
        return tensors if ALIASES_KEY in metadata else _unwrapped(tensors)

    return _guarded(path, "safetensors file", read)


def _recorded_ties(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Ties that dither recorded, or ``safetensors.torch.save_model`` (one key for each)."""
    if ALIASES_KEY in metadata:
        ties = json.loads(metadata[ALIASES_KEY])
        if not isinstance(ties, dict):
            raise TypeError(f"its {ALIASES_KEY} is {ties!r}, not a JSON object")
    else:
        ties = {key: name for key, name in metadata.items() if key != "format"}
    return {
        alias: name
        for alias, name in ties.items()
        if isinstance(name, str) and name in tensors and alias not in tensors
    }


# --- PyTorch -------------------------------------------------------------------------------------


def _read_torch(path: Path, key: str | None) -> dict[str, Tensor]:
    with path.open("rb") as file:
        mapped = file.read(len(_ZIP_MARK)) == _ZIP_MARK

    def read() -> object:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:
            _refuse_pickle(path, str(error))
            raise

    found, state = _find_state(path, _guarded(path, "PyTorch file", read), key)
    wrong = [f"{name!r} ({type(v).__name__})" for name, v in state.items() if not _is_tensor(v)]
    if wrong:
        raise CheckpointError(
            f"{str(path)!r}{found} has entries that are no tensors: {some_names(wrong)}; save a "
            "state dict of tensors only"
        )
    return _unwrapped({name: value.detach() for name, value in state.items()})


def _refuse_pickle(path: Path, reason: str) -> None:
    """Say what to do about a file that only pickle can read, if that is the reason."""
    unsupported = re.search(r"Unsupported (?:global|class)[^\n]*?([\w]+(?:\.[\w<>]+)+)", reason)
    scripted = "TorchScript" in reason
    if not (unsupported or scripted or ".tar" in reason):
        return
    if unsupported:
        holds = f"it holds an object of type {unsupported[1]}"
    else:
        holds = "it is a TorchScript archive" if scripted else "it has the .tar form of 2017"
    load = "torch.jit.load(path)" if scripted else "torch.load(path, weights_only=False)"
    raise CheckpointError(
        f"{str(path)!r} is more than tensors: {holds}, and reading it could run code from the "
        f"file, which dither does not do. If you trust it, load it yourself with {load} and save "
        "its state dict: torch.save(model.state_dict(), 'weights.pt')"
    )


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _find_state(path: Path, loaded: object, key: str | None) -> tuple[str, Mapping[Any, Any]]:
    """The state dict in what a file holds, and where it was found."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{str(path)!r} holds a {type(loaded).__name__}, not a state dict; save "
            "model.state_dict()"
        )
    choices = {".".join(where): state for where, state in _states(loaded)}
    if key is not None:
        if key not in choices:
            raise CheckpointError(
                f"{str(path)!r} has no state dict under {key!r}; there are "
                f"{some_names([repr(where) for where in choices]) or 'none'}"
            )
    elif not choices:
        raise CheckpointError(
            f"{str(path)!r} holds no state dict; it has the entries "
            f"{some_names([repr(name) for name in loaded]) or '(none)'}"
        )
    elif "" in choices:
        key = ""
    else:
        named = [where for where in choices if where.split(".")[0] in _MODEL_KEYS]
        likely = named or list(choices)
        if len(likely) > 1:
            raise CheckpointError(
                f"{str(path)!r} holds several state dicts: {some_names([repr(x) for x in likely])}"
                "; say which with key=... (on the command line: --key)"
            )
        key = likely[0]
    state = choices[key]
    if strange := [repr(name) for name in state if not isinstance(name, str)]:
        raise CheckpointError(
            f"{str(path)!r} has names that are no strings: {some_names(strange)}; save a state dict"
        )
    return (f" (under {key!r})" if key else ""), state


def _states(
    value: Mapping[Any, Any], where: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """All mappings that hold tensors, outermost only; what training left is passed over.

    A mapping that also nests a model's state dict under a usual name is not itself one: its
    tensors are an epoch, a score.
    """
    nested = [(name, item) for name, item in value.items() if isinstance(item, Mapping)]
    nests_model = any(name in _MODEL_KEYS and any(_states(item)) for name, item in nested)
    if not nests_model and any(map(_is_tensor, value.values())):
        yield where, value
        return
    if len(where) >= _DEEPEST:
        return
    for name, item in nested:
        if not isinstance(name, str) or _TRAINING_KEYS.search(name) or "param_groups" in item:
            continue
        yield from _states(item, (*where, name))


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes that DistributedDataParallel and torch.compile add."""
    while tensors:
        for prefix in _WRAPPERS:
            if all(name.startswith(prefix) and name != prefix for name in tensors):
                tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
                break
        else:
            break
    return tensors


# --- Hugging Face folders ------------------------------------------------------------------------


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for name in (*_WHOLE_FILES[:1], *_INDEX_FILES[:1], *_WHOLE_FILES[1:], *_INDEX_FILES[1:]):
        if (folder / name).is_file():
            return _read_file(folder / name)
    others = sorted(folder.glob("*.index.json")) or sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return _read_file(others[0])
    found = f"it has {some_names([path.name for path in others])}; name one; " if others else ""
    raise CheckpointError(
        f"the folder {str(folder)!r} has none of {', '.join((*_WHOLE_FILES, *_INDEX_FILES))}; "
        f"{found}{_UNDERSTOOD}"
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    def read() -> dict[str, str]:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weights, dict) or not weights:
            raise CheckpointError(f"{str(index)!r} has no weight_map of names to files")
        return {str(name): str(shard) for name, shard in weights.items()}

    weights = _guarded(index, "index of shards", read)
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
        tensors |= _read_file(index.parent / shard)
    if lost := [repr(name) for name in weights if name not in tensors]:
        raise CheckpointError(
            f"{str(index)!r} names {len(lost)} tensors that its shards lack: {some_names(lost)}; "
            "download the folder again"
        )
    return tensors


# --- NumPy ---------------------------------------------------------------------------------------


def _read_npz(path: Path) -> dict[str, Tensor]:
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

    return _guarded(path, "NumPy .npz file", read)


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
