"""Recipes on a small task, with several seeds: DiffQ beside LSQ and QAT, distillation, mu.

``python -m benchmarks.recipes_digits`` takes scikit-learn's digits (1,000 training images shifted
by up to a pixel, 797 test images) and three questions. ``bits``: rounding straight through (least
to greatest), learned steps, and DiffQ at three penalties, 300 steps from the trained network of
``dither demo`` (124,266 parameters); ``bytes`` of the file, and of DiffQ ``bits`` for each value as
its paper counts them. ``distillation``: a student of 2,418
parameters, rounded after training and by the two methods of Polino et al. 2018, which each train
for 300 steps from the taught student in floating point. ``mu``: Bayesian Bits from the trained
network at several penalties, 400 steps, the last quarter at fixed gates. ``test`` is top-1 in
percent, ``nats`` the cross-entropy on test images, which moves where top-1 does not.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.environment import describe
from benchmarks.pruning_digits import Batches
from dither.demo import network as digits
from dither.formats import Affine
from dither.model import evaluating
from dither.recipes import bayesian_bits, differentiable_quantization, diffq
from dither.recipes import quantized_distillation as distillation
from dither.recipes.model_layers import plan_of
from dither.recipes.recipe import Recipe
from dither.train import LSQ, Run, StraightThrough, Teacher
from dither.train.bayesian_bits import GatedBits
from dither.train.diffq_size import true_model_size_mib
from dither.train.method import Method

RESULTS = Path(__file__).parent / "results" / "recipes_digits.json"
STEPS, RATE, EPOCHS = 300, 1e-3, 12
STUDENT_STEPS, STUDENT_RATE = 600, 1e-2
GATE_STEPS, GATE_RATE, FIXED = 400, 3e-2, 0.75
PENALTIES = (5.0, 50.0, 500.0)
"""Of DiffQ for a MiB; its own rate is that of gates times 3."""
MU = (0.01, 0.03, 0.1, 0.3)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def student() -> nn.Sequential:
    """Two convolutions and two linear layers: 2,418 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 10)),
    )


def by_labels(_: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy."""
    return functional.cross_entropy(logits, labels)


def by_teacher(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """The published mixture, with the trained network as the teacher."""
    return distillation.loss(logits, TEACHER(images), labels)


TEACHER = Teacher(nn.Identity())


def train(
    model: nn.Module, steps: int, rate: float, loss: Loss, seed: int, run: Run | None = None
) -> None:
    """Adam along a cosine; ``run`` finishes."""
    batches, parameters = Batches(seed), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, rate) if parameters else None
    if run is not None and optimizer is not None:
        run.join(optimizer)
    rates = [group["lr"] for group in optimizer.param_groups] if optimizer else []
    model.train()
    for step in range(steps):
        share = (1 + math.cos(math.pi * step / steps)) / 2
        for group, full in zip(optimizer.param_groups if optimizer else [], rates, strict=True):
            group["lr"] = full * share
        images, labels = batches[step]
        total = loss(images, model(images), labels)
        (total if run is None else total + run.penalty()).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        if run is not None:
            run.step()
            if step + 1 == round(FIXED * steps):
                bayesian_bits.fix_gates(run)  # of others there are none
    if run is not None:
        run.finish(batches[step][0] for step in range(20))


def scores(model: nn.Module) -> dict[str, float]:
    """On the test images."""
    images, labels = digits.test_set()
    with evaluating(model), torch.no_grad():
        logits = model(images)
    nats = float(functional.cross_entropy(logits, labels))
    return {"test": round(100 * digits.accuracy(logits, labels), 2), "nats": round(nats, 4)}


def trained(
    recipe: Recipe, source: nn.Module, loss: Loss, seed: int, steps: int
) -> tuple[nn.Module, Run]:
    """A copy of the source after a recipe, and its run."""
    model = copy.deepcopy(source)
    run = recipe.attach(model, steps=steps, noise=seed)
    train(model, steps, RATE, loss, seed, run)
    return model, run


def bits(source: nn.Module, seed: int) -> dict[str, dict[str, Any]]:
    """Equal steps at about equal bits."""
    found: dict[str, dict[str, Any]] = {}
    recipes: dict[str, tuple[Recipe, int | None]] = {}
    for width in (2, 3, 4):
        through, learned = StraightThrough(Affine(width)), LSQ(width)
        recipes[f"{width} bits / QAT"] = (_same(source, through), width)
        recipes[f"{width} bits / LSQ"] = (_same(source, learned), width)
    for penalty in PENALTIES:
        recipe = diffq.recipe(source, "cifar", penalty=penalty, lr=3 * GATE_RATE)
        recipes[f"DiffQ, penalty {penalty:g}"] = (recipe, None)
    for name, (recipe, given) in recipes.items():
        model, run = trained(recipe, source, by_labels, seed, STEPS)
        counted = sum(p.numel() for p in source.parameters())
        found[name] = {**scores(model), "bytes": len(run.archive.to_bytes())}
        if given is None:
            size = float(true_model_size_mib(run)) * 2**23
            found[name]["bits"] = round(size / counted, 3)
    return found


def _same(model: nn.Module, method: Method) -> Recipe:
    """One method for all matrices and kernels."""
    return Recipe(plan_of(model, lambda _: method))


def distilled(source: nn.Module, seed: int) -> dict[str, dict[str, Any]]:
    """Polino's table in shape."""
    del source
    found: dict[str, dict[str, Any]] = {}
    torch.manual_seed(seed)
    alone = student()
    taught = copy.deepcopy(alone)
    for name, model, loss in (("labels", alone, by_labels), ("taught", taught, by_teacher)):
        train(model, STUDENT_STEPS, STUDENT_RATE, loss, seed)
        found[f"student, fp32, {name}"] = scores(model)
    for width in (2, 4):
        recipe = distillation.recipe(taught, width)
        rounded = copy.deepcopy(taught)
        recipe.attach(rounded).finish()
        found[f"student, {width} bits / after training"] = scores(rounded)
        learned, _ = trained(recipe, taught, by_teacher, seed, STEPS)
        found[f"student, {width} bits / quantized distillation"] = scores(learned)
        recipe = differentiable_quantization.recipe(taught, 2**width, lr=1e-2)
        learned, _ = trained(recipe, taught, by_teacher, seed, STEPS)
        found[f"student, {width} bits / differentiable quantization"] = scores(learned)
    return found


def gates(source: nn.Module, seed: int) -> dict[str, dict[str, Any]]:
    """Bayesian Bits over mu."""
    found: dict[str, dict[str, Any]] = {}
    images = digits.training_set()[0][:1]
    macs = bayesian_bits.multiplications(source, images)
    for mu in MU:
        recipe = bayesian_bits.recipe(source, penalty=mu, inputs=images, lr=GATE_RATE)
        model, run = trained(recipe, source, by_labels, seed, GATE_STEPS)
        gated = [s for s in run.surrogates.values() if isinstance(s, GatedBits)]
        widths = torch.cat([s.widths().float() for s in gated])
        operations = 100 * bayesian_bits.bit_operations(run, macs)
        found[f"mu {mu}"] = {
            **scores(model),
            "operations": round(operations, 3),
            "pruned": round(100 * float((widths == 0).float().mean()), 2),
            "width": round(float(widths[widths > 0].mean()), 2) if bool(widths.any()) else 0.0,
        }
    return found


PARTS = {"bits": bits, "distillation": distilled, "mu": gates}


def main() -> None:
    """Measure what is missing in the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
    source = digits.train(EPOCHS)
    TEACHER.model = source
    for part in given.parts:
        for seed in given.seeds:
            runs = known["runs"].setdefault(part, {})
            if str(seed) not in runs:
                runs[str(seed)] = PARTS[part](source, seed)
                known |= {"fp32": scores(source), "rows": table(known["runs"])}
                known["environment"] = describe()
                RESULTS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    for name, row in known["rows"].items():
        print(f"{name:45} {row}")


def table(runs: dict[str, dict[str, dict[str, dict[str, float]]]]) -> dict[str, dict[str, float]]:
    """Means over seeds, and the deviation of the scores."""
    rows: dict[str, dict[str, float]] = {}
    for seeds in runs.values():
        found = list(seeds.values())
        for name, first in found[0].items():
            row: dict[str, float] = {"seeds": len(found)}
            for key in first:
                values = [one[name][key] for one in found]
                row[key] = round(statistics.mean(values), 4)
                if key == "test" and len(values) > 1:
                    row["deviation"] = round(statistics.stdev(values), 2)
            rows[name] = row
    return rows


if __name__ == "__main__":
    main()
