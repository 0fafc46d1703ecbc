"""optimum-quanto: integers of 8, 4 and 2 bits for weights, by Hugging Face.

It quantizes linear layers and convolutions. An embedding is quantized as the weight of a linear
layer of the same shape, and dequantized on loading. The files are those of its documentation, the
state as safetensors and the quantization map as JSON, with scales, shifts and the rest in fp16. The
model is scored in fp32, with weights dequantized.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.peers.contract import Peer, Task, halved, run, version_of, widened

FILE, MAP = "model.safetensors", "quantization_map.json"
SETTINGS = {
    "qint8": ("qint8", ""),
    "qint4": ("qint4", ""),
    "qint4-hqq": ("qint4", "HqqOptimizer"),
    "qint2": ("qint2", ""),
    "qint2-hqq": ("qint2", "HqqOptimizer"),
}


def as_linear(model: nn.Module) -> list[str]:
    """Put a linear layer with the same weight in place of each embedding; returns their names."""
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
    for name in names:
        embedding = model.get_submodule(name)
        assert isinstance(embedding, nn.Embedding)
        weight = embedding.weight
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        layer.weight = weight
        model.set_submodule(name, layer)
    return names


def compress(task: Task, setting: str, folder: Path) -> None:
    """Quantize, freeze, and write state and map."""
    quanto = importlib.import_module("optimum.quanto")
    dtype, optimizer = SETTINGS[setting]
    model = task.load().requires_grad_(requires_grad=False)
    as_linear(model)
    chosen = getattr(quanto, optimizer)() if optimizer else None
    quanto.quantize(model, weights=getattr(quanto, dtype), optimizer=chosen)
    quanto.freeze(model)
    state = halved(model.state_dict())
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / FILE)
    (folder / MAP).write_text(json.dumps(quanto.quantization_map(model)), encoding="utf-8")


def restore(task: Task, _setting: str, folder: Path) -> nn.Module:
    """Load with its ``requantize``; then dequantize into a plain model in fp32."""
    quanto = importlib.import_module("optimum.quanto")
    model = task.blank()
    as_linear(model)
    found = json.loads((folder / MAP).read_text(encoding="utf-8"))
    state = widened(load_file(folder / FILE))
    quanto.requantize(model, state, found, torch.device("cpu"))
    state = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        state[name] = tensor.dequantize() if isinstance(tensor, quanto.QTensor) else tensor
    whole = task.blank()
    whole.load_state_dict({name: state[name] for name in whole.state_dict()})
    return whole


PEER = Peer("quanto", version_of("optimum-quanto"), SETTINGS, compress, restore)

if __name__ == "__main__":
    run(PEER)
