"""Sparse quantized factors against other ways to store a matrix: error at equal coded bytes.

``python -m benchmarks.sparse_factors`` encodes trained matrices (ResNet-20's ``layer3``, MiniLM's
feed-forward) by each way at many settings, and keeps of each way the least error in no more bytes
than 0.5 to 5 bits a weight. Bytes are those of the coded tensor; the error is relative to the
matrix's energy, in decibel. Matrices that the results hold already are not measured again.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kept import keep, kept
from benchmarks.tasks import minilm_stsb, resnet20_cifar10
from dither import GPTQ, KMeans, Product, SparseFactors, Viterbi
from dither.archive import code
from dither.core import Encoder, SpecError

RESULTS = Path(__file__).parent / "results"
BITS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)


def matrices() -> Iterator[tuple[str, Tensor]]:
    """Trained ones, two of each model."""
    for task, module, part in (
        ("ResNet-20", resnet20_cifar10, "layer3"),
        ("MiniLM", minilm_stsb, "layer.2"),
    ):
        state = module.load().state_dict()
        wanted = {
            name: value
            for name, value in state.items()
            if part in name and value.ndim > 1 and ("conv" in name or "dense" in name)
            if "attention" not in name
        }
        for name in list(wanted)[:2]:
            yield f"{task} {name}", wanted[name].detach().float().flatten(1)


def ways(weight: Tensor) -> dict[str, Iterator[Encoder]]:
    """Encoders at many settings, by the name of the way."""
    deviation, rank = float(weight.std()), min(weight.shape)
    steps = [deviation * 2.0 ** (k / 2) for k in range(-8, 6)]
    return {
        "grid": (GPTQ(step) for step in steps),
        "trellis": (Viterbi(step / 2) for step in steps),
        "product": (
            KMeans(Product(block, points=points), iterations=15)
            for block in (2, 4, 8)
            for points in (16, 64, 256)
        ),
        "low rank": (
            SparseFactors(max(1, round(share * rank)), 1.0, bits, bits, sweeps=4)
            for share in (0.1, 0.25, 0.5, 0.75, 1.0)
            for bits in (4, 6)
        ),
        "sparse factors": (
            SparseFactors(max(1, round(share * rank)), density, bits, bits, sweeps=8)
            for share in (0.25, 0.5, 1.0)
            for density in (0.1, 0.25, 0.5)
            for bits in (4, 6)
        ),
    }


def measured(weight: Tensor) -> dict[str, list[float | None]]:
    """Of each way, the decibels at each number of bits; None where it needs more bytes."""
    found: dict[str, list[float | None]] = {}
    energy = float(weight.double().square().sum())
    for way, encoders in ways(weight).items():
        points = []
        for encoder in encoders:
            try:
                encoded = encoder.encode(weight)
            except SpecError:
                continue
            error = float((encoded.decode() - weight).double().square().sum())
            points.append((8 * code(encoded).nbytes / weight.numel(), error / energy))
        best = []
        for bits in BITS:
            errors = [error for used, error in points if used <= bits]
            best.append(round(-10 * math.log10(min(errors)), 2) if errors else None)
        found[way] = best
        print(way, best, flush=True)
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=RESULTS / "sparse_factors.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = arguments.json
    rows: list[dict[str, Any]] = kept(path) or []
    for name, weight in matrices():
        if name in [row["matrix"] for row in rows]:
            continue
        print(name, tuple(weight.shape), flush=True)
        start = time.monotonic()
        row: dict[str, Any] = {"matrix": name, "shape": list(weight.shape), "bits": BITS}
        row |= {"decibels": measured(weight), "seconds": round(time.monotonic() - start)}
        rows.append(row)
        keep(path, rows)


if __name__ == "__main__":
    main()
