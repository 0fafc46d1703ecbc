"""Pruning at equal bytes and at equal sparsity on a small network, with several seeds.

``python -m benchmarks.pruning_digits`` trains the network of ``dither demo`` (124,266 parameters,
scikit-learn's digits, 797 test images) by the distance to its own outputs: methods of
``benchmarks.pruning`` to two budgets, and those of ``benchmarks.pruning_schedules`` to a few shares
of zeros, each with every seed (of batches and noise). A minute of a core for some ten runs;
finished ones stay in the results.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import dither
from benchmarks import pruning, pruning_schedules
from benchmarks.environment import describe
from benchmarks.train_resnet20 import distillation
from dither.demo import network as digits
from dither.recipes import pqk
from dither.train import Cyclical, OwnTeacher, Run

RESULTS = Path(__file__).parent / "results"
BATCH, RATE, STEPS, EPOCHS = 50, 3e-3, 300, 12
BUDGETS = (9000, 6000)
SHARES = (0.9, 0.95, 0.98)
TO_BYTES = (
    "learned steps",
    "dead zone",
    "as many zeros as the budget says",
    "80 % zeros",
    "80 % zeros, 3 cycles",
)
Batch = tuple[Tensor, Tensor]


class Batches:
    """Training images, shifted by up to a pixel, and labels, by number of the step."""

    def __init__(self, seed: int) -> None:
        self._images, self._labels = digits.training_set()
        self._seed = seed

    def __getitem__(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(1_000_003 * self._seed + step)
        chosen = torch.randint(len(self._images), (BATCH,), generator=generator)
        down, right = torch.randint(0, 3, (2,), generator=generator).tolist()
        padded = functional.pad(self._images[chosen], (1, 1, 1, 1))
        return padded[:, :, down : down + 8, right : right + 8], self._labels[chosen]


def loss_of(model: nn.Module, source: nn.Module, batch: Batch, own: OwnTeacher | None) -> Tensor:
    """The distance to the source; with the pruned weights as a teacher, PQK's."""
    inputs, labels = batch
    outputs = model(inputs)
    if own is not None:
        with own.teaching():
            taught = model(inputs)
        return pqk.loss(outputs, taught, labels)
    with torch.no_grad():
        goal = source(inputs)
    return distillation(outputs, goal)


def train(run: Run, source: nn.Module, method: str, seed: int, cycles: int) -> dict[str, Any]:
    """Train and finish; bytes, zeros and accuracy."""
    model, batches = run.model, Batches(seed)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    run.join(optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    own = OwnTeacher(run) if method == "PQK" else None
    labelled = method in pruning_schedules.LABELLED
    model.train()
    for step in range(STEPS):
        factor = Cyclical(0.5, cycles=cycles).rate(step / STEPS)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        if labelled and (own is None or run.progress < pruning_schedules.PHASE):
            loss = functional.cross_entropy(model(batches[step][0]), batches[step][1])
        else:
            loss = loss_of(model, source, batches[step], own)
        (loss + run.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()
    nbytes = run.finish(batches[step][0] for step in range(20))
    images, labels = digits.test_set()
    kept = [run.archive[name] for name, *_ in run.weights()]
    zeros = sum(int((value == 0).sum()) for value in kept) / sum(value.numel() for value in kept)
    found = 100 * digits.accuracy(digits.predict(model, images), labels)
    return {"bytes": nbytes, "zeros": round(100 * zeros, 2), "test": round(found, 2)}


def measured(key: dict[str, Any], source: nn.Module) -> dict[str, Any]:
    """One run by its method, seed, and budget or share."""
    method, seed = key["method"], key["seed"]
    torch.manual_seed(seed)
    model = copy.deepcopy(source)
    if "budget" in key:
        plan = pruning.METHODS[method](model)
        run = dither.attach(model, plan, budget=key["budget"], steps=STEPS, noise=seed)
        return train(run, source, method, seed, 1)
    run = pruning_schedules.attached(model, method, key["share"], STEPS)
    schedule = pruning_schedules.schedule_of(method, key["share"])
    cycles = schedule.cycles if isinstance(schedule, Cyclical) else 1
    return train(run, source, method, seed, cycles)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=float, default=math.inf, help="at most so many now")
    parser.add_argument("--json", type=Path, default=RESULTS / "pruning_digits.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keys: list[dict[str, Any]] = [
        {"method": method, name: value, "seed": seed}
        for seed in options.seeds
        for name, values, methods in (
            ("budget", BUDGETS, TO_BYTES),
            ("share", SHARES, pruning_schedules.METHODS),
        )
        for value in values
        for method in methods
    ]
    path = options.json
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    missing = [key for key in keys if not any(key.items() <= row.items() for row in rows)]
    source = digits.train(EPOCHS) if missing else nn.Identity()
    for number, key in enumerate(missing):
        if number >= options.runs:
            break
        rows.append(key | measured(key, source))
        print(json.dumps(rows[-1]), flush=True)
        result = {"environment": describe(), "steps": STEPS, "rows": rows}
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
