"""Squared error of codes on a trellis against those on a scalar grid, at equal coded bytes.

``python -m benchmarks.trellis`` codes matrices of the real models at three rates, by a scalar grid
(nearest codes; error feedback) and by a trellis (best path; error feedback). Gains are in decibels
of the squared error (fed: of the output error under prior second moments), where the curve of the
scalar grid is interpolated at the trellis's bytes. Parts are coded in full, tables and all.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.data_free import _checkpoint
from benchmarks.environment import describe
from dither.archive import code, pack
from dither.checkpoint import read_checkpoint
from dither.core import Encoded, Stats
from dither.encoders import GPTQ
from dither.encoders.viterbi import Viterbi
from dither.search.priors import prior_gram

MATRICES = {
    "resnet20_cifar10": ("layer1.1.conv1.weight", "layer2.1.conv1.weight", "layer3.1.conv1.weight"),
    "minilm_stsb": (
        "encoder.layer.0.attention.self.key.weight",
        "encoder.layer.3.intermediate.dense.weight",
    ),
}
RATES = (2.0, 3.0, 4.0)
"""Bits for each weight, about."""


def _decibels(encoded: Encoded, weight: Tensor, gram: Tensor | None) -> float:
    error = (encoded.decode() - weight).reshape(len(weight), -1).double()
    if gram is None:
        return 10 * math.log10(float(error.square().sum()))
    parts = error.split(len(gram), dim=1)
    losses = [((e @ gram[: len(e.T), : len(e.T)].double()) * e).sum() for e in parts]
    return 10 * math.log10(float(sum(losses)))


def _seconds_to_decode(encoded: Encoded) -> float:
    archive = pack({"w": encoded})
    times = []
    for _ in range(5):
        start = time.perf_counter()
        _ = archive["w"]
        times.append(time.perf_counter() - start)
    return min(times)


def measure(weight: Tensor, *, fed: bool, states: int) -> list[dict[str, float]]:
    """A row for each rate."""
    gram = prior_gram(weight) if fed else None
    stats, spread = Stats(gram=gram), float(weight.std())
    curve = []
    for octave in np.arange(-0.5, 3.01, 0.5):
        grid = GPTQ(spread * 2.0**-octave).encode(weight, stats)
        curve.append((code(grid).nbytes, _decibels(grid, weight, gram)))
    rows = []
    for rate in RATES:
        step = spread * 2.0 ** (2.05 - rate)
        start = time.perf_counter()
        found = Viterbi(step / 2, states=states).encode(weight, stats)
        seconds = time.perf_counter() - start
        nbytes = code(found).nbytes
        at_grid = float(np.interp(nbytes, [n for n, _ in curve], [loss for _, loss in curve]))
        row = {
            "bits": 8 * nbytes / weight.numel(),
            "gain_db": at_grid - _decibels(found, weight, gram),
        }
        row["encode_s"] = seconds
        row["decode_ratio"] = _seconds_to_decode(found) / _seconds_to_decode(
            GPTQ(step).encode(weight, stats)
        )
        rows.append({name: round(value, 3) for name, value in row.items()})
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--states", nargs="*", type=int, default=[8, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for task, names in MATRICES.items():
        state = read_checkpoint(_checkpoint(task))
        for name in names:
            for states in arguments.states:
                for fed in (False, True):
                    about = {"task": task, "tensor": name, "states": states, "fed": fed}
                    for row in measure(state[name].float(), fed=fed, states=states):
                        rows.append({**about, **row})
                        print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(describe() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
