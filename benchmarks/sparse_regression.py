"""Which schedule of pruning finds the weights that matter: sparse linear regression.

The small experiment of Srinivas et al. 2022 (arXiv 2202.01290): inputs are correlated, few true
coefficients are not zero, and gradient descent prunes to as many as there are. ``python -m
benchmarks.sparse_regression`` writes a table, in percent of the true support that is found at the
end, mean and standard deviation over seeds, and a plot. All schedules take equally many steps, and
learning rates fall by half a cosine: once, or in each cycle. An interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import describe
from dither import Pruned, Raw, attach
from dither.train import Cyclical, Gradual, Iterative, OneShot
from dither.train.pruned import Masked
from dither.train.sparsity import Sparsity

RESULTS = Path(__file__).parent / "results"
FEATURES, SAMPLES, STEPS, RATE = 200, 120, 2000, 0.02
NOISE = 0.3


def schedules(share: float) -> dict[str, Sparsity]:
    """All of them, to one sparsity."""
    return {
        "one-shot, at the begin": OneShot(share),
        "one-shot, half-way": OneShot(share, begin=0.5),
        "gradual": Gradual(share),
        "iterative": Iterative(share, rounds=5, begin=0.2),
        "cyclical, 3 cycles": Cyclical(share, cycles=3),
        "cyclical, 5 cycles": Cyclical(share, cycles=5),
    }


def problem(support: int, correlation: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs ``(samples, features)``, targets ``(samples, 1)`` and true coefficients."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(SAMPLES, 10, generator=generator)
    mixing = torch.randn(10, FEATURES, generator=generator) / 10**0.5
    own = torch.randn(SAMPLES, FEATURES, generator=generator)
    inputs = (1 - correlation) ** 0.5 * own + correlation**0.5 * (common @ mixing)
    true = torch.zeros(FEATURES)
    places = torch.randperm(FEATURES, generator=generator)[:support]
    true[places] = torch.randn(support, generator=generator).sign() * (
        0.5 + torch.rand(support, generator=generator)
    )
    noise = NOISE * torch.randn(SAMPLES, 1, generator=generator)
    return inputs, inputs @ true[:, None] + noise, true


def found(sparsity: Sparsity, support: int, correlation: float, seed: int) -> float:
    """Share of the true support in the last mask."""
    inputs, targets, true = problem(support, correlation, seed)
    torch.manual_seed(seed)
    model = nn.Linear(FEATURES, 1, bias=False)
    run = attach(model, {"weight": Pruned(Raw(), sparsity)}, steps=STEPS)
    cycles = sparsity if isinstance(sparsity, Cyclical) else Cyclical(sparsity.end, cycles=1)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        some = torch.randint(SAMPLES, (32,), generator=generator)
        optimizer.param_groups[0]["lr"] = RATE * (0.1 + 0.9 * cycles.rate(run.progress))
        loss = (model(inputs[some]) - targets[some]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()
    surrogate = run.surrogates["weight"]
    assert isinstance(surrogate, Masked)
    mask = surrogate.mask[0]
    return float((mask & (true != 0)).sum()) / support


def rows(seeds: int, made: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One for each schedule, number of true coefficients and correlation that is not made yet."""
    for support in (20, 10, 4):
        for correlation in (0.0, 0.6, 0.9):
            for name, sparsity in schedules(1 - support / FEATURES).items():
                row = {"schedule": name, "support": support, "correlation": correlation}
                if any(row.items() <= old.items() for old in made):
                    continue
                shares = [100 * found(sparsity, support, correlation, s) for s in range(seeds)]
                yield row | {"found": round(mean(shares), 1), "std": round(stdev(shares), 1)}


def plot(made: list[dict[str, Any]], path: Path) -> None:
    """Support found against correlation, one panel for each number of true coefficients."""
    import matplotlib.pyplot as plt

    supports = sorted({row["support"] for row in made}, reverse=True)
    figure, axes = plt.subplots(1, len(supports), figsize=(10, 3.2), sharey=True)
    for axis, support in zip(axes, supports, strict=True):
        for name in dict.fromkeys(row["schedule"] for row in made):
            own = [r for r in made if r["schedule"] == name and r["support"] == support]
            axis.errorbar(
                [r["correlation"] for r in own],
                [r["found"] for r in own],
                [r["std"] for r in own],
                marker="o",
                capsize=2,
                label=name,
            )
        axis.set_title(f"{support} of {FEATURES} coefficients")
        axis.set_xlabel("correlation of inputs")
    axes[0].set_ylabel("support found, %")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=6, fontsize=8, loc="lower center")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS / "sparse_regression.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.json
    made = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    for row in rows(arguments.seeds, made):
        print(json.dumps(row), flush=True)
        made.append(row)
        result = {"environment": describe(), "seeds": arguments.seeds, "steps": STEPS, "rows": made}
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(made, RESULTS / "plots" / "sparse_regression.png")


if __name__ == "__main__":
    main()
