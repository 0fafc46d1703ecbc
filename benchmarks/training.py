"""What the benchmarks of training share: runs that take up where they were stopped, and scores.

Rows have the ``distance`` of outputs from fp32's on training samples drawn by another seed, too: of
ResNet-20 Kullback-Leibler divergence in nats, of MiniLM's embeddings twice the cosine error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import dither
from benchmarks.distances import of_file
from benchmarks.environment import describe

Train = Callable[[int, int, Any, Path], tuple[Path, dict[str, Any]]]
"""Trains to a budget with a seed, for so long, in a folder; returns the file and its row."""

Planned = Callable[[nn.Module], dither.Plan | None]
"""The plan for a model, or None for what a budget does by default."""


def by_default(_: nn.Module) -> dither.Plan | None:
    """Leave the plan to the budget."""
    return None


def take_up(path: Path, model: nn.Module, optimizer: Optimizer, run: dither.Run) -> float:
    """Load what :func:`keep` saved, if it did; returns the seconds spent before."""
    if not path.exists():
        return 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    run.load_state_dict(state["run"])
    return float(state["seconds"])


def keep(
    path: Path, model: nn.Module, optimizer: Optimizer, run: dither.Run, seconds: float
) -> None:
    """Save a run in the middle, whole or not at all."""
    state: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"run": run.state_dict(), "seconds": seconds}
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def report(run: dither.Run, loss: float, seconds: float) -> None:
    """Print one line on where training stands."""
    weight = run.controller.weight if run.controller else 0.0
    print(
        f"step {run.done}/{run.steps}  loss {loss:.4f}  predicted {run.predicted_nbytes():.0f} B  "
        f"lambda {weight:.4f}  {seconds:.0f} s",
        flush=True,
    )


def write_file(run: dither.Run, path: Path, before: int) -> dict[str, Any]:
    """Save a finished run; returns sizes and how far it was trimmed."""
    trim = max(surrogate.trim for surrogate in run.surrogates.values())
    return {"bytes": run.save(path), "untrimmed": before, "trim_octaves": trim}


def score(task: str, path: Path, split: str) -> float:
    """The score of a file, loaded in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.data_free", "--score", str(path)]
    command += ["--tasks", task, "--split", split, "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def main(
    description: str | None, task: str, train: Train, budgets: list[int], length: float
) -> None:
    """The command line: every budget and seed that the results file lacks.

    Args:
        description: of the benchmark.
        task: a module of :mod:`benchmarks.tasks`.
        train: one run.
        budgets: by default.
        length: how long to train by default: epochs or steps.
    """
    name = Path(sys.modules["__main__"].__file__ or task).stem
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--budgets", type=int, nargs="+", default=budgets)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--length", type=type(length), default=length, help="epochs or steps")
    parser.add_argument("--split", choices=["dev", "test"], default="dev", help="test: both")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=Path("out", name))
    parser.add_argument("--output", type=Path, help="results file (JSON)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    output = options.output or Path(f"benchmarks/results/{name}_{options.split}.json")
    result = json.loads(output.read_text()) if output.exists() else {"rows": []}
    known = {(row["budget"], row["seed"], row["length"]) for row in result["rows"]}
    for budget in options.budgets:
        for seed in options.seeds:
            if (budget, seed, options.length) in known:
                continue
            path, row = train(budget, seed, options.length, options.folder)
            row = {"budget": budget, "seed": seed, "length": options.length} | row
            splits = ["dev", "test"] if options.split == "test" else ["dev"]
            row |= {split: round(score(task, path, split), 2) for split in splits}
            row["distance"] = float(f"{of_file(task, path, seed):.4g}")
            print(row, flush=True)
            result = {"environment": describe(), "rows": [*result["rows"], row]}
            output.write_text(json.dumps(result, indent=1) + "\n")
