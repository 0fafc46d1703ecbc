"""Quant-Noise, then iterative product quantization, layer after layer (Stock, Fan et al.).

Half of the steps drop random blocks; then each layer gets a codebook in turn, which minimises the
error of its outputs, while the others and all centroids train on. The original's answers are the
goal: no labels are read.

python examples/ipq.py [--data digits]
"""

import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # wherever it is run from

from dither.recipes import ipq
from dither.train import Teacher, soft_targets
from examples.tasks import arguments, load, report


def main() -> None:
    options = arguments(__doc__, 80, "ipq")
    task = load(options)
    teacher = Teacher(task.model)
    model = copy.deepcopy(task.model).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    recipe = ipq.recipe(
        model,
        steps=options.steps,
        start=options.steps // 2,
        p=0.1,
        stages="layers",
        data=task.inputs(2),
    )
    run = recipe.attach(model, optimizer=optimizer)
    for step in range(options.steps):
        inputs, _ = task.batch(step)
        loss = soft_targets(model(inputs), teacher(inputs), temperature=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()
    run.finish(task.inputs(20))
    report(run, task, options.out)


if __name__ == "__main__":
    main()
