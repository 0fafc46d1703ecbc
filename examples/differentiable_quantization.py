"""Differentiable quantization: weights stay, 8 points learn (Polino et al. 2018, algorithm 2).

Tensors with larger gradients get more points than the others, 8 on average.

python examples/differentiable_quantization.py [--data digits]
"""

import copy
import sys
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # wherever it is run from

from dither.recipes import differentiable_quantization
from dither.train import Teacher, soft_targets
from examples.tasks import arguments, load, report


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def main() -> None:
    options = arguments(__doc__, 60, "differentiable-quantization")
    task = load(options)
    teacher = Teacher(task.model)
    model = copy.deepcopy(task.model).train()
    points = differentiable_quantization.share_points(model, loss_of, map(task.batch, range(5)), 8)
    print("points:", points)
    recipe = differentiable_quantization.recipe(model, points)
    run = recipe.attach(model, steps=options.steps)
    for step in range(options.steps):
        inputs, _ = task.batch(step)
        soft_targets(model(inputs), teacher(inputs), temperature=1.0).backward()
        run.step()  # trains the points: nothing else learns
    run.finish(task.inputs(20))
    report(run, task, options.out)


if __name__ == "__main__":
    main()
