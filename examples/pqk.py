"""Pruning and 4 bits, then distillation from the pruned weights (PQK, Kim et al. 2021).

python examples/pqk.py [--data digits]
"""

import copy
import sys
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # wherever it is run from

from dither.recipes import pqk
from dither.train import OwnTeacher
from examples.tasks import arguments, load, report

PHASE = 0.5


def main() -> None:
    options = arguments(__doc__, 300, "pqk")
    task = load(options)
    model = copy.deepcopy(task.model).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    recipe = pqk.recipe(model, 4, 0.9, steps=options.steps, phase=PHASE)
    run = recipe.attach(model, optimizer=optimizer)
    teacher = OwnTeacher(run)
    for step in range(options.steps):
        inputs, labels = task.batch(step)
        student = model(inputs)
        if run.progress < PHASE:
            loss = functional.cross_entropy(student, labels)
        else:
            with teacher.teaching():
                taught = model(inputs)
            loss = pqk.loss(student, taught, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()
    run.finish(task.inputs(50))
    report(run, task, options.out)


if __name__ == "__main__":
    main()
