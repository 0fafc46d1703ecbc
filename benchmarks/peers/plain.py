"""What needs no compressor: half precision, and int8 with one scale per output channel.

Both write safetensors; ``nbytes_zstd`` of the contract is what zstd makes of them. The weights of
layers (2 dimensions or more) are quantized to int8 by their largest magnitude in each row; biases,
norms and statistics are kept in fp16.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.peers.contract import Peer, Task, run, version_of

SETTINGS = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}
FILE = "model.safetensors"
SCALE = ".scale"


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in -127 to 127 and fp16 scales ``(rows, 1, ...)`` of a weight ``(rows, ...)``."""
    largest = weight.abs().amax(tuple(range(1, weight.dim())), keepdim=True)
    scale = (largest / 127).half()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (weight / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def compress(task: Task, setting: str, folder: Path) -> None:
    """Write one file of safetensors."""
    found: dict[str, Tensor] = {}
    for name, tensor in task.load().state_dict().items():
        if not tensor.is_floating_point():
            found[name] = tensor
        elif setting == "int8" and tensor.dim() >= 2:
            found[name], found[name + SCALE] = to_int8(tensor)
        else:
            found[name] = tensor.to(torch.float16 if setting == "int8" else SETTINGS[setting])
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / FILE)


def restore(task: Task, _setting: str, folder: Path) -> nn.Module:
    """Load the file into a model in fp32."""
    found = load_file(folder / FILE)
    weights = {}
    for name, tensor in found.items():
        if tensor.dtype == torch.int8:
            weights[name] = tensor.float() * found[name + SCALE].float()
        elif not name.endswith(SCALE):
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor
    model = task.blank()
    model.load_state_dict(weights)
    return model


PEER = Peer("plain", f"zstandard {version_of('zstandard')}", SETTINGS, compress, restore)

if __name__ == "__main__":
    run(PEER)
