"""Joint search: the best score by evaluation, for each policy, at one file size.

``python -m benchmarks.joint_search`` searches sparsity and bits of kernels of one network with
every policy and as many evaluations of each. They choose by some images that it was not trained
on, and what they have found is scored on others. Nothing is trained in between. Interrupted runs go
on; finished ones stay in the results, and ``--plot`` draws these.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dither
from benchmarks.environment import describe
from benchmarks.tasks import resnet20_cifar10
from dither.demo import network as digits
from dither.search import AJPQ, Aim, Evolution, Policy, Space, joint
from dither.search.joint import prepared

RESULTS = Path(__file__).parent / "results"
SPACE = Space(lowest=1.0, highest=5.0, groups=4, sparsity=0.25)
POLICIES: dict[str, str | Policy] = {
    "ajpq": AJPQ(),
    "random": "random",
    "evolution": "evolution",
    "tpe": "tpe",
    "evolution from the allocator": Evolution(from_allocator=True),
    "cma-es": "cma-es",
}
BATCH = 100


@dataclass(frozen=True)
class Task:
    """A trained network, and images that it was not trained on.

    Attributes:
        load: gives it.
        some: images and labels of a range.
        count: images in all; more would cost more than they tell.
        choosing: so many of the first are chosen by, the others are reported on.
        budget: bytes.
    """

    load: Callable[[Path], nn.Module]
    some: Callable[[int, int], tuple[Tensor, Tensor]]
    count: int
    choosing: int
    budget: int


def resnet20(_: Path) -> nn.Module:
    """The published weights."""
    return resnet20_cifar10.load()


def digit_net(folder: Path) -> nn.Module:
    """Trained once, and kept."""
    path = folder / "digits.safetensors"
    if not path.exists():
        save_file(digits.train(12).state_dict(), path)
    model = digits.DigitNet()
    model.load_state_dict(load_file(path))
    return model.eval()


def some_cifar(first: int, last: int) -> tuple[Tensor, Tensor]:
    """Test images of CIFAR-10."""
    return resnet20_cifar10.some("test", first, last)


def some_digits(first: int, last: int) -> tuple[Tensor, Tensor]:
    """Digits of the test set."""
    images, labels = digits.test_set()
    return images[first:last], labels[first:last]


TASKS = {
    "resnet20": Task(resnet20, some_cifar, 2_500, 500, 45_000),
    "digits": Task(digit_net, some_digits, 797, 400, 18_000),
}


def right(task: Task, model: nn.Module, first: int, last: int) -> float:
    """Images of a range that are classified rightly, in per cent."""
    found = 0
    for start in range(first, last, BATCH):
        images, labels = task.some(start, min(start + BATCH, last))
        found += int((model(images).argmax(1) == labels).sum())
    return 100 * found / (last - first)


@dataclass(frozen=True)
class Choosing:
    """Scores by the first images of a task."""

    task: str

    def __call__(self, model: nn.Module) -> float:
        return right(TASKS[self.task], model, 0, TASKS[self.task].choosing)


@torch.no_grad()
def reported(task: Task, folder: Path, archive: dither.Archive) -> float:
    """Per cent of the images that no policy has seen."""
    model = task.load(folder)
    dither.load_into(model, archive)
    return round(right(task, model.eval(), task.choosing, task.count), 2)


def aim_of(name: str) -> Aim:
    """What is searched for."""
    return Aim(Choosing(name), space=SPACE, data=[TASKS[name].some(0, 1)[0]])


def fixed(name: str, folder: Path) -> list[dict[str, Any]]:
    """The allocator's file, and that of equal bits for all kernels."""
    task, rows = TASKS[name], []
    judge, _ = prepared(task.load(folder), task.budget, aim_of(name))
    points = {"allocator": None, "uniform bits": judge.files.layout.uniform}
    for policy, point in points.items():
        archive, _ = judge.archive(point)
        best, test = round(judge(point).reward, 2), reported(task, folder, archive)
        row = {"policy": policy, "nbytes": archive.nbytes, "best": best, "test": test}
        rows.append({"task": name, **row})
    return rows


def searched(name: str, policy: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One search; the allocator's file, which comes first, does not count."""
    task, start = TASKS[name], time.monotonic()
    journal = options.folder / f"{name}-{policy}-{seed}.journal".replace(" ", "_")
    found = joint(
        task.load(options.folder),
        task.budget,
        aim_of(name),
        policy=POLICIES[policy],
        evaluations=1 + options.evaluations,
        seed=seed,
        processes=options.processes,
        journal=journal,
    )
    own = found.history[1:]
    best = max(own, key=lambda row: -1.0 if row.error else row.reward)
    judge, _ = prepared(task.load(options.folder), task.budget, aim_of(name))
    archive, widths = judge.archive(best.point)
    return {
        "task": name,
        "policy": policy,
        "settings": repr(found.policy),
        "seed": seed,
        "evaluations": options.evaluations,
        "best": round(best.reward, 2),
        "test": reported(task, options.folder, archive),
        "nbytes": archive.nbytes,
        "pruned": sum(width == 0 for kernels in widths.values() for width in kernels),
        "seconds": round(time.monotonic() - start),
        "rewards": [None if row.error else round(row.reward, 2) for row in own],
        "curve": [round(value, 2) for value in found.curve(allocated=False)],
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The best score by evaluation: the mean over seeds, each seed thin."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "dither"}):
        figure, axes = plt.subplots(figsize=(6.4, 3.8))
        for number, name in enumerate(POLICIES):
            curves = [row["curve"] for row in rows if row["policy"] == name]
            if not curves:
                continue
            color = f"C{number}"
            for curve in curves if len(curves) > 1 else []:
                axes.plot(range(1, len(curve) + 1), curve, color=color, linewidth=0.5, alpha=0.6)
            middle = [mean(values) for values in zip(*curves, strict=False)]
            axes.plot(range(1, len(middle) + 1), middle, color=color, label=name)
        for name, line in (("allocator", "-"), ("uniform bits", ":")):
            best = next(row["best"] for row in rows if row["policy"] == name)
            axes.axhline(best, color="black", linewidth=0.8, linestyle=line, label=name)
        axes.set_xlabel("evaluations")
        axes.set_ylabel("best so far, % of the images chosen by")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        figure.tight_layout()
        figure.savefig(path.with_suffix(".png"), dpi=110)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        plt.close(figure)


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a results file; none if there is no file."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to those that are there now: several programs may be at work."""
    result = {"environment": describe(), "space": repr(SPACE), "rows": read(path) + rows}
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--task", choices=list(TASKS), default="resnet20")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=80)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("out", "joint_search"))
    parser.add_argument("--json", type=Path, default=RESULTS / "joint_search.json")
    parser.add_argument("--plot", action="store_true", help="draw what is there, and run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = read(options.json)
    own = [row for row in rows if row["task"] == options.task]
    if options.plot:
        draw(own, options.json.parent / "plots" / f"joint_search_{options.task}")
        return

    if not own:
        write(options.json, fixed(options.task, options.folder))
    for seed in options.seeds:
        for policy in options.policies:
            key = {"task": options.task, "policy": policy, "seed": seed}
            key["evaluations"] = options.evaluations
            if any(key.items() <= row.items() for row in rows):
                continue
            row = searched(options.task, policy, seed, options)
            print({k: v for k, v in row.items() if k not in {"curve", "rewards"}}, flush=True)
            write(options.json, [row])


if __name__ == "__main__":
    main()
