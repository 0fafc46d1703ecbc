"""coremltools palettization: k-means with 6, 4, 3 and 2 bits, by Apple.

``PostTrainingPalettizer`` on linear layers, convolutions and embeddings, one table for each group
of 16 output channels where 16 divides them, else for the tensor. Core ML runs models only on the
systems of Apple, so the file is our plain container with what its weight file holds, packed codes
and fp16 tables; for ResNet-20 that is less than the ``.mlpackage`` of ``coremltools.convert``.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.peers import container
from benchmarks.peers.contract import Peer, Task, run, version_of

SETTINGS = {  # bits and output channels of a table, 0 for all
    "palettize6": (6, 0),
    "palettize4": (4, 0),
    "palettize4-g16": (4, 16),
    "palettize3-g16": (3, 16),
    "palettize2-g16": (2, 16),
}
LUT = "_COREML_/weight/lut"


def configure(model: nn.Module, bits: int, group: int) -> dict[str, object]:
    """Its configuration: groups where they divide the output channels."""
    whole = {"n_bits": bits, "granularity": "per_tensor"}
    some = {"n_bits": bits, "granularity": "per_grouped_channel", "group_size": group}
    return {
        "module_name_configs": {
            name: some if group and module.weight.shape[0] % group == 0 else whole
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d)
        }
    }


def codes_of(weight: Tensor, tables: Tensor) -> Tensor:
    """The nearest entry of each weight; ``tables`` ``(groups, entries)`` are sorted."""
    middles = (tables[:, 1:] + tables[:, :-1]) / 2
    rows = weight.reshape(len(tables), -1).contiguous()
    return torch.searchsorted(middles.contiguous(), rows).to(torch.uint8).reshape(weight.shape)


def compress(task: Task, setting: str, folder: Path) -> None:
    """Palettize, and write codes and tables."""
    module = importlib.import_module("coremltools.optimize.torch.palettization")
    bits, group = SETTINGS[setting]
    model = task.load()
    config = module.PostTrainingPalettizerConfig.from_dict(configure(model, bits, group))
    done = module.PostTrainingPalettizer(model, config).compress()
    state = done.state_dict()
    file = container.Container()
    for name in model.state_dict():
        tables = state.get(f"{name.removesuffix('weight')}{LUT}")
        if tables is None:
            file.plain(name, state[name])
        else:
            entries = tables.shape[-2]
            ordered = tables.reshape(-1, entries).sort(1).values
            if entries < 2**bits:
                ordered = nn.functional.pad(ordered, (0, 2**bits - entries), value=torch.inf)
            file.tables(name, codes_of(state[name], ordered), bits, ordered)
    file.write(folder)


PEER = Peer("coremltools", version_of("coremltools"), SETTINGS, compress, container.restore)

if __name__ == "__main__":
    run(PEER)
