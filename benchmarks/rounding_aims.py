"""What AdaRound aims at, and around which codes: on a small network, with several draws of samples.

``python -m benchmarks.rounding_aims`` rounds the five weights of the network of ``dither demo``
(scikit-learn's digits) to few bits, one symmetric grid for each output with the least squared
error, layer by layer under the quantized layers before, from 250 training images without labels:
nearest codes; AdaRound that aims at the weight itself; and AdaRound that makes up for the layers
before (cross moments), with codes next to the weight, as in the paper, or next to the weight that
does so best. ``distance`` is the relative squared error of logits on 797 test images, ``test``
their top-1 in percent. Batch norm stays as it is.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.kept import keep, kept
from dither.calibrate import in_sequence
from dither.core import Encoder
from dither.data import squared
from dither.demo import network as digits
from dither.encoders import AdaRound, Ranges
from dither.formats import Affine
from dither.model import duplicate

RESULTS = Path(__file__).parent / "results" / "rounding_aims.json"
SAMPLES, ITERATIONS, EPOCHS = 250, 1000, 12


def ways(bits: int) -> dict[str, tuple[Encoder, bool]]:
    """By name: the encoder, and whether it is given cross moments."""
    form = Affine(bits, axis=0)
    return {
        "nearest": (Ranges(form), False),
        "AdaRound, aims at the weight": (AdaRound(form, iterations=ITERATIONS), False),
        "AdaRound, cross moments, around the weight": (
            AdaRound(form, iterations=ITERATIONS, around="weight"),
            True,
        ),
        "AdaRound, cross moments, around the target": (
            AdaRound(form, iterations=ITERATIONS, around="target"),
            True,
        ),
    }


def measure(model: nn.Module, bits: int, name: str, seed: int) -> dict[str, float]:
    """One row."""
    images, _ = digits.training_set()
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:SAMPLES]
    encoder, is_crossed = ways(bits)[name]
    weights = [n for n, p in model.named_parameters() if p.ndim > 1]
    batches = list(images[drawn].split(50))
    made = in_sequence(model, batches, dict.fromkeys(weights, encoder), corrected=is_crossed)
    changed = duplicate(model)
    with torch.no_grad():
        for weight, encoded in made.items():
            changed.get_parameter(weight).copy_(encoded.decode())
    tested, labels = digits.test_set()
    logits, wanted = digits.predict(changed, tested), digits.predict(model, tested)
    score = 100 * digits.accuracy(logits, labels)
    return {"distance": float(squared(logits, wanted)), "test": round(score, 2)}


def main() -> None:
    """Measure what is missing in the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = kept(RESULTS) or {}
    model = digits.train(EPOCHS)
    _, labels = digits.test_set()
    score = digits.accuracy(digits.predict(model, digits.test_set()[0]), labels)
    rows["fp32"] = {"test": round(100 * score, 2)}
    for bits in given.bits:
        for name in ways(bits):
            row = rows.setdefault(f"{bits} bits / {name}", {"seeds": {}})
            for seed in given.seeds:
                if str(seed) not in row["seeds"]:
                    row["seeds"][str(seed)] = measure(model, bits, name, seed)
            for key in ("distance", "test"):
                row[key] = statistics.mean(found[key] for found in row["seeds"].values())
            print(f"{bits} bits / {name:45} {row['distance']:.4f} {row['test']:.2f}", flush=True)
            keep(RESULTS, rows)


if __name__ == "__main__":
    main()
