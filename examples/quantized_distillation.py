"""Quantized distillation: 3 bits, taught by the float32 network (Polino et al. 2018, algorithm 1).

The paper's students are smaller than their teachers; here the student is the teacher at 3 bits.

python examples/quantized_distillation.py [--data digits]
"""

import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # wherever it is run from

from dither.recipes import quantized_distillation
from dither.train import Teacher
from examples.tasks import arguments, load, report


def main() -> None:
    options = arguments(__doc__, 60, "quantized-distillation")
    task = load(options)
    teacher = Teacher(task.model)
    model = copy.deepcopy(task.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    recipe = quantized_distillation.recipe(model, bits=3)
    run = recipe.attach(model, optimizer=optimizer, steps=options.steps)
    for step in range(options.steps):
        inputs, labels = task.batch(step)
        loss = quantized_distillation.loss(model(inputs), teacher(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()
    run.finish(task.inputs(20))
    report(run, task, options.out)


if __name__ == "__main__":
    main()
