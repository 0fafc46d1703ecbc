"""DiffQ here against the DiffQ package: the same task, epochs and seed, at equal bytes of file.

First ``python -m benchmarks.peers.diffq_peer`` in the package's own environment (peers/README.md),
then ``python -m benchmarks.diffq --peer out/diffq/peer.json``. For each of the package's runs,
ResNet-20 is trained from the same checkpoint with the same batches, loss, optimizer, learning rates
and groups, to a file of at most the fewest bytes that the package's run can be given: the least of
its own count, its compressed count and its compressed file, without the running statistics of batch
norm, which it leaves out and our file holds. Runs save their state and are taken up where they
were stopped; finished ones are kept.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import dither
from benchmarks.environment import describe
from benchmarks.peers.diffq_peer import BATCH, rate_at
from benchmarks.tasks import resnet20_cifar10
from benchmarks.training import keep, report, take_up
from dither.train import DiffQ, Plan
from dither.train.default_plan import default_plan

_SAVE_EVERY = 100
_SETTINGS = ("penalty", "seed", "epochs", "group", "rate", "bits_rate")


def train(peer: dict[str, Any], noise: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """One run to the bytes of one of the package's; returns the file and the row."""
    seed, budget = peer["seed"], peer["bytes"]["least"]
    batches = resnet20_cifar10.Batches(BATCH, seed)
    steps = round(peer["epochs"] * batches.per_epoch)
    model = resnet20_cifar10.load()
    learned = DiffQ(group=peer["group"], noise=noise, lr=peer["bits_rate"])
    weights = {n: learned for n, p in model.named_parameters() if p.ndim > 1}
    plan = Plan({**weights, **default_plan(model).rules})  # vectors keep their data-free steps
    run = dither.attach(model, plan, budget=budget, steps=steps, noise=seed)
    optimizer = torch.optim.Adam(model.parameters(), peer["rate"])
    run.join(optimizer)
    saved = folder / f"{noise}-{budget}-{seed}.pt"
    seconds = take_up(saved, model, optimizer, run)
    begun = time.monotonic() - seconds
    model.train()
    for step in range(run.done, steps):
        optimizer.param_groups[0]["lr"] = peer["rate"] * rate_at(step, steps)
        images, labels = batches[step]
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            guess = model(images)
        loss = functional.cross_entropy(guess.float(), labels)
        (loss + run.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()
        if run.done % _SAVE_EVERY == 0:
            seconds = time.monotonic() - begun
            report(run, float(loss.detach()), seconds)
            keep(saved, model, optimizer, run, seconds)
    seconds = time.monotonic() - begun
    untrimmed = run.measure()
    run.finish(batches[step][0] for step in range(50))
    path = saved.with_suffix(".dither")
    return path, {
        "budget": budget,
        "bytes": run.save(path),
        "untrimmed": untrimmed,
        "trim": next(iter(run.surrogates.values())).trim,
        "seconds": round(seconds),
    }


def score(path: Path) -> dict[str, float]:
    """Accuracy in percent of a file, read back."""
    model = resnet20_cifar10.load()
    dither.load_into(model, path)
    model.eval()
    return {split: resnet20_cifar10.evaluate(model, split) for split in ("dev", "test")}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, required=True, help="peer.json of the package's runs")
    parser.add_argument("--noise", nargs="+", default=["uniform"], choices=["uniform", "gaussian"])
    parser.add_argument("--folder", type=Path, default=Path("out/diffq"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/diffq.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    for noise in options.noise:
        for peer in json.loads(options.peer.read_text()):
            result = json.loads(options.output.read_text()) if options.output.exists() else {}
            rows = result.get("rows", [])
            mine = {key: peer[key] for key in _SETTINGS} | {"noise": noise}
            if any(all(row[k] == v for k, v in mine.items()) for row in rows):
                continue
            path, row = train(peer, noise, options.folder)
            row = mine | row | score(path) | {"peer": peer}
            row["gain_test"] = round(row["test"] - peer["test"], 2)
            print(row, flush=True)
            result = {"environment": describe(), "rows": [*rows, row]}
            options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
