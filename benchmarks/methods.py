"""What there is to measure: tasks, our methods with their settings and seeds, and the runs of both.

It imports the standard library only, so that the runner stays small: a process that it starts
cannot appear to have taken more memory than it did. ``benchmarks.measure`` does the work.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SEEDS = (0, 1, 2)
HOURS = 2.0
"""The most that one run may take."""


@dataclass(frozen=True)
class Task:
    """A model and the score that compression must keep.

    Attributes:
        title: model and data.
        metric: what the score is.
        sizes: budgets in bytes for compressing, the largest first.
        trained: budgets in bytes for training.
        checkpoint: whether the model is given; if not, it is trained first, from the run's seed.
        less: whether less is better.
        span: of scores below fp32 (above, where less is better) that a plot shows.
    """

    title: str
    metric: str
    sizes: tuple[int, ...]
    trained: tuple[int, ...]
    checkpoint: bool = True
    less: bool = False
    span: float = 10.0

    def better(self, score: float, than: float) -> bool:
        """Whether a score is better than another."""
        return score < than if self.less else score > than


# Sizes are a little below those of peers: of int8, int4 and NNCodec's at four settings, each after
# zstd; the last are smaller than any of theirs.
TASKS = {
    "resnet20_cifar10": Task(
        "ResNet-20 on CIFAR-10",
        "top-1 on test, %",
        (250_000, 125_000, 103_000, 80_000, 60_000, 45_000, 34_000),
        (66_000, 45_000, 34_000),
    ),
    "minilm_stsb": Task(
        "all-MiniLM-L6-v2 on STS-B",
        "100 x Spearman's correlation on test",
        (20_800_000, 11_400_000, 9_300_000, 6_920_000, 4_910_000, 3_230_000, 2_670_000),
        (4_930_000, 2_670_000),
    ),
    "minilm_sst2": Task(
        "all-MiniLM-L6-v2, fine-tuned, on SST-2",
        "accuracy on labelled test sentences, %",
        (14_300_000, 6_900_000, 6_000_000, 4_600_000, 4_000_000, 3_700_000, 2_500_000, 1_600_000),
        (2_500_000,),
        checkpoint=False,
        span=25.0,
    ),
    "lm_ptb": Task(
        "Transformer of 1.9 M parameters on Penn Treebank",
        "perplexity on test, less is better",
        (1_800_000, 930_000, 840_000, 660_000, 480_000, 290_000, 180_000),
        (290_000,),
        checkpoint=False,
        less=True,
        span=200.0,
    ),
}

METHODS = {
    "fp32": "the model as it is",
    "dither": "`dither.compress(model, size)`: no data",
    "dither-data": "`dither.compress(model, size, data=...)`: 512 unlabelled samples (64 windows "
    "of text for the language model)",
    "dither-train": "trained to the budget: `dither.attach(model, budget=size)`",
    "dither-noise": "noise at a fixed format (int4, iPQ) while training, `benchmarks.ordering`",
    "dither-diffq": "`DiffQ` of dither, trained as the DiffQ package was, `benchmarks.diffq`",
}
"""Ours. ``dither-diffq`` is measured by a program of its own, beside its peer."""

NOISE = {
    "int4": "int4, after training",
    "int4-qat": "int4, QAT",
    "int4-quant-noise": "int4, Quant-Noise",
    "ipq": "iPQ, plainly trained",
    "ipq-qat": "iPQ, QAT",
    "ipq-quant-noise-proxy": "iPQ, Quant-Noise (proxy)",
    "ipq-quant-noise-exact": "iPQ, Quant-Noise (exact)",
}
"""Settings of ``dither-noise``, and their rows in ``benchmarks.ordering``."""

WEIGHTS = "plain.pt"
"""What ``benchmarks.ordering`` calls the file of a model trained without noise."""

ORDERING = {"minilm_sst2": "sst2", "lm_ptb": "ptb"}
"""Tasks of ``benchmarks.ordering``, whose training gives these models."""


@dataclass(frozen=True, order=True)
class Run:
    """One thing to measure, in a process of its own.

    Attributes:
        task: a key of :data:`TASKS`.
        method: a key of :data:`METHODS`, or a peer.
        setting: a budget in bytes, a peer's setting, or ``"none"``.
        seed: of training and of the choice of samples; 0 where nothing is random.
    """

    task: str
    method: str
    setting: str
    seed: int = 0

    @property
    def name(self) -> str:
        """What globs match, and the path of the result without ``.json``."""
        return f"{self.task}/{self.method}-{self.setting}-{self.seed}"

    def work(self, folder: Path) -> Path:
        """Where models that are trained for this task and seed are kept, below a folder."""
        return folder / "models" / f"{self.task}-{self.seed}"

    def weights(self, folder: Path) -> Path | None:
        """The model's file there; None where its checkpoint is published."""
        return None if TASKS[self.task].checkpoint else self.work(folder) / WEIGHTS

    @property
    def ours(self) -> bool:
        """Whether it is no peer's."""
        return self.method in METHODS

    @property
    def arguments(self) -> list[str]:
        """For ``benchmarks.measure``."""
        return [
            *("--task", self.task, "--method", self.method),
            *("--setting", self.setting, "--seed", str(self.seed)),
        ]


def runs(which: str) -> list[Run]:
    """Our runs of the ``"quick"`` or ``"full"`` set; first the short ones and the first seed."""
    if which == "quick":
        quick = [Run(task, "fp32", "none") for task in TASKS if TASKS[task].checkpoint]
        for task, size in (
            ("resnet20_cifar10", 80_000),
            ("resnet20_cifar10", 60_000),
            ("minilm_stsb", 4_910_000),
        ):
            quick.append(Run(task, "dither", str(size)))
        return [*quick, Run("resnet20_cifar10", "dither-data", "60000")]
    found: list[Run] = []
    for task, facts in TASKS.items():
        # With a checkpoint given, nothing of fp32 and of compressing without data is random.
        seeds = SEEDS[:1] if facts.checkpoint else SEEDS
        found += [Run(task, "fp32", "none", seed) for seed in seeds]
        found += [Run(task, "dither", str(size), seed) for size in facts.sizes for seed in seeds]
        found += [
            Run(task, "dither-data", str(size), seed) for size in facts.sizes for seed in SEEDS
        ]
        found += [
            Run(task, "dither-train", str(size), seed) for size in facts.trained for seed in SEEDS
        ]
        if task in ORDERING:
            found += [Run(task, "dither-noise", name, seed) for name in NOISE for seed in SEEDS]
    order = list(METHODS)
    return sorted(found, key=lambda run: (run.seed, order.index(run.method)))


def peers() -> list[str]:
    """Names of the peers that have an environment (``benchmarks/peers/environments.toml``)."""
    path = ROOT / "benchmarks" / "peers" / "environments.toml"
    return list(tomllib.loads(path.read_text(encoding="utf-8"))["peers"])
