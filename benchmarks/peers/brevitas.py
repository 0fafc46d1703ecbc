"""Brevitas: integers by channel, with plain or least-squares scales and with GPTQ, by AMD.

``layerwise_quantize`` puts its quantized layers in place of linear layers, convolutions and
embeddings, without quantizing activations. Scales per output channel are the largest magnitude, or
of the least squared error. GPTQ sees 1,024 training images or 512 training sentences; an embedding
has no inputs to see. Its quantized model keeps floats, and its exports are graphs for runtimes, so
the file is our plain container, with the integers and scales of its own quantized tensors.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import container
from benchmarks.peers.contract import Peer, Task, run, version_of

SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int4-mse": {"bits": 4, "mse": True},
    "int4-mse-gptq": {"bits": 4, "mse": True, "gptq": True},
    "int3-mse-gptq": {"bits": 3, "mse": True, "gptq": True},
}


def quantized(
    model: nn.Module, bits: int, kinds: Sequence[type[nn.Module]], *, mse: bool
) -> nn.Module:
    """The model with quantized layers in place of its own of some kinds."""
    layers = importlib.import_module("brevitas.nn")
    quant = importlib.import_module("brevitas.quant.scaled_int")
    weight = quant.Int8WeightPerChannelFloatMSE if mse else quant.Int8WeightPerChannelFloat
    graph = importlib.import_module("brevitas.graph.quantize")
    given = {"weight_quant": weight, "weight_bit_width": bits, "return_quant_tensor": False}
    chosen = {
        nn.Linear: (layers.QuantLinear, given),
        nn.Conv2d: (layers.QuantConv2d, given),
        nn.Embedding: (layers.QuantEmbedding, given),
    }
    done: nn.Module = graph.layerwise_quantize(model, {kind: chosen[kind] for kind in kinds})
    return done


def calibrate(task: Task, model: nn.Module) -> None:
    """GPTQ, layer by layer, in the order of their calls."""
    mode = importlib.import_module("brevitas.graph.gptq").gptq_mode
    batches = task.calibration()
    with torch.no_grad():
        model(**batches[0])  # its quantizers are made by the first call
    with (
        torch.no_grad(),
        mode(model, use_quant_activations=False, create_weight_orig=False) as gptq,
    ):
        for _ in range(gptq.num_layers):
            for batch in batches:
                gptq.model(**batch)
            gptq.update()


def compress(task: Task, setting: str, folder: Path) -> None:
    """Quantize, and write integers and scales."""
    options = SETTINGS[setting]
    bits = options["bits"]
    plain = task.load()
    names = list(plain.state_dict())
    mse = options.get("mse", False)
    model = quantized(plain, bits, [nn.Linear, nn.Conv2d], mse=mse).eval()
    if options.get("gptq"):  # first: its embeddings run with one scale for all rows only
        calibrate(task, model)
    model = quantized(model, bits, [nn.Embedding], mse=mse).eval()
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "quant_weight"):
                tensor = module.quant_weight()
                found[f"{name}.weight"] = (tensor.int(float_datatype=False), tensor.scale)
    state = model.state_dict()
    file = container.Container()
    for name in names:
        if name in found:
            codes, scale = found[name]
            lowest = -(2 ** (bits - 1))
            zero = torch.full((scale.numel(),), float(-lowest))
            file.affine(name, codes - lowest, bits, (scale, zero))
        else:
            file.plain(name, state[name])
    file.write(folder)


PEER = Peer("brevitas", version_of("brevitas"), SETTINGS, compress, container.restore)

if __name__ == "__main__":
    run(PEER)
