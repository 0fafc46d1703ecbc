"""Joint search on ResNet-20: the best score by evaluation, for each policy, at one file size.

``python -m benchmarks.joint_search`` searches sparsity and bits of kernels with every policy and as
many evaluations of each. They choose by the first test images of CIFAR-10, and what they have
found is scored on all others. Nothing is trained. Interrupted runs go on; finished ones stay in the
results, and ``--plot`` draws these.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

import dither
from benchmarks.environment import describe
from benchmarks.tasks import resnet20_cifar10
from dither.search import AJPQ, Aim, Evolution, Policy, Space, joint
from dither.search.joint import prepared

RESULTS = Path(__file__).parent / "results"
SPACE = Space(lowest=1.0, highest=5.0, groups=4, sparsity=0.25)
POLICIES: dict[str, str | Policy] = {
    "ajpq": AJPQ(),
    "random": "random",
    "tpe": "tpe",
    "cma-es": "cma-es",
    "evolution": "evolution",
    "evolution from the allocator": Evolution(from_allocator=True),
}
BATCH = 100
IMAGES = 10_000


def right(model: nn.Module, first: int, last: int) -> float:
    """Test images of a range that are classified rightly, in per cent."""
    found = 0
    for start in range(first, last, BATCH):
        images, labels = resnet20_cifar10.some("test", start, min(start + BATCH, last))
        found += int((model(images).argmax(1) == labels).sum())
    return 100 * found / (last - first)


class Choosing:
    """Scores by the first images."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, model: nn.Module) -> float:
        return right(model, 0, self.count)


@torch.no_grad()
def reported(model: nn.Module, archive: dither.Archive, count: int) -> float:
    """Per cent of the images that no policy has seen."""
    dither.load_into(model, archive)
    return right(model.eval(), count, IMAGES)


def fixed(budget: int, count: int) -> list[dict[str, Any]]:
    """The allocator's file, and that of equal bits for all kernels."""
    model, rows = resnet20_cifar10.load(), []
    judge, _ = prepared(model, budget, Aim(Choosing(count), space=SPACE))
    points = {"allocator": None, "uniform bits": judge.files.layout.uniform}
    for name, point in points.items():
        archive, _ = judge.archive(point)
        chosen, test = judge(point).reward, reported(resnet20_cifar10.load(), archive, count)
        rows.append({"policy": name, "nbytes": archive.nbytes, "best": chosen, "test": test})
    return rows


def searched(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One search; the allocator's file, which comes first, does not count."""
    options.folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    found = joint(
        resnet20_cifar10.load(),
        options.budget,
        Aim(Choosing(options.images), space=SPACE, data=[resnet20_cifar10.some("test", 0, 1)[0]]),
        policy=POLICIES[name],
        evaluations=1 + options.evaluations,
        seed=seed,
        processes=options.processes,
        journal=options.folder / f"{name}-{seed}.journal".replace(" ", "_"),
    )
    curve = found.curve(allocated=False)
    test = reported(resnet20_cifar10.load(), found.archive, options.images)
    is_own = found.best.number > 0
    return {
        "policy": name,
        "settings": repr(found.policy),
        "seed": seed,
        "evaluations": options.evaluations,
        "best": round(curve[-1], 2),
        "test": round(test, 2) if is_own else None,
        "nbytes": found.archive.nbytes,
        "seconds": round(time.monotonic() - start),
        "rewards": [round(row.reward, 2) for row in found.history[1:]],
        "curve": [round(value, 2) for value in curve],
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """The best score by evaluation: the mean over seeds, each seed thin."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "dither", "axes.spines.top": False}):
        figure, axes = plt.subplots(figsize=(6.4, 3.8))
        for number, name in enumerate(POLICIES):
            curves = [row["curve"] for row in results["rows"] if row["policy"] == name]
            if not curves:
                continue
            style: dict[str, Any] = {"color": f"C{number}"}
            for curve in curves if len(curves) > 1 else []:
                axes.plot(range(1, len(curve) + 1), curve, linewidth=0.5, alpha=0.6, **style)
            middle = [mean(values) for values in zip(*curves, strict=True)]
            axes.plot(range(1, len(middle) + 1), middle, label=name, **style)
        for name, line in (("allocator", "-"), ("uniform bits", ":")):
            best = next(row["best"] for row in results["rows"] if row["policy"] == name)
            axes.axhline(best, color="black", linewidth=0.8, linestyle=line, label=name)
        axes.set_xlabel("evaluations")
        axes.set_ylabel("best score, % of the images it chooses by")
        axes.set_ylim(30, None)
        axes.legend(frameon=False, fontsize=8)
        figure.tight_layout()
        figure.savefig(path.with_suffix(".png"), dpi=110)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--budget", type=int, default=45_000)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--evaluations", type=int, default=120)
    parser.add_argument("--images", type=int, default=500, help="to choose by")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("out", "joint_search"))
    parser.add_argument("--json", type=Path, default=RESULTS / "joint_search.json")
    parser.add_argument("--plot", action="store_true", help="draw what is there, and run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(options.json.read_text()) if options.json.exists() else {"rows": []}
    if options.plot:
        draw(known, options.json.parent / "plots" / "joint_search")
        return
    rows = known["rows"] or fixed(options.budget, options.images)
    setting = {"budget": options.budget, "images": options.images, "space": repr(SPACE)}
    for seed in options.seeds:
        for name in options.policies:
            key = {"policy": name, "seed": seed, "evaluations": options.evaluations}
            if any(key.items() <= row.items() for row in rows):
                continue
            rows.append(searched(name, seed, options))
            print({k: v for k, v in rows[-1].items() if k not in {"curve", "rewards"}}, flush=True)
            result = {"environment": describe(), **setting, "rows": rows}
            options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
