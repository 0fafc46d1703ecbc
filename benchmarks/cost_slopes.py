"""What compressing without data costs as models grow: processor time and memory.

    python -m benchmarks.cost_slopes [--millions 1 10 100 1000] [--threads 2] [--json FILE]

Models are like a language model of five blocks (:mod:`benchmarks.larger_than_memory`), their widths
growing with the square root of their size, in bfloat16, to a quarter of their bytes. Each is made
and compressed in a process of its own. Noted are its seconds while it compresses, of the processor
and of the clock, by how much its resident memory then grows at its peak, and that peak itself, the
weights and all libraries included. Slopes are those of straight lines through the logarithms: 1 is
in proportion to the number of weights. A plot goes beside the JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dither
from benchmarks.environment import describe
from benchmarks.larger_than_memory import drawn, layers
from benchmarks.peak_memory import Peak, restart_for_exact_peaks

RESULTS = Path(__file__).parent / "results"
WIDTH = 128
"""Of a model of a million weights."""

STEP = 32
"""Widths are its multiples."""

SIZE = "4x"
COSTS = {
    "cpu_seconds": "processor time, s",
    "grown_nbytes": "memory beside the weights, bytes",
}


def model_of(millions: float) -> dict[str, torch.Tensor]:
    """Tensors of about so many million weights."""
    width = max(STEP, round(WIDTH * math.sqrt(millions) / STEP) * STEP)
    return {
        name: drawn(shape, seed)
        for seed, (name, shape) in enumerate(layers(2 * millions / 1000, width))
    }


def measured(millions: float) -> dict[str, float]:
    """Costs of one model, in this process."""
    tensors = model_of(millions)
    peak = Peak()
    clock, processor = time.perf_counter(), time.process_time()
    nbytes = dither.compress(tensors, SIZE).nbytes
    costs = {
        "cpu_seconds": time.process_time() - processor,
        "seconds": time.perf_counter() - clock,
        "grown_nbytes": peak.grew(),
        "peak_nbytes": Peak.whole(),
    }
    weights = sum(tensor.numel() for tensor in tensors.values())
    return {"weights": weights, "nbytes": nbytes, **costs}


def apart(millions: float, threads: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cost_slopes", "--one", str(millions)]
    command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def slope(rows: list[dict[str, float]], cost: str) -> float:
    """Of the line of least squares through the logarithms."""
    logs = np.log([[row["weights"], row[cost]] for row in rows])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def plot(rows: list[dict[str, float]], slopes: dict[str, float], path: Path) -> None:
    """Both costs, on logarithmic axes."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(COSTS), figsize=(7, 3))
    for panel, (cost, label) in zip(panels, COSTS.items(), strict=True):
        panel.loglog([row["weights"] for row in rows], [row[cost] for row in rows], marker="o")
        panel.set(xlabel="weights", ylabel=label, title=f"slope {slopes[cost]:.2f}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 10, 100])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", type=float, help="measure one model in this process")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        restart_for_exact_peaks()
        print(json.dumps(measured(arguments.one)))
        return
    rows = []
    for millions in arguments.millions:
        rows.append(apart(millions, arguments.threads))
        print(json.dumps(rows[-1]), flush=True)
    slopes = {cost: slope(rows, cost) for cost in COSTS} if len(rows) > 1 else {}
    result: dict[str, Any] = describe() | {"models": rows, "slopes": slopes}
    print(json.dumps(slopes))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if slopes:
            plot(rows, slopes, arguments.json.parent / "plots" / "cost_slopes.png")


if __name__ == "__main__":
    main()
