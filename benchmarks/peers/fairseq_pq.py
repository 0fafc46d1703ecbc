"""Product quantization of fairseq (iPQ of Fan et al. 2020), from its repository, by Meta.

Its class ``PQ`` on linear layers, convolutions and embeddings, 15 iterations as its
``quantize_model_`` does, with 256 centroids or a quarter of the blocks, if that is less. Distances,
which it computes for all blocks at once, are computed in pieces, as 1.5 million blocks would take
12 GB. Nothing is fine-tuned: iPQ in stages, with training between them, is another benchmark. Its
checkpoints keep 8 bytes for an assignment; the file is our plain container with what its
``SizeTracker`` counts, packed assignments and fp16 centroids.
"""

from __future__ import annotations

import importlib
import math
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import container
from benchmarks.peers.contract import Peer, Task, run

SOURCE = Path(sys.prefix) / "source" / "fairseq" / "modules" / "quantization"
COMMIT = "3d262bb"
ITERATIONS, CENTROIDS, PIECE = 15, 256, 65_536
SETTINGS = {  # weights of a block: feed-forward and embeddings, attention, 3x3 convolutions
    "pq-default": (8, 4, 9),
    "pq-fine": (4, 4, 3),
}


def quantizer() -> Any:  # noqa: ANN401
    """Its ``PQ``, with distances in pieces of columns."""
    sys.path.insert(0, str(SOURCE))
    try:
        original = importlib.import_module("pq.pq").PQ
    finally:
        sys.path.remove(str(SOURCE))

    class Pieces(original):  # type: ignore[misc, valid-type]  # of its own module
        def compute_distances(self) -> Tensor:
            pieces = self.W.split(PIECE, 1)
            return torch.cat([torch.cdist(self.centroids, piece.t()) for piece in pieces], 1)

    return Pieces


def block_of(name: str, module: nn.Module, setting: str) -> int:
    """Weights of a block of a layer."""
    wide, attention, spatial = SETTINGS[setting]
    if isinstance(module, nn.Conv2d):
        return spatial
    return attention if ".attention." in name or name.endswith("proj") else wide


def compress(task: Task, setting: str, folder: Path) -> None:
    """Quantize layer by layer, and write assignments and centroids."""
    random.seed(0)
    kind = quantizer()
    model = task.load()
    layers = {
        f"{name}.weight": (module, block_of(name, module, setting))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d)
    }
    file = container.Container()
    for name, tensor in model.state_dict().items():
        if name not in layers:
            file.plain(name, tensor)
            continue
        block = layers[name][1]
        count = min(CENTROIDS, tensor.numel() // block // 4)
        coder = kind(
            tensor, block, count, n_iter=ITERATIONS, eps=1e-6, max_tentatives=100, verbose=False
        )
        coder.encode()
        codes = coder.assignments.reshape(-1, tensor.shape[0]).t().contiguous()
        file.vectors(name, codes, math.ceil(math.log2(count)), coder.centroids, tensor.shape)
    file.write(folder)


def restore(task: Task, _setting: str, folder: Path) -> nn.Module:
    """Fill a model with the decoded tensors."""
    model = task.blank()
    model.load_state_dict(container.read(folder))
    return model


PEER = Peer("fairseq_pq", COMMIT, SETTINGS, compress, restore)

if __name__ == "__main__":
    run(PEER)
