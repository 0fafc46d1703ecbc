"""Learned steps at 3 bits, and weights that jump back and forth frozen (Nagel et al. 2022).

python examples/oscillations.py [--data digits]
"""

import copy
import sys
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # wherever it is run from

from dither.recipes import oscillations
from dither.train import frozen_share, oscillating
from examples.tasks import arguments, load, report


def main() -> None:
    options = arguments(__doc__, 80, "oscillations")
    task = load(options)
    model = copy.deepcopy(task.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=2.5e-5)
    # Averages over the last 20 steps or so: the paper's 0.01 is for longer training.
    recipe = oscillations.recipe(model, 3, "freeze", steps=options.steps, momentum=0.05)
    run = recipe.attach(model, optimizer=optimizer)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for step in range(options.steps):
        inputs, labels = task.batch(step)
        loss = functional.cross_entropy(model(inputs), labels) + run.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        run.step()
    run.finish(task.inputs(50))
    print(f"{100 * frozen_share(run):.1f} % of the weights are frozen, ", end="")
    print(f"{100 * oscillating(run, 0.02):.1f} % still oscillate")
    report(run, task, options.out)


if __name__ == "__main__":
    main()
