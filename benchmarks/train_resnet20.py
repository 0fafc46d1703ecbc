"""ResNet-20 on CIFAR-10 trained to a budget: three epochs from the checkpoint, one file.

``python -m benchmarks.train_resnet20 --budgets 66000 45000 34000 --seeds 0 1 2 --split test``

The loss is the distance to the fp32 network's own outputs: no label is read. Every run saves its
state as it goes and takes up where it was stopped; finished runs are kept in the results file.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import dither
from benchmarks.environment import describe
from benchmarks.tasks import resnet20_cifar10

BATCH = 128
RATE = 3e-3
WARM_STEPS = 20
TEMPERATURE = 4.0
_SAVE_EVERY = 100


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of softened outputs, times the temperature squared (Hinton et al. 2015)."""
    soft, goal = (functional.log_softmax(z / TEMPERATURE, 1) for z in (student, teacher))
    divergence = functional.kl_div(soft, goal, log_target=True, reduction="batchmean")
    return divergence * TEMPERATURE**2


def train(budget: int, seed: int, epochs: float, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Train to a budget and save the file; resumes from the folder."""
    batches = resnet20_cifar10.Batches(BATCH, seed)
    steps = round(epochs * batches.per_epoch)
    torch.manual_seed(seed)
    teacher = resnet20_cifar10.load()
    teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = copy.deepcopy(teacher)
    run = dither.attach(model, budget=budget, steps=steps, noise=seed)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    run.join(optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    saved = folder / f"resnet20-{budget}-{seed}.pt"
    seconds = 0.0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        run.load_state_dict(state["run"])
        seconds = state["seconds"]
    begun = time.monotonic() - seconds
    model.train()
    for step in range(run.done, steps):
        share = min(1.0, (step + 1) / WARM_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        images = batches[step][0].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                goal = teacher(images).float()
            loss = distillation(model(images).float(), goal)
        (loss + run.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()
        if run.done % _SAVE_EVERY == 0 or run.done == steps:
            _report(run, float(loss.detach()), time.monotonic() - begun)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"run": run.state_dict(), "seconds": time.monotonic() - begun}
            torch.save(state, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)
    before = run.measure()
    run.finish(batches[step][0] for step in range(50))
    path = folder / f"resnet20-{budget}-{seed}.dither"
    nbytes = run.save(path)
    trim = next(iter(run.surrogates.values())).trim
    row = {"budget": budget, "seed": seed, "epochs": epochs, "bytes": nbytes, "untrimmed": before}
    return path, row | {"trim_octaves": trim, "seconds": round(time.monotonic() - begun)}


def _report(run: dither.Run, loss: float, seconds: float) -> None:
    weight = run.controller.weight if run.controller else 0.0
    print(
        f"step {run.done}/{run.steps}  loss {loss:.4f}  predicted {run.predicted_nbytes():.0f} B  "
        f"lambda {weight:.4f}  {seconds:.0f} s",
        flush=True,
    )


def score(path: Path, split: str) -> float:
    """Top-1 accuracy of a file in percent, loaded in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.data_free", "--score", str(path)]
    command += ["--tasks", "resnet20_cifar10", "--split", split]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", type=int, nargs="+", default=[66_000, 45_000, 34_000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--split", choices=["dev", "test"], default="dev")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=Path("out/train_resnet20"))
    parser.add_argument("--output", type=Path, help="results file (JSON)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    output = options.output or Path(f"benchmarks/results/train_resnet20_{options.split}.json")
    result = json.loads(output.read_text()) if output.exists() else {"rows": []}
    known = {(row["budget"], row["seed"], row["epochs"]) for row in result["rows"]}
    for budget in options.budgets:
        for seed in options.seeds:
            if (budget, seed, options.epochs) in known:
                continue
            path, row = train(budget, seed, options.epochs, options.folder)
            row |= {"split": options.split, "accuracy": score(path, options.split)}
            print(row, flush=True)
            result = {"environment": describe(), "rows": [*result["rows"], row]}
            output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
