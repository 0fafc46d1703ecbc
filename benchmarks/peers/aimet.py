"""AIMET: integers by channel with ranges of least squared error, or sequential MSE, by Qualcomm.

``QuantizationSimModel`` with its default configuration, per channel, and no quantizers of
activations; ``int4-seqmse`` searches ranges layer by layer with training data. What it exports,
floats and encodings, is for other runtimes, so the file is our plain container with its integers
and scales. It imports torchvision, which is not needed for this: a stand-in takes its place.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from benchmarks.peers import container
from benchmarks.peers.contract import Peer, Task, run, version_of

SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int4-seqmse": {"bits": 4, "search": True},
}
PREFIX = "model."


class Positional(nn.Module):
    """A model whose inputs have no names and whose output is a tensor, for tracing."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        self._names = tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        found = self.model(**dict(zip(self._names, inputs, strict=True)))
        output: Tensor = found if isinstance(found, Tensor) else found[0]
        return output


def simulated(model: nn.Module, dummy: tuple[Tensor, ...], bits: int) -> Any:  # noqa: ANN401
    """Its simulation of the model, with quantizers of weights only."""
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms"):
        stand_in = MagicMock()
        stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules.setdefault(name, stand_in)
    aimet = importlib.import_module("aimet_torch")
    defs = importlib.import_module("aimet_torch.common.defs")
    sim = aimet.QuantizationSimModel(
        model,
        dummy,
        quant_scheme=defs.QuantScheme.post_training_tf_enhanced,
        default_output_bw=16,
        default_param_bw=bits,
    )
    for module in sim.model.modules():
        for kind in ("input_quantizers", "output_quantizers"):
            quantizers: Any = getattr(module, kind, [])
            for i in range(len(quantizers)):
                quantizers[i] = None
    return sim


def of_one_shape(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Ids and masks ``(rows, tokens)`` padded to one length, since its search stacks them."""
    if any(tensor.dim() != 2 for tensor in batches[0].values()):
        return batches
    longest = max(tensor.shape[1] for batch in batches for tensor in batch.values())
    return [
        {
            name: nn.functional.pad(tensor, (0, longest - tensor.shape[1]))
            for name, tensor in batch.items()
        }
        for batch in batches
    ]


def compress(task: Task, setting: str, folder: Path) -> None:
    """Simulate, find encodings, and write integers and scales."""
    options = SETTINGS[setting]
    bits = options["bits"]
    model = task.load()  # before the stand-ins: transformers looks for torchvision, too
    named = of_one_shape(task.calibration())
    batches = [tuple(batch.values()) for batch in named]
    dummy = tuple(tensor[:1] for tensor in batches[0])
    sim = simulated(Positional(model, named[0]).eval(), dummy, bits)
    if options.get("search"):
        search = importlib.import_module("aimet_torch.seq_mse").apply_seq_mse
        search(sim, batches, num_candidates=20, forward_fn=lambda m, batch: m(*batch))
    with torch.no_grad():
        sim.compute_encodings(lambda m: m(*dummy))
    found = {}
    for name, module in sim.model.named_modules():
        for key, quantizer in getattr(module, "param_quantizers", {}).items():
            if quantizer is not None:
                found[f"{name}.{key}".removeprefix(PREFIX)] = quantizer
    file = container.Container()
    for name, tensor in model.state_dict().items():
        if name not in found:
            file.plain(name, tensor)
            continue
        quantizer = found[name]
        scale, offset = (step.detach() for step in (quantizer.get_scale(), quantizer.get_offset()))
        whole = ((tensor / scale).round() - offset).clamp(quantizer.qmin, quantizer.qmax)
        zero = (-offset - quantizer.qmin).expand(scale.shape)
        file.affine(name, (whole - quantizer.qmin).to(torch.uint8), bits, (scale, zero))
    file.write(folder)


PEER = Peer("aimet", version_of("aimet-torch"), SETTINGS, compress, container.restore)

if __name__ == "__main__":
    run(PEER)
