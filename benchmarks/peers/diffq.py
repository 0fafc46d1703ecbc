"""DiffQ's own package: bits that are learned in training, group by group, by its authors at Meta.

The weights of the task go on training with its quantizer for as long as ours do, with the bits'
size in MB, times a penalty, in the loss. Bits learn at ``BITS_RATE``, since at its default of 1e-3
they hardly move in so few steps, and only tensors of up to 262 weights stay in floats. The file is
``torch.save`` of its packed state. ResNet-20 is another program's, ``diffq_peer.py``, which takes
the least of several counts of bytes; here the bytes are those of the file.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from torch import nn

from benchmarks.peers import training
from benchmarks.peers.contract import Peer, Task, run, version_of

FILE = "model.pt"
GROUP, MIN_SIZE = 8, 0.001  # weights that share their bits; MiB
BITS_RATE = 3e-2
RATES = {"lm_ptb": 3e-4}  # of weights: on dev, the course's 3e-3 serves this noise worse
SETTINGS = {"penalty-0.3": 0.3, "penalty-1": 1.0, "penalty-3": 3.0}


def compress(task: Task, setting: str, folder: Path) -> None:
    """Train, and write the packed state."""
    diffq = importlib.import_module("diffq")
    model = task.load()
    rate = RATES.get(task.name, training.course(task)[3])
    optimizer = torch.optim.Adam(model.parameters(), rate)
    bits = torch.optim.Adam([{"params": []}])  # as its README shows
    quantizer = diffq.DiffQuantizer(model, group_size=GROUP, min_size=MIN_SIZE)
    quantizer.setup_optimizer(bits, lr=BITS_RATE)
    penalty = SETTINGS[setting]
    training.train(
        task,
        model,
        optimizer,
        penalty=lambda: penalty * quantizer.model_size(),
        others=[bits],
    )
    torch.save(quantizer.get_quantized_state(packed=True), folder / FILE)


def restore(task: Task, _setting: str, folder: Path) -> nn.Module:
    """Load the packed state into a model, as its README shows."""
    diffq = importlib.import_module("diffq")
    model = task.blank()
    diffq.restore_quantized_state(model, torch.load(folder / FILE, weights_only=False))
    return model


PEER = Peer(
    "diffq",
    version_of("diffq"),
    SETTINGS,
    compress,
    restore,
    tasks=("minilm_sst2", "lm_ptb"),
)

if __name__ == "__main__":
    run(PEER)
