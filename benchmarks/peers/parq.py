"""PARQ: training towards a table of values for each row, by PyTorch's torchao.

Its ``QuantOptimizer`` around Adam: weights are drawn to the table, harder and harder, from the
first fifth of the steps on, and are in it at the end. Tables of 4 values are those of least squares
(``LSBQuantizer(optimal=True)``), larger ones uniform; linear layers, convolutions and embeddings,
one table for each output channel, anew every 10 steps. Trained for as long as ours. The file is our
plain container, with the tables and codes that its optimizer ends with.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.peers import container, training
from benchmarks.peers.contract import Peer, Task, run, version_of

SETTINGS = {"parq-4bit": 4, "parq-3bit": 3, "parq-2bit": 2}
PERIOD = 10


def compress(task: Task, setting: str, folder: Path) -> None:
    """Train, and write tables and codes."""
    parq = importlib.import_module("torchao.prototype.parq")
    bits = SETTINGS[setting]
    model = task.load()
    _, _, steps, rate = training.course(task)
    layers = {
        f"{name}.weight": layer.weight
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding)
    }
    known = {id(weight) for weight in layers.values()}
    rest = [tensor for tensor in model.parameters() if id(tensor) not in known]
    groups: list[dict[str, Any]] = [
        {"params": list(layers.values()), "quant_bits": bits},
        {"params": rest},
    ]
    quantizer = parq.LSBQuantizer(optimal=True) if bits == 2 else parq.UnifQuantizer()
    optimizer: Any = parq.QuantOptimizer(
        torch.optim.Adam(groups, rate),
        quantizer,
        parq.ProxPARQ(anneal_start=steps // 5, anneal_end=steps - 2 * PERIOD),
        quant_period=PERIOD,
        quant_per_channel=True,
    )
    training.train(task, model, optimizer)
    file = container.Container()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name not in layers:
                file.plain(name, tensor)
                continue
            tables = optimizer.state[layers[name]]["quants"].sort(1).values
            rows = tensor.flatten(1)
            middles = (tables[:, 1:] + tables[:, :-1]) / 2
            codes = torch.searchsorted(middles.contiguous(), rows.contiguous())
            off = (tables.gather(1, codes) - rows).abs().max()
            if off > 1e-6:
                raise ValueError(f"{name} is off its table by up to {float(off):.3g}")
            file.tables(name, codes.to(torch.uint8).reshape(tensor.shape), bits, tables)
    file.write(folder)


PEER = Peer(
    "parq",
    version_of("torchao"),
    SETTINGS,
    compress,
    container.restore,
    tasks=training.TASKS,
)

if __name__ == "__main__":
    run(PEER)
