"""Kernels pruned and bits chosen by two controllers, in 16 times fewer bytes (AJPQ, 2020).

python examples/ajpq.py [--data digits]
"""

import copy
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # wherever it is run from

from dither.recipes import ajpq
from dither.search import Aim
from examples.tasks import arguments, load, report_archive


def main() -> None:
    options = arguments(__doc__, 100, "ajpq", "files that are tried")
    task = load(options)
    samples = [task.batch(number) for number in range(4)]

    def score(model: nn.Module) -> float:
        """Finer than accuracy: the likelihood of the labels."""
        losses = [functional.cross_entropy(model(images), labels) for images, labels in samples]
        return -float(torch.stack(losses).mean())

    aim = Aim(score, data=[samples[0][0]])
    found = ajpq.recipe(copy.deepcopy(task.model), "16x", aim, evaluations=options.steps)
    print(f"{'allocator':12}{found.history[0].reward:12.4f}")
    print(f"{'best':12}{found.best.reward:12.4f}, file {found.best.number} of {options.steps}")
    pruned = sum(width == 0 for widths in found.widths.values() for width in widths)
    print(f"{pruned} kernels are pruned")
    report_archive(found.archive, task, options.out)


if __name__ == "__main__":
    main()
