"""Where a better method scores worse: the same rows by the distance of outputs on unseen samples.

``python -m benchmarks.by_distance`` rounds the weights of ResNet-20 to 3 bits and those of MiniLM's
encoder to 4, a symmetric grid for each output, and leaves activations alone. Of 500 training
samples without labels every other batch calibrates, the rest are compared: ``distance`` is the
divergence of class probabilities in nats for ResNet-20, the relative squared error of sentence
embeddings for MiniLM; ``weights`` the relative squared error of the weights themselves. ``norms``:
batch norm folded, and biases corrected by what it says.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.calibration import samples
from benchmarks.kept import keep, kept
from benchmarks.rounding import TASKS, weights_of
from dither.calibrate import collect
from dither.core import Encoder
from dither.data import Data, divergence, squared
from dither.encoders import GPTQ, AdaRound, Ranges
from dither.formats import Affine
from dither.model import evaluating
from dither.rewrite import correct_biases_by_norms, expected_inputs, fold_batch_norm

RESULTS = Path(__file__).parent / "results" / "by_distance.json"
BITS = {"resnet20_cifar10": 3, "minilm_stsb": 4}
DISTANCES = {"resnet20_cifar10": divergence, "minilm_stsb": squared}
NORMS = ", biases by norms"


def ways(task: str) -> dict[str, Encoder]:
    """By name; AdaRound of a small model only, since it takes long."""
    form = Affine(BITS[task], axis=0)
    found: dict[str, Encoder] = {
        "nearest, min-max": Ranges(form, "minmax"),
        "nearest, mse": Ranges(form, "mse"),
        "GPTQ, mse": GPTQ(format=form, damping=0.01),
    }
    if task == "resnet20_cifar10":
        found["AdaRound, mse"] = AdaRound(form, iterations=100)
    return found


class Bench:
    """A task's model and its two halves of samples."""

    def __init__(self, task: str) -> None:
        self.task, self.model = task, TASKS[task].load()
        batches = samples(task)
        self.calibrating, self.unseen = batches[::2], batches[1::2]
        self.data = Data(self.unseen, distance=DISTANCES[task])

    def rows(self) -> dict[str, Any]:
        """All rows."""
        stats = collect(self.model, self.calibrating)
        found: dict[str, Any] = {}
        for name, encoder in ways(self.task).items():
            changed = copy.deepcopy(self.model)
            for weight in weights_of(self.task, changed):
                value = changed.get_parameter(weight).data
                value.copy_(encoder.encode(value.clone(), stats[weight]).decode())
            found[name] = {"distance": self.distance(changed), "weights": self.error(changed)}
            print(self.task, name, found[name], flush=True)
        if self.task == "resnet20_cifar10":
            found |= self.corrected()
        return found

    def corrected(self) -> dict[str, Any]:
        """Nearest codes with batch norm folded and biases corrected, without data."""
        found: dict[str, Any] = {}
        folded = copy.deepcopy(self.model)
        channels = fold_batch_norm(folded)
        for name in ("nearest, min-max", "nearest, mse"):
            changed, encoder = copy.deepcopy(folded), ways(self.task)[name]
            for weight in weights_of(self.task, changed):
                value = changed.get_parameter(weight).data
                value.copy_(encoder.encode(value.clone()).decode())
            found[f"{name}, folded"] = {"distance": self.distance(changed)}
            correct_biases_by_norms(changed, folded, expected_inputs(folded, channels))
            found[f"{name}, folded{NORMS}"] = {"distance": self.distance(changed)}
        return found

    @torch.no_grad()
    def distance(self, changed: nn.Module) -> float:
        """On unseen samples."""
        data = self.data
        with evaluating(changed):
            found = [
                float(data.distance(data.output(changed, b), data.output(self.model, b)))
                for b in data
            ]
        return sum(found) / len(found)

    def error(self, changed: nn.Module) -> float:
        """Relative squared error of all weights."""
        pairs = [
            (changed.get_parameter(n).detach(), self.model.get_parameter(n).detach())
            for n in weights_of(self.task, self.model)
        ]
        noise = sum(float((a - b).square().sum()) for a, b in pairs)
        return noise / sum(float(b.square().sum()) for _, b in pairs)


def main() -> None:
    """Measure what is missing in the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(BITS), choices=list(BITS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = kept(RESULTS) or {}
    for task in given.tasks:
        if task not in rows:
            rows[task] = Bench(task).rows()
            keep(RESULTS, rows)
            print(json.dumps(rows[task], indent=1))


if __name__ == "__main__":
    main()
