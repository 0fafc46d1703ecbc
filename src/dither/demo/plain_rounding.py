"""Plain rounding, which dither is compared with: one grid from minimum to maximum per tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dither.core import CheckpointError

CODES, GRID = "codes:", "grid:"
"""Prefixes of the names of packed codes and of their two float32 values: minimum and step."""


def pack_rounded(state: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Round every weight (two dimensions or more) to ``bits`` and pack the codes without gaps.

    Biases, batch norm and counters stay as they are.
    """
    packed: dict[str, Tensor] = {}
    for name, value in state.items():
        if not _is_weight(value):
            packed[name] = value.clone()
            continue
        low, high = value.min(), value.max()
        step = (high - low) / (2**bits - 1)
        codes = ((value - low) / step).round().reshape(-1).to(torch.uint8).numpy()
        packed[CODES + name] = torch.from_numpy(_pack(codes, bits))
        packed[GRID + name] = torch.stack([low, step])
    return packed


def unpack_rounded(
    packed: Mapping[str, Tensor], bits: int, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The rounded state dict; the shapes are the network's own."""
    state: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name in packed:
            state[name] = packed[name]
            continue
        low, step = packed[GRID + name]
        codes = _unpack(packed[CODES + name].numpy(), bits, int(np.prod(shape)))
        state[name] = (torch.from_numpy(codes).float() * step + low).reshape(shape)
    return state


def payload_nbytes(packed: Mapping[str, Tensor]) -> int:
    """Bytes of the values alone: names, shapes and header are not held against plain rounding."""
    return sum(value.numel() * value.element_size() for value in packed.values())


def save_rounded(path: Path, packed: dict[str, Tensor], bits: int) -> None:
    """Write packed tensors as a safetensors file that says its bits."""
    path.write_bytes(save(packed, {"bits": str(bits)}))


def load_rounded(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read what :func:`save_rounded` wrote."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if "bits" not in metadata:
        raise CheckpointError(f"{str(path)!r} was not written by save_rounded: it has no bits")
    return unpack_rounded(packed, int(metadata["bits"]), shapes)


def _is_weight(value: Tensor) -> bool:
    return value.is_floating_point() and value.ndim > 1


def _pack(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    digits = codes[:, None] >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(digits)


def _unpack(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    digits = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    codes: npt.NDArray[np.uint8] = (digits << np.arange(bits, dtype=np.uint8)).sum(1, np.uint8)
    return codes
