"""HQQ: half-quadratic quantization, Badri and Shaji 2023, without data, at 8 to 2 bits.

Every weight of two or more dimensions goes through its ``Quantizer``, as the matrix ``(outputs,
rest)``, in groups along rows (axis 1): its own layers take no embeddings and no convolutions. The
packed codes, scales and zeros, in fp16 as its layers keep them, are written with ``torch.save``, as
its ``save_quantized`` does, and so is what is not quantized, in fp16. Scored in fp32.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from torch import nn

from benchmarks.peers.contract import Peer, Task, run, version_of

FILE = "qmodel.pt"
SETTINGS = {  # bits and weights of a group
    "int8-g128": (8, 128),
    "int4-g64": (4, 64),
    "int3-g64": (3, 64),
    "int2-g32": (2, 32),
    "int2-g16": (2, 16),
}


def group_of(count: int, wanted: int) -> int:
    """The largest size up to ``wanted`` that makes a whole number of fours of groups.

    Four codes of 2 bits are packed into a byte, from four groups.
    """
    return max(d for d in range(1, min(count, wanted) + 1) if count % (4 * d) == 0)


def compress(task: Task, setting: str, folder: Path) -> None:
    """Quantize every weight, and write all with ``torch.save``."""
    quantizer = importlib.import_module("hqq.core.quantize").Quantizer
    bits, group = SETTINGS[setting]
    state: dict[str, object] = {}
    for name, tensor in task.load().state_dict().items():
        if not tensor.is_floating_point():
            state[name] = tensor
        elif tensor.dim() < 2:
            state[name] = tensor.half()
        else:
            codes, meta = quantizer.quantize(
                tensor.flatten(1),
                nbits=bits,
                group_size=group_of(tensor.numel(), group),
                axis=1,
                device="cpu",
            )
            meta |= {"scale": meta["scale"].half(), "zero": meta["zero"].half()}
            state[name] = {"W_q": codes, "meta": meta}
    torch.save(state, folder / FILE)


def restore(task: Task, _setting: str, folder: Path) -> nn.Module:
    """Load and dequantize in fp32."""
    quantizer = importlib.import_module("hqq.core.quantize").Quantizer
    model = task.blank()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = {}
    for name, found in torch.load(folder / FILE, weights_only=True).items():
        if isinstance(found, dict):
            scale, zero = (found["meta"][key].float() for key in ("scale", "zero"))
            meta = found["meta"] | {"scale": scale, "zero": zero, "compute_dtype": torch.float32}
            state[name] = quantizer.dequantize(found["W_q"], meta).reshape(shapes[name])
        else:
            state[name] = found
    model.load_state_dict(state)
    return model


PEER = Peer("hqq", version_of("hqq"), SETTINGS, compress, restore)

if __name__ == "__main__":
    run(PEER)
