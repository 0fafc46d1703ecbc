"""What noise costs: one training step through surrogates over a plain one, MiniLM on a CPU.

``python -m benchmarks.noise_cost`` takes plain and noisy steps in turn within one process (batch 32
x 64 tokens, Adam, noise in every matrix) and gives the ratio of their median CPU times, then the
peak memory of a process for each method over that of a plain one.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import dither
from benchmarks.environment import describe
from benchmarks.tasks import minilm_stsb
from dither.formats import Affine, Product
from dither.train import Method

BATCH, TOKENS = 32, 64
METHODS: dict[str, Callable[[], Method]] = {
    "lsq": lambda: dither.LSQ(4),
    "quant_noise_proxy": lambda: dither.QuantNoise(Product(8), p=0.1, kind="proxy"),
    "quant_noise_int4": lambda: dither.QuantNoise(Affine(4), p=0.5),
    "diffq_8": lambda: dither.DiffQ(group=8),
    "diffq_1": lambda: dither.DiffQ(group=1),
}
LIMITS = {
    "lsq": 1.15,
    "quant_noise_proxy": 1.15,
    "quant_noise_int4": 1.15,
    "diffq_8": 1.3,
    "diffq_1": 1.6,
}


class Trainer:
    """A model with its optimizer, plain or attached, and one step of training."""

    def __init__(self, model: nn.Module, method: str | None) -> None:
        self.model = model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.run: dither.Run | None = None
        if method is not None:
            matrices = [n for n, p in model.named_parameters() if p.ndim > 1]
            self.run = dither.attach(model, dict.fromkeys(matrices, METHODS[method]()), steps=1000)
        self.optimizer = torch.optim.Adam(model.parameters(), 1e-5)
        if self.run is not None:
            self.run.join(self.optimizer)

    def step(self, tokens: Tensor) -> float:
        """Train on a batch of token ids; returns CPU seconds."""
        start = time.process_time()
        loss: Tensor = self.model(input_ids=tokens).last_hidden_state.square().mean()
        if self.run is not None:
            loss = loss + self.run.penalty()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.run is not None:
            self.run.step()
        return time.process_time() - start


def batch(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(1000, 30000, (BATCH, TOKENS), generator=generator)


def ratio(method: str, steps: int) -> dict[str, float]:
    """Medians of plain and noisy steps, taken in turn."""
    plain, noisy = (Trainer(copy.deepcopy(minilm_stsb.load()), m) for m in (None, method))
    times: dict[str, list[float]] = {"plain": [], "noisy": []}
    for number in range(steps + 2):
        pair = {"plain": plain.step(batch(number)), "noisy": noisy.step(batch(number))}
        for name, seconds in pair.items() if number > 1 else ():
            times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    pairs = [n / p for p, n in zip(times["plain"], times["noisy"], strict=True)]
    return {
        "plain_seconds": round(medians["plain"], 3),
        "noisy_seconds": round(medians["noisy"], 3),
        "ratio": round(statistics.median(pairs), 3),
    }


def peak(method: str | None) -> int:
    """Peak memory in MB of a process that takes three steps."""
    command = [sys.executable, "-m", "benchmarks.noise_cost", "--peak", method or "plain"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/noise_cost.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        trainer = Trainer(minilm_stsb.load(), None if options.peak == "plain" else options.peak)
        for number in range(3):
            trainer.step(batch(number))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // 10**6)
        return
    plain, rows = peak(None), {}
    for method in options.methods:
        rows[method] = {**ratio(method, options.steps), "limit": LIMITS[method]}
        rows[method]["extra_megabytes"] = peak(method) - plain
        print(method, rows[method], flush=True)
    result = {"environment": describe(), "plain_megabytes": plain, "methods": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
