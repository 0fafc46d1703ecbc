"""Bayesian Bits: gates decide the bits of each tensor, and which channels stay (van Baalen 2020).

The last quarter of the steps trains with fixed gates, as in the paper.

python examples/bayesian_bits.py [--data digits]
"""

import copy
import sys
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # wherever it is run from

from dither.recipes import bayesian_bits
from examples.tasks import arguments, load, report


def main() -> None:
    options = arguments(__doc__, 80, "bayesian-bits")
    task = load(options)
    model = copy.deepcopy(task.model).train()
    inputs = task.batch(0)[0]
    macs = bayesian_bits.multiplications(model, inputs)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    # Few steps, so that gates must learn faster than in the paper, which has 1e-3.
    recipe = bayesian_bits.recipe(model, penalty=0.03, inputs=inputs, lr=0.3)
    run = recipe.attach(model, optimizer=optimizer)
    for step in range(options.steps):
        if step == 3 * options.steps // 4:
            bayesian_bits.fix_gates(run)
        inputs, labels = task.batch(step)
        loss = functional.cross_entropy(model(inputs), labels) + run.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()
    run.finish(task.inputs(20))
    print(f"{100 * bayesian_bits.bit_operations(run, macs):.2f} % of the bit operations")
    report(run, task, options.out)


if __name__ == "__main__":
    main()
