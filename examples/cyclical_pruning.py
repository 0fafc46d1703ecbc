"""Nine of ten weights pruned in three cycles, the others on learned steps (Srinivas et al. 2022).

python examples/cyclical_pruning.py [--data digits]
"""

import copy
import sys
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # wherever it is run from

from dither import LSQ
from dither.recipes import cyclical_pruning
from dither.train import Cyclical
from examples.tasks import arguments, load, report

CYCLES, SPARSITY, RATE = 3, 0.9, 1e-3


def main() -> None:
    options = arguments(__doc__, 300, "cyclical_pruning")
    task = load(options)
    model = copy.deepcopy(task.model).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    recipe = cyclical_pruning.recipe(
        model, SPARSITY, CYCLES, steps=options.steps, inner=LSQ(4), keep_ends=False
    )
    run = recipe.attach(model, optimizer=optimizer)
    schedule = Cyclical(SPARSITY, CYCLES)
    for step in range(options.steps):
        optimizer.param_groups[0]["lr"] = RATE * (0.05 + 0.95 * schedule.rate(run.progress))
        inputs, labels = task.batch(step)
        loss = functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()
    run.finish(task.inputs(50))
    weights = [e.decode() for e in run.encode().values() if len(e.shape) > 1]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    print(f"{100 * zeros:.1f} % of the weights are zero")
    report(run, task, options.out)


if __name__ == "__main__":
    main()
