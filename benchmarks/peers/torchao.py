"""torchao: integers of 8, 4, 3 and 2 bits for weights, from PyTorch's own project.

Linear layers and embeddings go through ``quantize_``. A convolution's weight is quantized as the
matrix ``(outputs, inputs * height * width)`` of a linear layer, and dequantized on loading: torchao
takes 4-D weights too, but with scales for each place of the kernel, which costs more bytes.
Scales, and what is not quantized, are fp16. The file is ``torch.save`` of the state, as its
documentation has it; below 8 bits torchao keeps a byte for each weight, which zstd makes good.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.contract import Peer, Task, halved, run, version_of, widened

FILE = "model.pt"
SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int8-gptq": {"bits": 8, "gptq": True},
    "int4-g64": {"bits": 4, "group": 64},
    "int4-g64-hqq": {"bits": 4, "group": 64, "hqq": True},
    "int4-gptq": {"int4_gptq": True},
    "int4-packed-g128": {"bits": 4, "group": 64, "hqq": True, "packed": 128},
    "int3-g64-hqq": {"bits": 3, "group": 64, "hqq": True},
    "int2-g32-hqq": {"bits": 2, "group": 32, "hqq": True},
    "int2-g32-asym": {"bits": 2, "group": 32, "asymmetric": True},
}


def group_of(columns: int, wanted: int) -> int:
    """The largest divisor of ``columns`` that is at most ``wanted``."""
    return max(d for d in range(1, min(columns, wanted) + 1) if columns % d == 0)


def integers(
    columns: int, bits: int, group: int = 0, *, hqq: bool = False, asymmetric: bool = False
) -> Any:  # noqa: ANN401
    """Its configuration for a weight ``(rows, columns)``; no group means one scale for a row."""
    api = importlib.import_module("torchao.quantization")
    workflow = importlib.import_module("torchao.quantization.quantize_.workflows")
    algorithm = workflow.IntxChooseQParamsAlgorithm
    return api.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=api.PerGroup(group_of(columns, group)) if group else api.PerAxis(0),
        mapping_type=api.MappingType.ASYMMETRIC if asymmetric else api.MappingType.SYMMETRIC,
        scale_dtype=torch.float16,
        intx_choose_qparams_algorithm=algorithm.HQQ_SCALE_ONLY if hqq else algorithm.AFFINE,
    )


def quantize(module: nn.Module, config: Any) -> None:  # noqa: ANN401
    """Quantize one module in place."""
    api = importlib.import_module("torchao.quantization")
    api.quantize_(module, config, filter_fn=lambda found, _: found is module)


def as_linear(weight: Tensor) -> nn.Linear:
    """A linear layer with a convolution's weight as its matrix."""
    matrix = weight.detach().flatten(1)
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    layer.weight = nn.Parameter(matrix.contiguous())
    return layer


def gptq(task: Task, model: nn.Module, base: Any) -> None:  # noqa: ANN401
    """Quantize all linear layers with GPTQ, from 1,024 images or 512 sentences of training."""
    api = importlib.import_module("torchao.quantization")
    gptq_config = importlib.import_module("torchao.prototype.gptq").GPTQConfig
    api.quantize_(model, gptq_config(step="observe", base_config=base))
    with torch.no_grad():
        for batch in task.calibration():
            model(**batch)
    api.quantize_(model, gptq_config(step="convert", base_config=base))


def compress(task: Task, setting: str, folder: Path) -> None:
    """Quantize, and write the state with ``torch.save``."""
    options = dict(SETTINGS[setting])
    model = task.load()
    api = importlib.import_module("torchao.quantization")
    done: set[nn.Module] = set()
    if options.pop("int4_gptq", False):
        base = api.Int4WeightOnlyConfig()  # the only 4-bit configuration that its GPTQ takes
        gptq(task, model, base)
        options = {"bits": 4, "group": 64}
        done = {m for m in model.modules() if isinstance(m, nn.Linear)}
    if options.pop("gptq", False):
        gptq(task, model, api.Int8WeightOnlyConfig())
        done = {m for m in model.modules() if isinstance(m, nn.Linear)}
    if group := options.pop("packed", 0):
        module = importlib.import_module("torchao.prototype.quantization.int4")
        workflow = importlib.import_module("torchao.quantization.quantize_.workflows")
        algorithm = workflow.Int4ChooseQParamsAlgorithm.HQQ
        config = module.PrototypeInt4WeightOnlyConfig(group, algorithm)
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer.in_features % group == 0:
                quantize(layer, config)
                done.add(layer)
    state = {}
    for name, layer in model.named_modules():
        if layer in done:
            continue
        if isinstance(layer, nn.Linear | nn.Embedding):
            quantize(layer, integers(layer.weight.shape[1], **options))
        elif isinstance(layer, nn.Conv2d):
            matrix = as_linear(layer.weight)
            quantize(matrix, integers(matrix.in_features, **options))
            state[f"{name}.weight"] = matrix.weight
    torch.save(halved(dict(model.state_dict()) | state), folder / FILE)


def restore(task: Task, _setting: str, folder: Path) -> nn.Module:
    """Load the state with ``weights_only``, as its documentation has it."""
    importlib.import_module("torchao")
    importlib.import_module("torchao.prototype.quantization.int4")
    state = widened(torch.load(folder / FILE, weights_only=True))
    model = task.blank()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            weight = state[f"{name}.weight"].dequantize()
            state[f"{name}.weight"] = nn.Parameter(weight.float().reshape(layer.weight.shape))
    model.load_state_dict(state, assign=True)
    return model


PEER = Peer("torchao", version_of("torchao"), SETTINGS, compress, restore)

if __name__ == "__main__":
    run(PEER)
