"""Train ResNet-20 with the DiffQ package, for comparison.

Run it from the repository's root with the interpreter of DiffQ's own environment (README.md beside
this file says how to make one); it imports nothing of dither:

    PYTHON -m benchmarks.peers.diffq_peer --penalties 5 20 80 --folder out/diffq

Each run fine-tunes the CIFAR-10 checkpoint and appends one row to ``peer.json`` in the folder: the
accuracy of the package's own quantized model, and its sizes in bytes: what the package counts, and
the files it would really write. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import lzma
import math
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.tasks import resnet20_cifar10

BATCH = 128
WARM_STEPS = 20


def rate_at(step: int, steps: int) -> float:
    """Share of the learning rate at a step: a short rise, then half a cosine."""
    return min(1.0, (step + 1) / WARM_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2


def train(penalty: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run; returns its row."""
    diffq = importlib.import_module("diffq")
    torch.manual_seed(seed)
    batches = resnet20_cifar10.Batches(BATCH, seed)
    steps = round(options.epochs * batches.per_epoch)
    model = resnet20_cifar10.load()  # the package refuses weights that are channels-last
    optimizer = torch.optim.Adam(model.parameters(), options.rate)
    bits = torch.optim.Adam([{"params": []}], betas=(0.9, 0.999))  # as its README shows
    quantizer = diffq.DiffQuantizer(model, group_size=options.group, min_size=options.min_size)
    quantizer.setup_optimizer(bits, lr=options.bits_rate)
    model.train()
    begun = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = options.rate * rate_at(step, steps)
        images, labels = batches[step]
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            guess = model(images)
        loss = functional.cross_entropy(guess.float(), labels)
        (loss + penalty * quantizer.model_size()).backward()
        optimizer.step()
        bits.step()
        optimizer.zero_grad()
        bits.zero_grad()
        if step % 100 == 99:
            size = quantizer.true_model_size() * 2**20
            print(
                f"step {step + 1}/{steps} loss {float(loss.detach()):.4f} {size:.0f} B "
                f"{time.monotonic() - begun:.0f} s",
                flush=True,
            )
    seconds = time.monotonic() - begun
    model.eval()
    row: dict[str, Any] = {"penalty": penalty, "seed": seed, "seconds": round(seconds)}
    row |= {s: resnet20_cifar10.evaluate(model, s) for s in ("dev", "test")}
    return row | {"bytes": sizes(quantizer, model)}


def sizes(quantizer: Any, model: nn.Module) -> dict[str, int]:  # noqa: ANN401
    """Bytes by the package's counts and of files; ``least`` is the smallest of them.

    Running statistics of batch norm, which the package leaves out, are counted apart. Files hold
    the packed state; both general compressors are tried on it, though the package has neither.
    """
    file = io.BytesIO()
    torch.save(quantizer.get_quantized_state(packed=True), file)
    found = {
        "true_model_size": round(quantizer.true_model_size() * 2**20),
        "compressed_model_size": round(quantizer.compressed_model_size(num_workers=1) * 2**20),
        "packed_file": len(file.getvalue()),
        "packed_file_zlib": len(zlib.compress(file.getvalue(), 9)),
        "packed_file_xz": len(lzma.compress(file.getvalue(), preset=9 | lzma.PRESET_EXTREME)),
    }
    buffers = sum(b.numel() * b.element_size() for b in model.buffers() if b.is_floating_point())
    return found | {"least": min(found.values()), "buffers_left_out": buffers}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--penalties", type=float, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--min-size", type=float, default=0.001, help="MiB; its default is 0.01")
    parser.add_argument("--rate", type=float, default=1e-3, help="of weights")
    parser.add_argument("--bits-rate", type=float, default=1e-3, help="of bits; its default")
    parser.add_argument("--folder", type=Path, default=Path("out/diffq"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    output = options.folder / "peer.json"
    keys = ("epochs", "group", "min_size", "rate", "bits_rate")
    settings = {key: getattr(options, key) for key in keys}
    for seed in options.seeds:
        for penalty in options.penalties:
            rows = json.loads(output.read_text()) if output.exists() else []
            mine = settings | {"penalty": penalty, "seed": seed}
            if any(all(row[k] == v for k, v in mine.items()) for row in rows):
                continue
            row = settings | train(penalty, seed, options)
            print(row, flush=True)
            rows = json.loads(output.read_text()) if output.exists() else []
            output.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
