"""Quant-Noise and product quantization of fairseq (Fan et al. 2020), from its repository, by Meta.

``pq-*``: its class ``PQ`` on linear layers, convolutions and embeddings, 15 iterations as its
``quantize_model_`` does, with 256 centroids or a quarter of the blocks, if that is less; nothing is
trained. Distances, which it computes for all blocks at once, are computed in pieces, as 1.5 million
blocks would take 12 GB.

``ipq`` and ``ipq-quant-noise``: the weights first go on training for as long as ours do, the latter
with its ``quant_noise`` at a rate of 0.1; then ``quantize_model_`` takes feed-forward layers,
embeddings and attention, one after the other, with training between. Its noise overwrites the
weights that it masks, and scales the others up, anew in each call: harmless where an optimizer
keeps fp32 copies, as in fairseq's mixed precision. Here, too, they are put back before each step.

Its checkpoints keep 8 bytes for an assignment; the file is our plain container with what its
``SizeTracker`` counts, packed assignments and fp16 centroids.
"""

from __future__ import annotations

import importlib
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import container, training
from benchmarks.peers.contract import Peer, Task, run

SOURCE = Path(sys.prefix) / "source" / "fairseq" / "modules" / "quantization"
COMMIT = "3d262bb"
ITERATIONS, CENTROIDS, PIECE = 15, 256, 65_536
SETTINGS = {  # weights of a block: feed-forward and embeddings, attention, 3x3 convolutions
    "pq-default": (8, 4, 9),
    "pq-fine": (4, 4, 3),
    "ipq": (8, 4, 9),
    "ipq-quant-noise": (8, 4, 9),
}
PLAIN = ["pq-default", "pq-fine"]
NOISE_RATE, CENTROID_RATE, STAGE_SHARE = 0.1, 1e-3, 0.2
# Of names; the order is the paper's: feed-forward, embeddings, attention.
STAGES = {
    "lm_ptb": [r"layers\.\d+\.fc\d", r"embedding", r"layers\.\d+\.(qkv|out)_proj"],
    "minilm_sst2": [
        r"bert\.encoder\.layer\.\d+\.(intermediate|output)\.dense",
        r"bert\.embeddings\.(word|position)_embeddings",
        r"bert\.encoder\.layer\.\d+\.attention\..*",
    ],
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


def staged(task: Task, setting: str) -> nn.Module:
    """The model with its product-quantized layers, after all stages."""
    noise = setting == "ipq-quant-noise"
    model = task.load()
    sys.path[:0] = [str(SOURCE), str(SOURCE.parent)]
    module = importlib.import_module("pq.utils")
    add_noise = importlib.import_module("quant_noise").quant_noise
    del sys.path[:2]
    names = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Embedding)
        and any(re.fullmatch(stage, name) for stage in STAGES[task.name])
    ]
    for name, layer in names if noise else []:
        add_noise(layer, NOISE_RATE, block_of(name, layer, setting))
    noisy = [layer.weight for _, layer in names] if noise else []
    optimizer = torch.optim.Adam(model.parameters(), training.course(task)[3])
    training.train(task, model, optimizer, masters=noisy)
    wide, attention, _ = SETTINGS[setting]
    blocks = {
        "Linear": ("fuzzy_name", {"attention": attention, "proj": attention, "*": wide}),
        "Embedding": ("embedding_dim", {"*": wide}),
    }
    centroids = {
        "Linear": ("in_features", {"*": CENTROIDS}),
        "Embedding": ("embedding_dim", {"*": CENTROIDS}),
    }
    tracker = module.SizeTracker(model)
    for step in range(len(STAGES[task.name])):
        module.quantize_model_(
            model, tracker, STAGES[task.name], blocks, centroids, step=step, verbose=False
        )
        optimizer = torch.optim.Adam(model.parameters(), CENTROID_RATE)
        found = dict(model.named_modules())
        noisy = [layer.weight for name, layer in names if noise and found[name] is layer]
        training.train(task, model, optimizer, masters=noisy, share=STAGE_SHARE)
    return model


def compress_staged(task: Task, setting: str, folder: Path) -> None:
    """Train and quantize in stages, and write assignments and centroids."""
    model = staged(task, setting)
    coded = {
        f"{name}.weight": layer
        for name, layer in model.named_modules()
        if hasattr(layer, "assignments")
    }
    state = model.state_dict()
    file = container.Container()
    for name, tensor in task.load().state_dict().items():
        if name in coded:
            layer = coded[name]
            codes = layer.assignments.reshape(-1, tensor.shape[0]).t().contiguous()
            bits = math.ceil(math.log2(len(layer.centroids)))
            file.vectors(name, codes, bits, layer.centroids, tensor.shape)
        else:
            file.plain(name, state[name])
    file.write(folder)


def compress(task: Task, setting: str, folder: Path) -> None:
    """Quantize layer by layer, and write assignments and centroids."""
    random.seed(task.seed)
    if setting not in PLAIN:
        compress_staged(task, setting, folder)
        return
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


ONLY = {"resnet20_cifar10": PLAIN, "minilm_stsb": PLAIN}
PEER = Peer("fairseq_pq", COMMIT, SETTINGS, compress, container.restore, only=ONLY)

if __name__ == "__main__":
    run(PEER)
