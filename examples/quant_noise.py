"""Quant-Noise: train with a random part of the weights at 4 bits (Fan, Stock et al. 2021).

python examples/quant_noise.py [--data digits]
"""

import copy
import sys
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # wherever it is run from

from dither.recipes import quant_noise
from examples.tasks import arguments, load, report


def main() -> None:
    options = arguments(__doc__, 60, "quant-noise")
    task = load(options)
    model = copy.deepcopy(task.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    recipe = quant_noise.recipe(model, "int4", p=0.5)
    run = recipe.attach(model, optimizer=optimizer, steps=options.steps)
    for step in range(options.steps):
        inputs, labels = task.batch(step)
        loss = functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()
    run.finish(task.inputs(20))
    report(run, task, options.out)


if __name__ == "__main__":
    main()
