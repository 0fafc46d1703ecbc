"""What a base saves: files of fine-tunes and of checkpoints of one training, with it and without.

``python -m benchmarks.deltas`` fine-tunes MiniLM on SST-2 and ResNet-20 on CIFAR-10 upside down,
and trains a small language model on Penn Treebank, of which two checkpoints are taken. Each is
compressed to several sizes, whole and as differences: fine-tunes to the published weights, of which
MiniLM's have no head for the task; the later checkpoint to the earlier one; and to what a file
holds of these. Scores are of what the file holds, loaded into a model whose numbers were all made
NaN before. No data is used.

Every result is saved at once, and found again when the program is started anew.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dither
from benchmarks.environment import describe
from benchmarks.tasks import lm_ptb, minilm_sst2, resnet20_cifar10

RESULTS = Path(__file__).parent / "results" / "deltas.json"
WHOLE, ON_BASE, ON_FILE = "whole", "base", "base, itself a file"
FILE_SHARE = 11
"""The base as a file takes so many times less than in fp32."""


@dataclass(frozen=True)
class Task:
    """A training, and the sizes that are asked for.

    Attributes:
        build: the model.
        base: its tensors before, of those that the model has then.
        steps: before the base, and behind it.
        rate: of Adam, which falls along a cosine.
        sizes: bytes, by what the file rests on.
    """

    build: Callable[[], nn.Module]
    base: Callable[[nn.Module], dict[str, Tensor]]
    batches: Callable[[int], Iterator[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    score: Callable[[nn.Module], float]
    metric: str
    steps: tuple[int, int]
    rate: float
    sizes: Mapping[str, tuple[int, ...]]


IMAGES = 1000
"""Test images, upside down, of which ResNet-20's score is."""


def upside_down(model: nn.Module) -> float:
    """Images that are classified rightly, in per cent."""
    images, labels = resnet20_cifar10.some("test", 0, IMAGES)
    with torch.inference_mode():
        found = torch.cat([model(part.flip(2)).argmax(1) for part in images.split(250)])
    return 100 * float((found == labels).double().mean())


def _turned(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    batches = resnet20_cifar10.Batches(64, seed)
    for number in range(1 << 30):
        images, labels = batches[number]
        yield images.flip(2), labels


TASKS = {
    "MiniLM, fine-tuned on SST-2": Task(
        minilm_sst2.Classifier,
        lambda model: {n: v for n, v in model.state_dict().items() if n.startswith("bert.")},
        lambda seed: minilm_sst2.batches(minilm_sst2.ROWS, seed),
        minilm_sst2.loss_of,
        lambda model: minilm_sst2.evaluate(model, "dev"),
        "accuracy, %",
        (0, 100),
        1e-4,
        {
            ON_BASE: (50_000, 100_000, 200_000, 500_000),
            WHOLE: (1_000_000, 2_000_000, 4_000_000),
        },
    ),
    "ResNet-20, fine-tuned on CIFAR-10 upside down": Task(
        resnet20_cifar10.load,
        lambda model: dict(model.state_dict()),
        _turned,
        lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        upside_down,
        "accuracy, %",
        (0, 60),
        3e-4,
        {
            ON_BASE: (8_000, 15_000, 30_000, 60_000),
            ON_FILE: (15_000, 30_000),
            WHOLE: (30_000, 60_000, 100_000),
        },
    ),
    "language model on PTB, later checkpoint": Task(
        lm_ptb.LanguageModel,
        lambda model: dict(model.state_dict()),
        lambda seed: lm_ptb.windows(lm_ptb.ROWS, seed),
        lm_ptb.loss_of,
        lambda model: lm_ptb.evaluate(model, "dev"),
        "perplexity",
        (450, 75),
        3e-3,
        {
            ON_BASE: (50_000, 100_000, 200_000, 400_000),
            ON_FILE: (100_000, 200_000, 400_000),
            WHOLE: (200_000, 400_000, 700_000),
        },
    ),
}


def train(task: Task, folder: Path) -> tuple[dict[str, Tensor], nn.Module]:
    """The base and the model that was trained from there: made, or found."""
    torch.manual_seed(0)
    model, saved = task.build(), folder / "trained.pt"
    if saved.is_file():
        base, after = torch.load(saved, weights_only=True)
        model.load_state_dict(after)
        return base, model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.Adam(model.parameters(), task.rate)
    (before, behind), data, begin = task.steps, task.batches(0), 0
    total, partly = before + behind, folder / "partly.pt"
    base = {} if before else _copied(task.base(model))
    if partly.is_file():
        begin, base, state, steps = torch.load(partly, weights_only=True)
        model.load_state_dict(state)
        optimizer.load_state_dict(steps)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # too few steps for other statistics
    for step in range(total):
        batch = next(data)
        if step < begin:
            continue
        share = min((step + 1) / 20, (1 + math.cos(math.pi * step / total)) / 2)
        optimizer.param_groups[0]["lr"] = task.rate * share
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step + 1 == before:
            base = _copied(task.base(model))
        if (step + 1) % 25 == 0:
            kept = (step + 1, base, model.state_dict(), optimizer.state_dict())
            torch.save(kept, partly)
            print(f"step {step + 1} of {total}: {float(loss.detach()):.3f}", flush=True)
    torch.save((base, _copied(model.state_dict())), saved)
    return base, model.eval()


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def measure(task: Task, kind: str, size: int, folder: Path) -> dict[str, Any]:
    """One file and its score."""
    base, model = train(task, folder)
    if kind == ON_FILE:
        base = dither.compress(base, f"{FILE_SHARE}x").state_dict()
    start = time.process_time()
    path = folder / f"{kind.partition(',')[0]}-{size}.dither"
    given = None if kind == WHOLE else base
    made = dither.compress(model, size, base=given)
    made.save(path)
    seconds = time.process_time() - start
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.fill_(math.nan)
    dither.load_into(model, path, base=given)
    return {
        "nbytes": path.stat().st_size,
        "score": task.score(model.eval()),
        "cpu_s": round(seconds, 1),
        "equal": sum(entry.on_base and not entry.parts for entry in made.entries.values()),
        "differences": sum(entry.on_base and bool(entry.parts) for entry in made.entries.values()),
        "tensors": len(made.entries),
    }


def ends(task: Task, folder: Path) -> dict[str, Any]:
    """Scores of the base (with a head of zeros where it has none) and of the trained model."""
    base, model = train(task, folder)
    found = {"trained": task.score(model)}
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state | base)
    return {**found, "base": task.score(model)}


def table(found: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = ["| task | stored | bytes | score |", "| --- | --- | --- | --- |"]
    for name, task in TASKS.items():
        rows = found.get(name, {})
        for end in ("base", "trained"):
            if "ends" in rows:
                score = rows["ends"][end]
                lines.append(f"| {name}, {task.metric} | {end}, fp32 | | {score:.2f} |")
        for kind, sizes in task.sizes.items():
            for size in sizes:
                row = rows.get(f"{kind} {size}")
                if row:
                    lines.append(f"| | {kind} | {row['nbytes']:,} | {row['score']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("deltas-work"))
    parser.add_argument("--table", action="store_true", help="only print it")
    parser.add_argument("--task", type=int, help="number of one task")
    given = parser.parse_args()
    found = json.loads(given.results.read_text()) if given.results.is_file() else {}
    names = list(TASKS) if given.task is None else [list(TASKS)[given.task]]
    for number, name in enumerate(() if given.table else names):
        task, rows = TASKS[name], found.setdefault(name, {})
        folder = given.work / str(list(TASKS).index(name))
        todo = [("ends", "", 0)]
        todo += [(f"{kind} {s}", kind, s) for kind, sizes in task.sizes.items() for s in sizes]
        for key, kind, size in todo:
            if key not in rows:
                rows[key] = measure(task, kind, size, folder) if kind else ends(task, folder)
                found["environment"] = describe() | {"command": "python -m benchmarks.deltas"}
                given.results.write_text(json.dumps(found, indent=1) + "\n")
                print(number, key, rows[key], flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
