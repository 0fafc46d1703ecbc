"""Files of safetensors, and the ties that their metadata record."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dither.checkpoint.kinds import guarded
from dither.checkpoint.mapped import mapped_file, shown
from dither.checkpoint.wrappers import unwrapped

ALIASES_KEY = "dither.aliases"
"""Key of the metadata of a ``.safetensors`` file under which ties stand: JSON, alias to name."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types as the format names them; what others there are is left to its library."""


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name, tied ones in shared memory; the file is mapped into it."""

    def read() -> dict[str, Tensor]:
        # As arrays: for torch the library would set aside memory for the whole file.
        with safe_open(path, framework="np") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
        tensors = _mapped(path, names) if sys.byteorder == "little" else None
        if tensors is None:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in names}
        ties = _recorded_ties(metadata, tensors)
        tensors |= {alias: tensors[name] for alias, name in ties.items()}
        # Our own files keep their names as they are; others may come from a wrapped model.
        return tensors if ALIASES_KEY in metadata else unwrapped(tensors)

    return guarded(path, "safetensors file", read)


def _mapped(path: Path, names: list[str]) -> dict[str, Tensor] | None:
    """Tensors of a file that the library has checked; None where a type is not known here."""
    memory = mapped_file(path)
    start = 8 + int.from_bytes(memory[:8], "little")
    header: dict[str, Any] = json.loads(memory[8:start])
    if any(header[name]["dtype"] not in _DTYPES for name in names):
        return None
    tensors = {}
    for name in names:
        entry = header[name]
        offset = start + entry["data_offsets"][0]
        tensors[name] = shown(memory, offset, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return tensors


def _recorded_ties(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Ties that dither recorded, or ``safetensors.torch.save_model`` (one key for each)."""
    if ALIASES_KEY in metadata:
        ties = json.loads(metadata[ALIASES_KEY])
        if not isinstance(ties, dict):
            raise TypeError(f"its {ALIASES_KEY} is {ties!r}, not a JSON object")
    else:
        ties = {key: name for key, name in metadata.items() if _is_tie(key, name)}
    return {
        alias: name
        for alias, name in ties.items()
        if isinstance(name, str) and name in tensors and alias not in tensors
    }


def _is_tie(alias: str, name: str) -> bool:
    """Whether metadata may name a tensor twice: other notes of its author look otherwise.

    ``save_model`` leaves out what shares memory, such as ``lm_head.weight``, and notes the name it
    kept, ``embed.weight``.
    """
    ends = {text.rpartition(".")[2] if "." in text else None for text in (alias, name)}
    return len(ends) == 1 and None not in ends
