"""A plain file for peers that have none of their own: safetensors with codes packed to their bits.

Some toolkits end in a model whose weights are rounded but still floats, or in a file for a runtime
that does not run here. What they would have to store, codes at their width with fp16 scales, zeros
or tables, goes into one file of safetensors, and the rest in fp16: the least that such a file takes
without entropy coding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.peers.contract import Task

FILE = "model.safetensors"


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of any shape, each in 0 to ``2**bits - 1``, one after the other."""
    flat = codes.flatten().numpy().astype(np.uint8)
    planes = np.unpackbits(flat[:, None], axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(planes))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo ``pack``: uint8 codes ``(count,)``."""
    planes = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
    wide = np.zeros((count, 8), np.uint8)
    wide[:, 8 - bits :] = planes
    return torch.from_numpy(np.packbits(wide, axis=1)[:, 0])


class Container:
    """Tensors under their names, each plain, affine, by tables or by a codebook of vectors."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._about: dict[str, Any] = {}

    def plain(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor, in fp16 if it is floating-point."""
        kept = tensor.detach().half() if tensor.is_floating_point() else tensor
        self._tensors[name] = kept.contiguous()

    def affine(self, name: str, codes: Tensor, bits: int, steps: tuple[Tensor, Tensor]) -> None:
        """Keep ``(codes - zero) * scale``.

        Args:
            name: of the tensor.
            codes: of the tensor's shape, in 0 to ``2**bits - 1``.
            bits: of a code, up to 8.
            steps: scale and zero, of as many values as there are groups: each belongs to an equal
                run of weights. A zero that is the same for all is kept once.
        """
        scale, zero = (step.detach().float().flatten() for step in steps)
        same = bool((zero == zero[0]).all())
        self._tensors[f"{name}.codes"] = pack(codes, bits)
        self._tensors[f"{name}.scale"] = scale.half()
        self._tensors[f"{name}.zero"] = zero[:1].half() if same else zero.half()
        self._about[name] = {"bits": bits, "shape": list(codes.shape)}

    def tables(self, name: str, codes: Tensor, bits: int, tables: Tensor) -> None:
        """Keep ``tables[group, codes]``: tables ``(groups, 2**bits)`` for equal runs of weights."""
        self._tensors[f"{name}.codes"] = pack(codes, bits)
        self._tensors[f"{name}.table"] = tables.detach().half().contiguous()
        self._about[name] = {"bits": bits, "shape": list(codes.shape)}

    def vectors(
        self, name: str, codes: Tensor, bits: int, centroids: Tensor, shape: Sequence[int]
    ) -> None:
        """Keep ``centroids[codes]``, of one codebook ``(entries, width)``, in the given shape."""
        self._tensors[f"{name}.codes"] = pack(codes, bits)
        self._tensors[f"{name}.centroids"] = centroids.detach().half().contiguous()
        self._about[name] = {"bits": bits, "shape": list(shape)}

    def write(self, folder: Path) -> None:
        """Write the file into a folder."""
        about = json.dumps(self._about, separators=(",", ":"))
        save_file(self._tensors, folder / FILE, {"about": about})


def restore(task: Task, _setting: str, folder: Path) -> nn.Module:
    """Fill a model of a task with the tensors of the file: ``Peer.restore`` of most that use it."""
    model = task.blank()
    model.load_state_dict(read(folder))
    return model


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of the file in a folder by their names, decoded to fp32."""
    with safe_open(folder / FILE, "pt") as file:
        about = json.loads(file.metadata()["about"])
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    decoded = {}
    for name, entry in about.items():
        shape = torch.Size(entry["shape"])
        book = found.pop(f"{name}.centroids", None)
        count = shape.numel() if book is None else shape.numel() // book.shape[1]
        codes = unpack(found.pop(f"{name}.codes"), entry["bits"], count)
        if book is not None:
            value = book.float()[codes.long()]
        elif (table := found.pop(f"{name}.table", None)) is not None:
            rows = codes.reshape(len(table), -1).long()
            value = table.float().gather(1, rows)
        else:
            scale, zero = (found.pop(f"{name}.{key}").float() for key in ("scale", "zero"))
            value = (codes.reshape(len(scale), -1) - zero[:, None]) * scale[:, None]
        decoded[name] = value.reshape(shape)
    return decoded | {k: v.float() if v.is_floating_point() else v for k, v in found.items()}
