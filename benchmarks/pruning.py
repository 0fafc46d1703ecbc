"""At the same file size, does pruning with quantization beat quantization alone?

``python -m benchmarks.pruning --split test`` trains ResNet-20 to a few budgets as
``benchmarks.train_resnet20`` does (same loss, batches, steps and rates), with learned steps alone,
with a learned dead zone, and with magnitude pruning around them; ``--task minilm_stsb`` does so as
``benchmarks.train_minilm``. Interrupted runs go on; finished ones stay in the results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import train_minilm, train_resnet20
from benchmarks.kept import keep, kept
from benchmarks.training import Planned, score
from dither import LSQ, DeadZone, Plan, Pruned
from dither.train import Cyclical, Gradual, Method
from dither.train.default_plan import default_plan
from dither.train.sparsity import Sparsity

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Task:
    """A model, and how it is trained.

    Attributes:
        train: to a budget with a seed, for so long, in a folder, with a plan.
        budgets: bytes.
        unit: of lengths.
        length: how long by default.
        results: the file.
    """

    train: Callable[[int, int, Any, Path, Planned], tuple[Path, dict[str, Any]]]
    budgets: list[int]
    unit: str
    length: float
    results: str


TASKS = {
    "resnet20_cifar10": Task(train_resnet20.train, [34_000, 20_000], "epochs", 3.0, "pruning.json"),
    "minilm_stsb": Task(
        train_minilm.train, [2_670_000, 1_800_000], "steps", 200, "pruning_minilm.json"
    ),
}


def with_matrices(method: Method, model: nn.Module) -> Plan:
    """What a budget does by default, with another method for matrices."""
    rules = {name: method if isinstance(spec, LSQ) else spec for name, spec in default_plan(model)}
    return Plan(rules)


def under_masks(sparsity: Sparsity | None) -> Planned:
    """Learned steps of which some are pruned."""
    return partial(with_matrices, Pruned(LSQ(None), sparsity))


METHODS: dict[str, Planned] = {
    "learned steps": partial(with_matrices, LSQ(None)),
    "dead zone": partial(with_matrices, DeadZone(None)),
    "as many zeros as the budget says": under_masks(None),
    "80 % zeros": under_masks(Gradual(0.8, until=0.5)),
    "60 % zeros": under_masks(Gradual(0.6, until=0.5)),
    "90 % zeros": under_masks(Gradual(0.9, until=0.5)),
    "80 % zeros, 3 cycles": under_masks(Cyclical(0.8, cycles=3)),
}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--task", choices=list(TASKS), default="resnet20_cifar10")
    parser.add_argument("--budgets", type=int, nargs="+")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--length", type=float, help="epochs of ResNet-20, steps of MiniLM")
    parser.add_argument("--split", choices=["dev", "test"], default="dev")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("out", "pruning"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = TASKS[options.task]
    length = type(task.length)(options.length or task.length)
    output = options.json or RESULTS / task.results
    rows: list[dict[str, Any]] = kept(output) or []
    for budget in options.budgets or task.budgets:
        for method in options.methods:
            for seed in options.seeds:
                key = {"method": method, "budget": budget, "seed": seed, task.unit: length}
                if any(key.items() <= row.items() for row in rows):
                    continue
                folder = options.folder / f"{method}-{length}".replace(" ", "_")
                folder.mkdir(parents=True, exist_ok=True)
                path, row = task.train(budget, seed, length, folder, METHODS[method])
                row = (
                    key | row | {options.split: round(score(options.task, path, options.split), 2)}
                )
                print(json.dumps(row), flush=True)
                rows.append(row)
                keep(output, rows)


if __name__ == "__main__":
    main()
