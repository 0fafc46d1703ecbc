"""Which of forty files is best: regret against trials made and labels asked, for each chooser.

``python -m benchmarks.choosing`` chooses among the compressed ResNet-20 of
``benchmarks.choosing_files`` by their answers on the 10,000 test images of CIFAR-10. Regret is the
best file's accuracy less the chosen one's, in points of per cent, over all images. A trial is one
file on 25 images that are drawn anew, and its feedback whether it was right on each; a stream of
labels is all images in random order. Besides, the rate of SMD-AMA's bound on synthetic data.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.choosing_files import Matrix, matrix
from benchmarks.environment import describe
from benchmarks.plots import MARKS, pyplot, save
from dither.select import (
    AOE,
    SMDAMA,
    Answer,
    Labels,
    MetricSearch,
    ModelPicker,
    SuccessiveHalving,
    Trials,
    UniformLabels,
    UniformTrials,
    class_features,
)

RESULTS = Path(__file__).parent / "results"
TRIAL = 25
TRIALS = (1, 2, 3, 5, 8, 12, 20, 40, 80, 160, 320, 640)
MODELLED = 40
"""Trials of choosers with a Gaussian process, at most: they have found it long before."""
LABELS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
LENGTHS = (100, 300, 1000, 3000, 10000, 30000)
MUS = (0.0, 0.25, 0.5)
PARTS = ("rate", "labels", "trials")
CANDIDATES = 10
"""Of the synthetic data."""


def metric_features(files: Matrix) -> np.ndarray:
    """What a sweep knows of its files without a score: bytes, and the way they were made."""
    ways = [name.split()[0] for name in files.names]
    kinds = sorted(set(ways))
    return np.array(
        [
            [math.log(n), *(way == kind for kind in kinds[1:])]
            for n, way in zip(files.nbytes, ways, strict=True)
        ],
        dtype=float,
    )


def trial_choosers(files: Matrix) -> dict[str, Callable[[int, int], Trials]]:
    """By name: makes one for a seed and the number of trials that there will be."""
    features, seen = class_features(files.reference), metric_features(files)
    return {
        "AOE": lambda seed, _: AOE(features, files.classes, seed),
        "AOE, expected improvement": lambda seed, _: AOE(
            features, files.classes, seed, acquisition="ei"
        ),
        "AOE, upper bound": lambda seed, _: AOE(features, files.classes, seed, acquisition="ucb"),
        "Bayesian optimization": lambda seed, _: MetricSearch(seen, seed),
        "successive halving": lambda seed, count: SuccessiveHalving(
            len(files.names), max(count, len(files.names)), seed
        ),
        "uniform trials": lambda seed, _: UniformTrials(len(files.names), seed),
    }


def tried(chooser: Trials, files: Matrix, count: int, seed: int) -> Iterator[tuple[int, Answer]]:
    """The answers at each of the counts that are reported."""
    generator = np.random.default_rng((seed, 1))
    for number in range(1, count + 1):
        file = chooser.ask()
        images = generator.integers(0, len(files.labels), TRIAL)
        chooser.tell(file, files.right[file, images], images)
        if number in TRIALS:
            yield number, chooser.answer()


def by_trials(
    files: Matrix, seeds: Sequence[int], only: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Regret of each chooser against trials; for AOE how often its deviations cover the truth."""
    truth = files.right.mean(1)
    for name, make in trial_choosers(files).items():
        if not fnmatchcase(name, only):
            continue
        start = time.monotonic()
        regrets: dict[int, list[float]] = {}
        inside: list[bool] = []
        modelled = name.startswith(("AOE", "Bayes"))
        ends = [MODELLED] if modelled else [TRIALS[-1]]
        if name == "successive halving":  # its plan depends on how many trials there will be
            ends = [count for count in TRIALS if count >= len(truth)]
        for seed in seeds:
            for end in ends:
                for count, answer in tried(make(seed, end), files, end, seed):
                    if name == "successive halving" and count != end:
                        continue
                    regrets.setdefault(count, []).append(
                        100 * float(truth.max() - truth[answer.best])
                    )
                    if modelled:
                        error = np.abs(np.array(answer.means) - truth)
                        inside += (error < 2 * np.array(answer.deviations)).tolist()
        found: dict[str, Any] = {"regret": summary(regrets)}
        if modelled:
            found["inside two deviations"] = round(float(np.mean(inside)), 3)
        print(name, round(time.monotonic() - start), "s", found, flush=True)
        yield name, found


def label_choosers(files: Matrix) -> dict[str, Callable[[int], Labels]]:
    """By name: makes one for a seed."""
    count, length = len(files.names), len(files.labels)
    return {
        "model picker": lambda seed: ModelPicker(count, seed=seed),
        "SMD-AMA, mu 0.3": lambda seed: SMDAMA(count, length, 0.3, seed),
        "SMD-AMA, mu 0.6": lambda seed: SMDAMA(count, length, 0.6, seed),
        "uniform labels": lambda seed: UniformLabels(count, seed=seed),
    }


def by_labels(files: Matrix, seeds: Sequence[int]) -> dict[str, Any]:
    """Regret of each chooser against labels asked, and what SMD-AMA's mixture scores."""
    truth = files.right.mean(1)
    found: dict[str, Any] = {}
    for name, make in label_choosers(files).items():
        regrets: dict[int, list[float]] = {}
        weighed: dict[int, list[float]] = {}
        asked, mixtures = [], []
        for seed in seeds:
            chooser = make(seed)
            for image in np.random.default_rng((seed, 2)).permutation(len(files.labels)):
                if not chooser.wants(files.probabilities[:, image]):
                    continue
                chooser.tell(int(files.labels[image]))
                if chooser.asked in LABELS:
                    best = chooser.best()
                    regrets.setdefault(chooser.asked, []).append(
                        100 * float(truth.max() - truth[best])
                    )
                    if isinstance(chooser, SMDAMA):
                        heaviest = int(chooser.weights.argmax())
                        weighed.setdefault(chooser.asked, []).append(
                            100 * float(truth.max() - truth[heaviest])
                        )
            asked.append(chooser.asked)
            if isinstance(chooser, SMDAMA):
                said = chooser.mixture(files.probabilities).argmax(-1)
                mixtures.append(100 * float((said == files.labels).mean()))
        found[name] = {"regret": summary(regrets), "asked of all": asked}
        if mixtures:
            found[name] |= {"heaviest": summary(weighed), "mixture %": mixtures}
        print(name, found[name], flush=True)
    return found


def summary(values: dict[int, list[float]]) -> dict[str, dict[str, Any]]:
    """Mean, standard deviation and each seed's value, where all seeds came so far."""
    most = max(map(len, values.values()), default=0)
    return {
        str(count): {
            "mean": round(statistics.mean(some), 3),
            "deviation": round(statistics.stdev(some), 3) if len(some) > 1 else 0.0,
            "seeds": [round(value, 3) for value in some],
        }
        for count, some in sorted(values.items())
        if len(some) == most
    }


def synthetic(seed: int, length: int) -> np.ndarray:
    """Outputs times labels in [-1, 1], ``(length, candidates)``: each candidate is right in part.

    The best mixture is none of the candidates: what one gets wrong, others get right.
    """
    generator = np.random.default_rng((seed, 3))
    quality = np.linspace(0.0, 0.3, CANDIDATES)
    return np.clip(quality + 0.6 * generator.standard_normal((length, CANDIDATES)), -1, 1)


def least_risk(signed: np.ndarray) -> float:
    """Of the best mixture, by exponentiated gradient on all data."""
    theta = np.full(CANDIDATES, 1 / CANDIDATES)
    gram, mean = signed.T @ signed / len(signed), signed.mean(0)
    for _ in range(20_000):
        theta = theta * np.exp(-0.5 * (gram @ theta - mean))
        theta /= theta.sum()
    return float(np.square(1 - signed @ theta).mean() / 4)


def rate(seeds: Sequence[int]) -> dict[str, Any]:
    """Excess risk of the mixture against the length of the stream, and the slope in logarithms."""
    test = synthetic(-1 % 2**32, 100_000)
    least = least_risk(test)
    found: dict[str, Any] = {}
    for mu in MUS:
        risks: dict[int, list[float]] = {}
        asked: dict[int, list[float]] = {}
        for length in LENGTHS:
            for seed in seeds:
                chooser = SMDAMA(CANDIDATES, length, mu, seed)
                for signed in synthetic(seed, length):
                    if chooser.wants(np.stack([(1 - signed) / 2, (1 + signed) / 2], axis=1)):
                        chooser.tell(1)
                risk = np.square(1 - test @ chooser.weights).mean() / 4
                risks.setdefault(length, []).append(float(risk) - least)
                asked.setdefault(length, []).append(chooser.asked / length)
        means = [statistics.mean(risks[length]) for length in LENGTHS]
        slope = np.polyfit(np.log(LENGTHS), np.log(means), 1)[0]
        bound = [
            math.sqrt(2 * math.log(CANDIDATES) / ((1 + mu) * length ** (1 - mu)))
            for length in LENGTHS
        ]
        found[f"{mu:g}"] = {
            "excess": {str(k): v for k, v in zip(LENGTHS, means, strict=True)},
            "deviation": {str(k): statistics.stdev(risks[k]) for k in LENGTHS},
            "bound": {str(k): v for k, v in zip(LENGTHS, bound, strict=True)},
            "asked": {str(k): statistics.mean(asked[k]) for k in LENGTHS},
            "slope": round(float(slope), 3),
            "slope of the bound": -(1 - mu) / 2,
        }
        print("mu", mu, found[f"{mu:g}"], flush=True)
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """Three panels: trials, labels, the rate."""
    figure, panels = pyplot().subplots(1, 3, figsize=(14, 4.2))
    for axes, key, label in zip(
        panels, ("trials", "labels"), (f"trials of {TRIAL} images", "labels asked"), strict=False
    ):
        for number, (name, row) in enumerate(result[key].items()):
            grey = str(round(0.6 * number / len(result[key]), 2))
            counts = [int(count) for count in row["regret"]]
            means = np.array([one["mean"] for one in row["regret"].values()])
            spread = np.array([one["deviation"] for one in row["regret"].values()])
            axes.plot(counts, means, marker=MARKS[number], color=grey, label=name, ms=5)
            axes.fill_between(
                counts, np.maximum(means - spread, 0), means + spread, color=grey, alpha=0.12
            )
        axes.set(xlabel=label, ylabel="regret, points of per cent", xscale="log")
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set_ylim(0, None)
        axes.legend(fontsize=7, frameon=False)
    for number, (mu, row) in enumerate(result["rate"].items()):
        lengths = [int(length) for length in row["excess"]]
        grey = str(round(0.25 * number, 2))
        panels[2].plot(
            lengths, row["excess"].values(), marker=MARKS[number], color=grey, label=f"mu {mu}"
        )
        panels[2].plot(lengths, row["bound"].values(), ls="--", color=grey, lw=0.8)
    panels[2].set(
        xlabel="samples of the stream",
        ylabel="excess risk; dashed: bound",
        xscale="log",
        yscale="log",
    )
    panels[2].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    save(figure, path)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=RESULTS / "choosing.json")
    parser.add_argument("--folder", type=Path, default=Path("out/choosing"), help="of the matrix")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="the others stay")
    parser.add_argument("--only", default="*", help="choosers of trials; the others stay")
    arguments = parser.parse_args()
    seeds, files = range(arguments.seeds), matrix(arguments.folder)
    accuracy = 100 * files.right.mean(1)
    kept = json.loads(arguments.json.read_text("utf-8")) if arguments.json.exists() else {}
    result: dict[str, Any] = kept | {
        "images": len(files.labels),
        "files": [
            {"name": name, "nbytes": int(nbytes), "accuracy": round(float(score), 2)}
            for name, nbytes, score in zip(files.names, files.nbytes, accuracy, strict=True)
        ],
    }

    def keep(part: str, found: dict[str, Any], start: float) -> None:
        seconds = round(time.process_time() - start)
        result[part] = found
        result[f"{part} by"] = {**describe(), "processor seconds": seconds}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for part in arguments.parts:
        start = time.process_time()
        if part == "rate":
            keep(part, rate(seeds), start)
        elif part == "labels":
            keep(part, by_labels(files, seeds), start)
        else:
            for name, found in by_trials(files, seeds, arguments.only):
                keep(part, result.get(part, {}) | {name: found}, start)
    if all(part in result for part in PARTS):
        draw(result, RESULTS / "plots" / "choosing")


if __name__ == "__main__":
    main()
