"""What batch norms say about means, in files made without data: scores with and without.

``python -m benchmarks.norm_means`` compresses EfficientNet-lite0 (750 ImageNet images) and
ResNet-20 (the test images of CIFAR-10) to a few sizes without data, and with ``norms=True``. Files
are loaded into the model again. Rows that the results hold are not measured again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dither
from benchmarks.kept import keep, kept
from benchmarks.tasks import resnet20_cifar10
from benchmarks.zoo_models import efficientnet_lite0

RESULTS = Path(__file__).parent / "results" / "norm_means.json"
Scored = Callable[[nn.Module], float]


TASKS: dict[str, tuple[Callable[[], nn.Module], Scored, list[str]]] = {
    "EfficientNet-lite0": (efficientnet_lite0.load, efficientnet_lite0.evaluate, ["10x", "14x"]),
    "ResNet-20": (
        resnet20_cifar10.load,
        partial(resnet20_cifar10.evaluate, split="test"),
        ["13x", "17x", "24x"],
    ),
}


def measure(name: str, size: str) -> dict[str, Any]:
    """A row: bytes, scores and seconds of both files."""
    load, scored, _ = TASKS[name]
    row: dict[str, Any] = {"model": name, "size": size}
    for end, norms in (("", False), (" with norms", True)):
        model, start = load(), time.process_time()
        archive = dither.compress(model, size, norms=norms)
        row[f"cpu seconds{end}"] = round(time.process_time() - start, 1)
        dither.load_into(model, archive)
        row[f"bytes{end}"], row[f"score{end}"] = archive.nbytes, round(scored(model), 2)
    return row


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--only", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = kept(options.json) or []
    for name in options.only:
        for size in TASKS[name][2]:
            if not any((row["model"], row["size"]) == (name, size) for row in rows):
                rows.append(measure(name, size))
                print(rows[-1], flush=True)
                keep(options.json, rows)


if __name__ == "__main__":
    main()
