"""The white paper's table of pipelines, on EfficientNet-lite0 (fp32 75.42 % in the paper).

``python -m benchmarks.pipelines`` puts the network on grids in several ways, with 250 ImageNet
images, and scores 750 others. Every row is saved at once and not computed again. ``distance`` is
the Kullback-Leibler divergence of outputs on the 250 images, after each step.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.kept import keep, kept
from benchmarks.zoo_models import efficientnet_lite0
from dither.activations import Activation, apply, inputs_of_layers, observe
from dither.calibrate import in_sequence
from dither.data import Data
from dither.encoders import GPTQ
from dither.formats import Affine
from dither.model import duplicate
from dither.recipes.model_layers import layers
from dither.recipes.white_paper import ptq
from dither.rewrite import fold_batch_norm

RESULTS = Path(__file__).parent / "results" / "pipelines.json"
WIDTHS: dict[str, tuple[int, int | None]] = {"W8A8": (8, 8), "W4A8": (4, 8), "W4": (4, None)}
SCALES = {"tensor": None, "channel": 0}
ITERATIONS = 300

WAYS: dict[str, dict[str, Any]] = {
    "min-max": {},
    "MSE": {"rounding": "nearest", "equalized": False},
    "MSE, equalized": {"rounding": "nearest", "equalized": True},
    "MSE, biases corrected": {"rounding": "correct biases", "equalized": False},
    "MSE, biases corrected by norms": {
        "rounding": "correct biases by norms",
        "equalized": False,
    },
    "MSE, activations by norms": {"rounding": "nearest", "equalized": False},
    "MSE, equalized, biases corrected": {"rounding": "correct biases", "equalized": True},
    "AdaRound": {"rounding": "adaround", "equalized": False, "iterations": ITERATIONS},
    "pipeline": {"rounding": "adaround", "iterations": ITERATIONS},
    "GPTQ": {},
}
"""Rows; ``pipeline`` is :func:`ptq` by its defaults, with fewer iterations."""


def by_hand(
    model: nn.Module, data: Data, way: str, bits: int, activations: int | None, axis: int | None
) -> nn.Module:
    """Ways that are no part of the white paper's pipeline: its baseline, and GPTQ."""
    found, form = duplicate(model), Affine(bits, axis=axis)
    fold_batch_norm(found)
    weights = {layer.name: found.get_parameter(layer.name) for layer in layers(found)}
    made = {name: form.encode(weight.detach()) for name, weight in weights.items()}
    if way == "GPTQ":
        made |= in_sequence(found, data, dict.fromkeys(weights, GPTQ(format=form, damping=0.01)))
    with torch.no_grad():
        for name, encoded in made.items():
            weights[name].copy_(encoded.decode())
    if activations is not None:
        ranges = "minmax" if way == "min-max" else "mse"
        spec = Activation(activations, ranges=ranges)
        apply(found, observe(found, dict.fromkeys(inputs_of_layers(found, data), spec), data))
    return found


def measure(model: nn.Module, data: Data, name: str) -> dict[str, Any]:
    """One row."""
    widths, scales, way = name.split(" / ")
    bits, activations = WIDTHS[widths]
    start, steps = time.process_time(), []
    if WAYS[way]:
        spec: int | Activation | None = activations
        if activations is not None and way.endswith("activations by norms"):
            spec = Activation(activations, ranges="norms")
        given = {"weights": bits, "activations": spec, "axis": SCALES[scales], **WAYS[way]}
        found = ptq(model, data, **given)
        quantized, steps = found.model, [asdict(step) for step in found.steps]
    else:
        quantized = by_hand(model, data, way, bits, activations, SCALES[scales])
    seconds = time.process_time() - start
    score = efficientnet_lite0.evaluate(quantized)
    return {"score": score, "cpu_seconds": round(seconds, 1), "steps": steps}


def main() -> None:
    """Measure what is missing in the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", nargs="+", default=list(WIDTHS), choices=list(WIDTHS))
    parser.add_argument("--scales", nargs="+", default=list(SCALES), choices=list(SCALES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = kept(RESULTS) or {}
    model, data = efficientnet_lite0.load(), efficientnet_lite0.samples()
    names = [f"{a} / {b} / {c}" for a in given.widths for b in given.scales for c in given.ways]
    for name in ["fp32", *names]:
        if name not in rows:
            if name == "fp32":
                rows[name] = {"score": efficientnet_lite0.evaluate(model)}
            else:
                rows[name] = measure(model, data, name)
            print(f"{name:50} {rows[name]['score']:.2f}", flush=True)
            keep(RESULTS, rows)


if __name__ == "__main__":
    main()
