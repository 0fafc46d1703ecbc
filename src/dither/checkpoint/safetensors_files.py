"""Files of safetensors, and the ties that their metadata record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from dither.checkpoint.kinds import guarded
from dither.checkpoint.wrappers import unwrapped

ALIASES_KEY = "dither.aliases"
"""Key of the metadata of a ``.safetensors`` file under which ties stand: JSON, alias to name."""


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name, tied ones in shared memory."""

    def read() -> dict[str, Tensor]:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        ties = _recorded_ties(metadata, tensors)
        tensors |= {alias: tensors[name] for alias, name in ties.items()}
        # Our own files keep their names as they are; others may come from a wrapped model.
        return tensors if ALIASES_KEY in metadata else unwrapped(tensors)

    return guarded(path, "safetensors file", read)


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
