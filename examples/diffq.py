"""DiffQ: every group of 16 weights learns how many bits it needs (Défossez et al. 2022).

python examples/diffq.py [--data digits]
"""

import copy
import sys
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # wherever it is run from

from dither.recipes import diffq
from dither.train import true_model_size_mib
from examples.tasks import arguments, load, report


def main() -> None:
    options = arguments(__doc__, 60, "diffq")
    task = load(options)
    model = copy.deepcopy(task.model).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    # Few steps, so that bits must learn faster than in the paper, which has 2e-4.
    recipe = diffq.recipe(model, "resnet20", penalty=20.0, lr=0.05)
    run = recipe.attach(model, optimizer=optimizer)
    for step in range(options.steps):
        inputs, labels = task.batch(step)
        loss = functional.cross_entropy(model(inputs), labels) + run.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()
    run.finish(task.inputs(20))
    report(run, task, options.out)
    print(f"{float(true_model_size_mib(run)) * 2**20:,.0f} bytes as the paper counts")


if __name__ == "__main__":
    main()
