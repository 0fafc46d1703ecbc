"""Scores with stored weights and integer activations, as the papers' tables have them.

``python -m benchmarks.activations`` scores three models: ResNet-20 on CIFAR-10, MiniLM on STS-B and
on SST-2. Grids of activations, AdaRound, GPTQ and bias correction see 500 training samples without
labels. What there is to choose (ranges, groups, their number) was chosen with ``--splits dev``;
each row is measured on test once. Every score is saved at once and not computed again.
"""

from __future__ import annotations

import argparse
import json
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.activation_rows import (
    ITERATIONS,
    SAMPLES,
    Row,
    evaluate,
    forward,
    rows,
    samples,
    stored,
)
from benchmarks.environment import describe
from benchmarks.tasks import Split
from dither.activations import apply, observe, remove
from dither.data import Data

RESULTS = Path(__file__).parent / "results" / "activations.json"
TITLES = {
    "resnet20_cifar10": "ResNet-20, CIFAR-10, top-1 in %",
    "minilm_stsb": "MiniLM, STS-B, 100 x Spearman's correlation",
    "minilm_sst2": "MiniLM, SST-2 (210 steps of fine-tuning, one seed), accuracy in %",
}


def read() -> dict[str, Any]:
    """Results so far."""
    found: dict[str, Any] = {}
    if RESULTS.is_file():
        found = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def note(task: str, split: str, name: str, values: dict[str, Any]) -> None:
    """Save a score at once, next to what other processes have saved since."""
    results = read()
    results.setdefault(f"{task}/{split}", {})[name] = values
    results["environment"] = describe()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(table(results), encoding="utf-8")
    print(f"{task:18} {split:5} {name:48} {values['score']:7.3f}", flush=True)


def measure(task: str, splits: list[Split], wanted: list[str]) -> None:
    """All rows of a task that match a glob and are not there yet."""
    models: dict[str, nn.Module] = {}
    data: list[Any] = samples(task)
    for row in rows(task):
        missing = [split for split in splits if row.name not in read().get(f"{task}/{split}", {})]
        if not missing or not any(fnmatchcase(row.name, glob) for glob in wanted):
            continue
        if row.weights not in models:
            start = time.monotonic()
            models = {row.weights: stored(task, row.weights, data)}  # one at a time
            print(f"{row.weights}: {time.monotonic() - start:.0f} s", flush=True)
        _score(task, row, models[row.weights], data, missing)


def _score(task: str, row: Row, model: nn.Module, data: list[Any], splits: list[Split]) -> None:
    more: dict[str, Any] = {}
    start = time.monotonic()
    if row.plan is not None:
        found = observe(model, row.plan, Data(data, forward))
        apply(model, found)
        more = {"calibration_seconds": time.monotonic() - start}
        more |= {"sites": len(found), "numbers": found.parameters}
    for split in splits:
        start = time.monotonic()
        score = evaluate(task, model, split)
        note(task, split, row.name, {"score": score, "seconds": time.monotonic() - start, **more})
    remove(model)


def table(results: dict[str, Any]) -> str:
    """Scores as markdown, by task; the difference is from fp32 on the same split."""
    many = ", ".join(f"{count:,} ({task})" for task, count in ITERATIONS.items())
    lines = [
        f"`python -m benchmarks.activations`. Data: {SAMPLES} training samples without labels.",
        "W: bits of weights, one scale for each output unless it says per tensor; tables of",
        "embeddings have 8 bits. A: bits of activations. Iterations of AdaRound: " + many + ".",
    ]
    for task, title in TITLES.items():
        dev, test = (results.get(f"{task}/{split}", {}) for split in ("dev", "test"))
        if not dev and not test:
            continue
        lines += ["", f"## {title}", ""]
        lines += ["| | dev | test | test - fp32 |", "| --- | --- | --- | --- |"]
        names = list(dict.fromkeys([*(row.name for row in rows(task)), *dev, *test]))
        for name in names:
            cells = [
                f"{found[name]['score']:.2f}" if name in found else "" for found in (dev, test)
            ]
            gap = ""
            if name in test and "fp32" in test and name != "fp32":
                gap = f"{test[name]['score'] - test['fp32']['score']:+.2f}"
            if any(cells):
                lines.append(f"| {name} | {cells[0]} | {cells[1]} | {gap} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing in the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--splits", nargs="+", default=["dev", "test"], choices=["dev", "test"])
    parser.add_argument("--rows", nargs="+", default=["*"], help="globs of the names of rows")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for task in given.tasks:
        measure(task, given.splits, given.rows)


if __name__ == "__main__":
    main()
