"""NNCF weight compression in PyTorch, by Intel: int8, and int4 in groups, with and without data.

``compress_weights`` on all layers, embeddings too. AWQ and scale estimation use training data. Its
PyTorch back end has no GPTQ, and takes convolutions to 8 bits only. The file is ``torch.save`` of
the state, with its packed codes. Its own ``get_config`` refuses models with compressed weights
(``Support only StatefulModuleInterface modules``), so a model of random weights is compressed in
the same way first, and then takes the state, which replaces every tensor.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.peers.contract import Peer, Task, halved, run, version_of

FILE = "model.pt"
SETTINGS: dict[str, dict[str, Any]] = {
    "int8-asym": {"mode": "INT8_ASYM"},
    "int8-sym": {"mode": "INT8_SYM"},
    "int4-sym-g64": {"mode": "INT4_SYM", "group_size": 64},
    "int4-asym-g64": {"mode": "INT4_ASYM", "group_size": 64},
    "int4-asym-g128": {"mode": "INT4_ASYM", "group_size": 128},
    "int4-asym-g64-data": {"mode": "INT4_ASYM", "group_size": 64, "data": True},
}


def compressed(task: Task, setting: str, model: nn.Module) -> nn.Module:
    """The model with its compressed weights."""
    nncf = importlib.import_module("nncf")
    options = dict(SETTINGS[setting])
    more: dict[str, Any] = {}
    batches = [{key: value[:1] for key, value in task.calibration()[0].items()}]  # to trace with
    if options.pop("data", False):
        more = {"awq": True, "scale_estimation": True, "subset_size": 64}
        batches = task.calibration(8)
    if "group_size" in options:
        more |= {"all_layers": True, "group_size": options["group_size"]}
    mode = nncf.CompressWeightsMode[options["mode"]]
    done: nn.Module = nncf.compress_weights(model, mode=mode, dataset=nncf.Dataset(batches), **more)
    return done


def compress(task: Task, setting: str, folder: Path) -> None:
    """Compress all weights, and write the state."""
    state = compressed(task, setting, task.load()).state_dict()
    torch.save(halved(state), folder / FILE)


def restore(task: Task, setting: str, folder: Path) -> nn.Module:
    """Compress random weights, to have the layers, and load the state into them."""
    state = torch.load(folder / FILE, weights_only=True)
    model = task.blank()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.01, 0.03)
    model = compressed(task, setting, model)
    model.load_state_dict(state)
    return model


PEER = Peer("nncf", version_of("nncf"), SETTINGS, compress, restore)

if __name__ == "__main__":
    run(PEER)
