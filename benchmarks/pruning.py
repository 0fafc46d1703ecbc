"""At the same file size, does pruning with quantization beat quantization alone?

``python -m benchmarks.pruning --split test`` trains ResNet-20 to a few budgets as
``benchmarks.train_resnet20`` does (same loss, batches, steps and rates), with learned steps alone,
with a learned dead zone, and with magnitude pruning around them. Interrupted runs go on; finished
ones stay in the results.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.environment import describe
from benchmarks.train_resnet20 import Planned, train
from benchmarks.training import score
from dither import LSQ, DeadZone, Plan, Pruned
from dither.train import Cyclical, Gradual, Method
from dither.train.default_plan import default_plan
from dither.train.sparsity import Sparsity

RESULTS = Path(__file__).parent / "results"
TASK = "resnet20_cifar10"
BUDGETS = [34_000, 20_000]


def with_matrices(method: Method, model: nn.Module) -> Plan:
    """What a budget does by default, with another method for matrices."""
    rules = {name: method if isinstance(spec, LSQ) else spec for name, spec in default_plan(model)}
    return Plan(rules)


def under_masks(sparsity: Sparsity | None) -> Planned:
    """Learned steps of which some are pruned."""
    return partial(with_matrices, Pruned(LSQ(None), sparsity))


METHODS: dict[str, Planned] = {
    "learned steps": partial(with_matrices, LSQ(None)),
    "dead zone": partial(with_matrices, DeadZone(None)),
    "as many zeros as the budget says": under_masks(None),
    "80 % zeros": under_masks(Gradual(0.8, until=0.5)),
    "60 % zeros": under_masks(Gradual(0.6, until=0.5)),
    "90 % zeros": under_masks(Gradual(0.9, until=0.5)),
    "80 % zeros, 3 cycles": under_masks(Cyclical(0.8, cycles=3)),
}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--split", choices=["dev", "test"], default="dev")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("out", "pruning"))
    parser.add_argument("--json", type=Path, default=RESULTS / "pruning.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    for budget in options.budgets:
        for method in options.methods:
            for seed in options.seeds:
                key = {"method": method, "budget": budget, "seed": seed, "epochs": options.epochs}
                if any(key.items() <= row.items() for row in rows):
                    continue
                folder = options.folder / f"{method}-{options.epochs}".replace(" ", "_")
                folder.mkdir(parents=True, exist_ok=True)
                path, row = train(budget, seed, options.epochs, folder, METHODS[method])
                row = key | row | {options.split: round(score(TASK, path, options.split), 2)}
                print(json.dumps(row), flush=True)
                rows.append(row)
                result = {"environment": describe(), "rows": rows}
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
