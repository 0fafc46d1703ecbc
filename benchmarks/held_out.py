"""What few samples bring to a model on samples that it has not seen: ``compress`` with 1 to 256.

``python -m benchmarks.held_out --json benchmarks/results/held_out.json`` trains two small networks
on synthetic tasks (a spotter of chirps: convolutions and batch norms over frames of bands; a
mixture of experts on sequences of symbols), compresses each with few samples, and measures the
divergence of outputs and the accuracy on 2,000 other samples, beside the file without data. Rows
have what the kept trial reported, so that one sees by how much it is too good.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import dither
from benchmarks.environment import describe
from dither.data import divergence
from dither.search import Trial

COUNTS = (1, 4, 16, 64, 256)
_HELD_OUT, _BATCH = 2000, 64
_CLASSES, _BANDS, _FRAMES = 12, 20, 49
_SYMBOLS, _LENGTH, _WIDTH, _EXPERTS = 64, 16, 48, 4


class Spotter(nn.Module):
    """Convolutions with batch norms over ``(samples, bands, frames)``, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        widths = (_BANDS, 48, 64, 64, 64)
        self.body = nn.Sequential(
            *(
                layer
                for i, (a, b) in enumerate(pairwise(widths))
                for layer in (
                    nn.Conv1d(a, b, 5, stride=1 + i % 2, padding=2, bias=False),
                    nn.BatchNorm1d(b),
                    nn.ReLU(),
                )
            )
        )
        self.out = nn.Linear(widths[-1], _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(samples, classes)``."""
        logits: Tensor = self.out(self.body(x).mean(2))
        return logits


def chirps(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ridges that rise or fall through the bands, each class at its own slope, in noise."""
    labels = torch.randint(_CLASSES, (count,), generator=generator)
    slopes = (labels.float() - (_CLASSES - 1) / 2) / _CLASSES * 1.2
    start = _BANDS * torch.rand(count, 1, 1, generator=generator)
    frames, bands = torch.arange(_FRAMES).float(), torch.arange(_BANDS).float()
    ridge = (start + slopes[:, None, None] * frames) % _BANDS
    ripple = torch.exp(-((bands[:, None] - ridge) ** 2) / 2)
    loud = 1 + torch.rand(count, 1, 1, generator=generator)
    return loud * ripple + 1.2 * torch.randn(ripple.shape, generator=generator), labels


class Experts(nn.Module):
    """A mixture of experts over embedded symbols; each goes to the one that its router picks."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols = nn.Embedding(_SYMBOLS, _WIDTH)
        self.mix = nn.GRU(_WIDTH, _WIDTH, batch_first=True)
        self.router = nn.Linear(_WIDTH, _EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(_WIDTH, 96), nn.ReLU(), nn.Linear(96, _WIDTH))
            for _ in range(_EXPERTS)
        )
        self.out = nn.Linear(_WIDTH, _SYMBOLS)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next symbol, ``(samples, symbols)``."""
        hidden = self.mix(self.symbols(ids))[0][:, -1]
        gates = self.router(hidden).softmax(-1)
        best, chosen = gates.max(-1)
        found = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            rows = chosen == number
            if bool(rows.any()):
                found[rows] = best[rows, None] * expert(hidden[rows])
        logits: Tensor = self.out(hidden + found)
        return logits


def sequences(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Symbols of which each follows from the two before by one of four rules, told by the first."""
    ids = torch.randint(_SYMBOLS, (count, _LENGTH + 1), generator=generator)
    rule = ids[:, 0] % 4
    for i in range(2, _LENGTH + 1):
        following = ((rule + 1) * ids[:, i - 1] + rule * ids[:, i - 2] + rule) % _SYMBOLS
        kept = torch.rand(count, generator=generator) < 0.9
        ids[:, i] = torch.where(kept, following, ids[:, i])
    return ids[:, :-1], ids[:, -1]


@dataclass(frozen=True)
class Task:
    """A network, its samples, how long it is trained, and the size to compress it to."""

    build: Callable[[], nn.Module]
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    steps: int
    size: str


TASKS = {
    "spotter": Task(Spotter, chirps, 400, "24x"),
    "experts": Task(Experts, sequences, 1500, "12x"),
}


def train(task: Task) -> nn.Module:
    """The network after some steps of Adam on fresh samples, in evaluation mode."""
    torch.manual_seed(0)
    model, generator = task.build(), torch.Generator().manual_seed(1)
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(task.steps):
        adam.param_groups[0]["lr"] = 1.5e-3 * (1 + math.cos(math.pi * step / task.steps))
        inputs, labels = task.draw(_BATCH, generator)
        adam.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        adam.step()
    return model.eval()


def judge(
    task: Task, model: nn.Module, archive: dither.Archive, held: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Divergence from the model, and accuracy in per cent, on samples that nothing saw."""
    changed = task.build().eval()
    dither.load_into(changed, archive)
    with torch.no_grad():
        logits = changed(held[0])
        distance = float(divergence(logits, model(held[0])))
    accuracy = 100 * float((logits.argmax(-1) == held[1]).float().mean())
    return {"held_out": round(distance, 5), "accuracy": round(accuracy, 2)}


def rows(name: str, seeds: int) -> list[dict[str, Any]]:
    """A row without data, and one for each number of samples and seed."""
    task = TASKS[name]
    model = train(task)
    held = task.draw(_HELD_OUT, torch.Generator().manual_seed(2))
    with torch.no_grad():
        own = 100 * float((model(held[0]).argmax(-1) == held[1]).float().mean())
    plain = judge(task, model, dither.compress(model, task.size), held)
    found: list[dict[str, Any]] = [{"task": name, "samples": 0, "fp32": round(own, 2), **plain}]
    for count in COUNTS:
        for seed in range(seeds):
            samples, _ = task.draw(count, torch.Generator().manual_seed(100 + seed))
            data = dither.Data(list(samples.split(32)), distance=divergence)
            archive = dither.compress(model, task.size, data=data)
            kept = [t for t in archive.trials if isinstance(t, Trial) and t.kept][-1]
            row = {"task": name, "samples": count, "seed": seed, "kept": kept.stage}
            found.append(
                row | {"reported": round(kept.distance, 5)} | judge(task, model, archive, held)
            )
            print(found[-1], flush=True)
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = [row for name in arguments.tasks for row in rows(name, arguments.seeds)]
    print(*found, sep="\n")
    if arguments.json:
        result = {"rows": found, "environment": describe()}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
