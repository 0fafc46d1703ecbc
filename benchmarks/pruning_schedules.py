"""Schedules of pruning, and PQK's second phase, on ResNet-20 at equal steps.

``python -m benchmarks.pruning_schedules --split test`` trains from the checkpoint by the distance
to its own outputs, with 4-bit learned steps under masks that rank all layers together: one-shot,
gradual, cyclical. Learning rates fall by half a cosine, once or in each cycle. PQK and what it is
compared with read labels: masks fixed at the same step and equal bits, with and without pruned
weights that may return, and with and without them as a teacher. Finished runs stay in the results.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import dither
from benchmarks.kept import keep, kept
from benchmarks.tasks import resnet20_cifar10
from benchmarks.train_resnet20 import BATCH, WARM_STEPS, distillation
from benchmarks.training import score
from dither import LSQ, Plan, Pruned
from dither.recipes import pqk
from dither.train import Cyclical, FixMasks, Gradual, OneShot, OwnTeacher, Run, Together
from dither.train.sparsity import Sparsity

RESULTS = Path(__file__).parent / "results"
RATE = 1e-3
BITS = 4
PHASE = 0.5


def schedule_of(method: str, share: float) -> Sparsity:
    """By the name of the method; PQK's phases both prune gradually."""
    known: dict[str, Sparsity] = {
        "one-shot": OneShot(share),
        "gradual": Gradual(share),
        "cyclical, 3 cycles": Cyclical(share, cycles=3),
    }
    return known.get(method, Gradual(share, until=0.75 * PHASE))


SCHEDULES = ("one-shot", "gradual", "cyclical, 3 cycles")
LABELLED = ("prune, then 4 bits", "PQK, phase 1 alone", "PQK")
METHODS = SCHEDULES + LABELLED


def attached(model: nn.Module, method: str, share: float, steps: int) -> Run:
    """The model under masks that rank all layers together."""
    if method.startswith("PQK"):
        return pqk.recipe(model, BITS, share, steps=steps, phase=PHASE).attach(model)
    schedule = schedule_of(method, share)
    names = [name for name, value in model.named_parameters() if value.ndim > 1]
    plan = Plan(dict.fromkeys(names, Pruned(LSQ(BITS), schedule)))
    fixed = [FixMasks(PHASE)] if method in LABELLED else []
    return dither.attach(model, plan, steps=steps, schedules=[Together(schedule), *fixed])


def train(method: str, share: float, seed: int, steps: int, path: Path) -> dict[str, Any]:
    """Train and save a file; returns what is to be known of it."""
    torch.manual_seed(seed)
    source = resnet20_cifar10.load()
    source.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = copy.deepcopy(source)
    run = attached(model, method, share, steps)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    run.join(optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    own = OwnTeacher(run) if method == "PQK" else None
    schedule = schedule_of(method, share)
    cycles = schedule if isinstance(schedule, Cyclical) else Cyclical(share, cycles=1)
    batches, begun = resnet20_cifar10.Batches(BATCH, seed), time.monotonic()
    model.train()
    for step in range(steps):
        factor = min(1.0, (step + 1) / WARM_STEPS) * cycles.rate(step / steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        images, labels = batches[step]
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(images).float()
            if method not in LABELLED:
                with torch.no_grad():
                    goal = source(images).float()
                loss = distillation(outputs, goal)
            elif own is None or run.progress < PHASE:
                loss = functional.cross_entropy(outputs, labels)
            else:
                with own.teaching():
                    taught = model(images).float()
                loss = pqk.loss(outputs, taught, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()
        if run.done % 50 == 0:
            print(f"{method} {share} step {run.done}/{steps} loss {float(loss):.4f}", flush=True)
    run.finish(batches[step][0] for step in range(20))
    nbytes = run.save(path)
    kept = [run.archive[name] for name, *_ in run.weights()]
    zeros = sum(int((value == 0).sum()) for value in kept) / sum(value.numel() for value in kept)
    seconds = round(time.monotonic() - begun)
    return {"bytes": nbytes, "zeros": round(100 * zeros, 2), "seconds": seconds}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=2106, help="351 are an epoch")
    parser.add_argument("--split", choices=["dev", "test"], default="dev")
    parser.add_argument("--folder", type=Path, default=Path("out", "pruning_schedules"))
    parser.add_argument("--json", type=Path, default=RESULTS / "pruning_schedules.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = kept(options.json) or []
    for share in options.shares:
        for method in options.methods:
            for seed in options.seeds:
                key = {"method": method, "share": share, "seed": seed, "steps": options.steps}
                if any(key.items() <= row.items() for row in rows):
                    continue
                path = options.folder / "model.dither"
                row = key | train(method, share, seed, options.steps, path)
                row[options.split] = round(score("resnet20_cifar10", path, options.split), 2)
                print(json.dumps(row), flush=True)
                rows.append(row)
                keep(options.json, rows)


if __name__ == "__main__":
    main()
