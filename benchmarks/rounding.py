"""AdaRound and GPTQ against rounding to nearest, on bounded grids with one scale for each output.

``python -m benchmarks.rounding`` stores the weights of ResNet-20 (all convolutions and the
classifier) and of MiniLM (the linear layers of its encoder) at 4, 3 and 2 bits, symmetric, and
leaves all else in fp32, MiniLM's embeddings too. Moments of the inputs are those of 500 training
samples without labels: of the original model ("parallel"), or layer by layer under the encoded
layers before ("sequence", with cross moments, so that errors before are made up for; "sequence, own
aim", without). Nothing is trained, no batch norm re-estimated.
Every row has its scores on development and on test data, is saved at once and not computed again;
no setting was chosen by a test score. ``error`` is the mean over layers of the output error's share
of the output's second moment, under the original model's inputs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.calibration import samples
from benchmarks.environment import describe
from benchmarks.tasks import minilm_stsb, resnet20_cifar10
from dither.calibrate import collect, in_sequence
from dither.core import Encoded, Encoder, Stats
from dither.encoders import GPTQ, AdaRound, Ranges, SequentialMSE
from dither.encoders.outputs import matrix_of, output_errors
from dither.formats import Affine

RESULTS = Path(__file__).parent / "results" / "rounding.json"
TASKS: dict[str, Any] = {"resnet20_cifar10": resnet20_cifar10, "minilm_stsb": minilm_stsb}
ITERATIONS = {"resnet20_cifar10": 2000, "minilm_stsb": 500}
BITS = (4, 3, 2)
GROUPS = "4 bits, groups of 128 inputs, parallel"
DAMPING = 0.01


def encoders(task: str, bits: int) -> dict[str, Encoder]:
    """By the name of the row."""
    fmt = Affine(bits, axis=0)
    steps = ITERATIONS[task]
    return {
        "nearest, min-max": Ranges(fmt, "minmax"),
        "nearest, mse": Ranges(fmt, "mse"),
        "nearest, output (SequentialMSE)": SequentialMSE(fmt),
        "GPTQ, mse": GPTQ(format=fmt, damping=DAMPING),
        "GPTQ, mse, ordered": GPTQ(format=fmt, damping=DAMPING, ordered=True),
        "GPTQ, output, ordered": GPTQ(format=fmt, damping=DAMPING, ordered=True, ranges="output"),
        "AdaRound, mse": AdaRound(fmt, iterations=steps, around="target"),
        "AdaRound, output": AdaRound(fmt, iterations=steps, ranges="output"),
        "AdaRound, mse, around the weight": AdaRound(fmt, iterations=steps, around="weight"),
    }


def grouped() -> dict[str, Encoder]:
    """As torchao's GPTQ: 4 bits, groups of 128 inputs, least to greatest value in 15 steps."""
    fmt = Affine(4, group=128, grid="endpoint")
    fed: dict[str, Any] = {"format": fmt, "damping": DAMPING}
    return {
        "nearest, min-max": Ranges(fmt, "minmax"),
        "nearest, mse": Ranges(fmt, "mse"),
        "GPTQ, min-max": GPTQ(**fed, ranges="minmax"),
        "GPTQ, mse": GPTQ(**fed),
        "GPTQ, mse, ordered": GPTQ(**fed, ordered=True),
    }


AROUND = "AdaRound, mse, around the weight"
SEQUENCE = ("nearest, output (SequentialMSE)", "GPTQ, mse, ordered", "AdaRound, mse", AROUND)
"""Rows that are also measured layer by layer; :data:`AROUND` differs only there."""
OWN_AIM = ("AdaRound, mse",)
"""Rows layer by layer whose aim is the weight, with no cross moments."""
MODES = {"parallel": (), "sequence": SEQUENCE, "sequence, own aim": OWN_AIM}


def weights_of(task: str, model: nn.Module) -> list[str]:
    """Names of the weights that are stored in few bits."""
    start = "encoder." if task == "minilm_stsb" else ""
    kinds = (nn.Linear, nn.Conv2d)
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, kinds) and name.startswith(start)
    ]


def error_of(model: nn.Module, made: Mapping[str, Encoded], stats: Mapping[str, Stats]) -> float:
    """Mean over layers of the output error's share of the output's second moment."""
    shares = []
    for name, encoded in made.items():
        weight, known = model.get_parameter(name).detach(), stats[name]
        assert known.gram is not None
        error, whole = (
            output_errors(matrix_of(part, known.outputs), known.gram).sum()
            for part in (encoded.decode() - weight, weight)
        )
        shares.append(float(error / whole))
    return sum(shares) / len(shares)


class Bench:
    """One task: its model, samples and statistics, and the rows that are there already."""

    def __init__(self, task: str, results: dict[str, Any], only: str = "") -> None:
        self.only = only
        self.task, self.module = task, TASKS[task]
        self.rows: dict[str, Any] = results.setdefault(task, {})
        self.results = results
        self.model: nn.Module = self.module.load()
        self.names = weights_of(task, self.model)
        self.batches = samples(task)
        self.stats = collect(self.model, self.batches)

    def note(self, name: str, made: Mapping[str, Encoded], seconds: float) -> None:
        """Score the model with these weights, and save the row."""
        model = self.module.load()
        with torch.no_grad():
            for path, encoded in made.items():
                model.get_parameter(path).copy_(encoded.decode())
        row = {split: self.module.evaluate(model, split) for split in ("dev", "test")}
        row["error"] = error_of(self.model, made, self.stats) if made else 0.0
        self.rows[name] = {**row, "encode_seconds": round(seconds, 1)}
        save(self.results)
        print(f"{self.task:18} {name:48} {row['dev']:7.3f} {row['test']:7.3f}", flush=True)

    def parallel(self, mode: str, made_by: Mapping[str, Encoder]) -> None:
        """Rows under the original model's inputs."""
        for name, encoder in made_by.items():
            title = f"{mode}, {name}"
            if title not in self.rows and self.only in title and name != AROUND:
                start = time.monotonic()
                made = {
                    path: encoder.encode(self.model.get_parameter(path).detach(), self.stats[path])
                    for path in self.names
                }
                self.note(title, made, time.monotonic() - start)

    def sequence(self, bits: int, mode: str) -> None:
        """Rows under the inputs that the encoded layers before give."""
        for name in MODES[mode]:
            title = f"{bits} bits, {mode}, {name}"
            if title not in self.rows and self.only in title:
                start = time.monotonic()
                chosen = dict.fromkeys(self.names, encoders(self.task, bits)[name])
                cross = mode == "sequence"
                made = in_sequence(self.model, self.batches, chosen, corrected=cross)
                self.note(title, made, time.monotonic() - start)


def save(results: dict[str, Any]) -> None:
    """Write the results and their table; rows of other tasks that were saved meanwhile stay."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for task in TASKS:
        for name, row in found.get(task, {}).items():
            results.setdefault(task, {}).setdefault(name, row)
    replace_text(RESULTS, json.dumps(results, indent=1) + "\n")
    replace_text(RESULTS.with_suffix(".md"), table(results))


def replace_text(path: Path, text: str) -> None:
    """Write a file as a whole, so that another run never reads a part."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def table(results: Mapping[str, Any]) -> str:
    """The rows as Markdown: dev and test, in percent."""
    lines = [
        "`python -m benchmarks.rounding`; scores in percent, dev / test, and in brackets",
        "the output error's share of the output's second moment, mean over layers, in percent.",
        "",
    ]
    for task in TASKS:
        rows = results.get(task)
        if not rows or "fp32" not in rows:
            continue
        lines += [f"**{task}**, fp32: {rows['fp32']['dev']:.2f} / {rows['fp32']['test']:.2f}", ""]
        lines += ["| inputs | method, ranges | " + " | ".join(f"{b} bits" for b in BITS) + " |"]
        lines += ["| --- | --- |" + " --- |" * len(BITS)]
        for mode in MODES:
            for name in encoders(task, BITS[0]):
                found = [rows.get(f"{bits} bits, {mode}, {name}") for bits in BITS]
                cells = [_cell(row) if row else "" for row in found]
                if any(cells):
                    lines.append(f"| {mode} | {name} | {' | '.join(cells)} |")
        lines.append("")
        groups = {name: rows.get(f"{GROUPS}, {name}") for name in grouped()}
        if any(groups.values()):
            lines += [f"{GROUPS}:", "", "| method, ranges | dev / test |", "| --- | --- |"]
            for name, row in {**groups, **_peer()}.items():
                if row:
                    lines.append(f"| {name} | {_cell(row)} |")
            lines.append("")
    return "\n".join(lines)


def _cell(row: Mapping[str, float]) -> str:
    scores = f"{row['dev']:.2f} / {row['test']:.2f}"
    return f"{scores} ({100 * row['error']:.2f})" if "error" in row else scores


def _peer() -> dict[str, Any]:
    """Rows of torchao, where they are there."""
    path = RESULTS.with_name("torchao_gptq.json")
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {f"torchao, {name}": found[name] for name in ("nearest", "GPTQ") if name in found}


def main() -> None:
    """Measure what is missing in the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    results["environment"] = describe()
    for task in given.tasks:
        bench = Bench(task, results, given.only)
        if "fp32" not in bench.rows:
            bench.note("fp32", {}, 0.0)
        if task == "minilm_stsb":
            bench.parallel(GROUPS, grouped())
        for bits in BITS:
            bench.parallel(f"{bits} bits, parallel", encoders(task, bits))
        for bits in BITS:
            for mode in ("sequence", "sequence, own aim"):
                bench.sequence(bits, mode)


if __name__ == "__main__":
    main()
