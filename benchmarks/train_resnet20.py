"""ResNet-20 on CIFAR-10 trained to a budget: three epochs from the checkpoint, one file.

``python -m benchmarks.train_resnet20 --seeds 0 1 2 --split test``

The loss is the distance to the fp32 network's own outputs: no label is read. Every run saves its
state as it goes and takes up where it was stopped; finished runs are kept in the results file.
"""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import dither
from benchmarks.tasks import resnet20_cifar10
from benchmarks.training import Planned, by_default, keep, main, report, take_up, write_file

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


def train(
    budget: int, seed: int, epochs: float, folder: Path, planned: Planned = by_default
) -> tuple[Path, dict[str, Any]]:
    """Train to a budget and save the file; resumes from the folder.

    Args:
        budget: bytes.
        seed: of batches and noise.
        epochs: how long.
        folder: for the state and the file.
        planned: the plan for the model, or None for what a budget does by default.
    """
    batches = resnet20_cifar10.Batches(BATCH, seed)
    steps = round(epochs * batches.per_epoch)
    torch.manual_seed(seed)
    teacher = resnet20_cifar10.load()
    teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = copy.deepcopy(teacher)
    run = dither.attach(model, planned(model), budget=budget, steps=steps, noise=seed)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    run.join(optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    saved = folder / f"resnet20-{budget}-{seed}.pt"
    seconds = take_up(saved, model, optimizer, run)
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
            seconds = time.monotonic() - begun
            report(run, float(loss.detach()), seconds)
            keep(saved, model, optimizer, run, seconds)
    before = run.measure()
    run.finish(batches[step][0] for step in range(50))
    path = saved.with_suffix(".dither")
    row = write_file(run, path, before)
    return path, row | {"seconds": round(time.monotonic() - begun)}


if __name__ == "__main__":
    main(__doc__, "resnet20_cifar10", train, [66_000, 45_000, 34_000], 3.0)
