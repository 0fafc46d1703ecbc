"""Oscillating weights of a depthwise network, and noise in place of straight-through rounding.

``python -m benchmarks.oscillations`` trains a small MobileNetV2 (139,114 parameters, CIFAR-10 at
half its resolution) in floating point, then goes on from there for the same number of steps in
every row: learned steps alone, dampened, and frozen with two momenta, at W4A4 and W3A3, as
``recipes.oscillations`` has them; and rounding to 4 bits straight through or with noise
(``recipes.quant_noise``), weights alone. Scores are top-1 on the 10,000 test images in percent,
with batch norm's statistics as training left them and re-estimated on 50 batches. Training goes on
where it was stopped, and every row is saved at once and not computed again.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.kept import keep, kept
from benchmarks.tasks import resnet20_cifar10
from dither import Activation
from dither.activations import apply, inputs_of_layers, observe
from dither.recipes import oscillations, quant_noise
from dither.recipes.recipe import Recipe
from dither.train import Run, frozen_share
from dither.train.oscillations import Watch, Watchable

RESULTS = Path(__file__).parent / "results" / "oscillations.json"
FOLDER = Path("out", "oscillations")

BLOCKS = ((1, 16, 1), (4, 24, 1), (4, 24, 1), (4, 40, 2), (4, 40, 1), (4, 80, 1), (4, 80, 1))
"""Expansion, outputs and stride of each inverted residual."""
BATCH, EPOCHS, RATE, DECAY = 128, 5, 0.1, 5e-5
STEPS, RATES = 200, {4: 0.0033, 3: 0.01}
"""Of every row, and its learning rate by bits: those of the paper, with momentum 0.9."""
NOISE_RATE = 0.01
NORM_BATCHES = 50
COUNTED, TWICE = 60, 2
"""``oscillating`` is the share of weights whose integers turned twice in the last 60 steps."""

Make = Callable[[nn.Module], Recipe]


class InvertedResidual(nn.Sequential):
    """Sandler et al. 2018 (arXiv 1801.04381): expand, filter each channel, project, add."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        wide = inputs * expansion
        expand = _unit(inputs, wide) if expansion > 1 else []
        narrow = [nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        super().__init__(*expand, *_unit(wide, wide, 3, stride, wide), *narrow)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        y = x
        for part in self:
            y = part(y)
        return x + y if self.adds else y


def _unit(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU6()]


def mobilenet() -> nn.Sequential:
    """Maps [n, 3, 32, 32] to [n, 10]; images are halved before the first layer, and by it."""
    parts, width = [nn.AvgPool2d(2), *_unit(3, 16, 3, 2)], 16
    for expansion, outputs, stride in BLOCKS:
        parts.append(InvertedResidual(width, outputs, expansion, stride))
        width = outputs
    parts += [*_unit(width, 4 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(4 * width, 10))


def _rows() -> dict[str, tuple[int, int | None, Make]]:
    """By name: bits of weights and activations, and what makes the recipe."""
    found: dict[str, tuple[int, int | None, Make]] = {}
    remedies = {
        "LSQ": ("none", 0.001),
        "dampened": ("dampen", 0.001),
        "frozen, momentum 0.001": ("freeze", 0.001),
        "frozen, momentum 0.01": ("freeze", 0.01),
    }
    for bits in (3, 4):
        for name, (remedy, momentum) in remedies.items():

            def make(
                model: nn.Module, bits: int = bits, remedy: str = remedy, m: float = momentum
            ) -> Recipe:
                return oscillations.recipe(model, bits, remedy, steps=STEPS, momentum=m)

            found[f"W{bits}A{bits} / {name}"] = (bits, bits, make)
    for ranges in ("tensor", "histogram"):
        for name, p in {"QAT": 1.0, "noise 0.5": 0.5, "noise 0.2": 0.2}.items():

            def noisy(model: nn.Module, p: float = p, ranges: str = ranges) -> Recipe:
                return quant_noise.recipe(model, "int4", p=p, ranges=ranges)

            found[f"int4 by {ranges} / {name}"] = (4, None, noisy)
    return found


ROWS = _rows()


def pretrained() -> nn.Sequential:
    """The network in floating point, trained from scratch or where that was stopped."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    saved, batches = FOLDER / "fp32.pt", resnet20_cifar10.Batches(BATCH, seed=0)
    torch.manual_seed(0)
    model = mobilenet()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(), RATE, momentum=0.9, nesterov=True, weight_decay=DECAY
    )
    steps, done = EPOCHS * batches.per_epoch, 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
    for step in range(done, steps):
        share = min(1.0, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
        loss = train_step(model, optimizer, batches[step], RATE * share)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"fp32, step {step + 1} of {steps}: {float(loss):.3f}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"done": step + 1}, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)
    return model.eval()


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    rate: float,
    run: Run | None = None,
) -> Tensor:
    """One step of the weights, whose optimizer's first group has this rate."""
    model.train()
    optimizer.param_groups[0]["lr"] = rate
    images = batch[0].contiguous(memory_format=torch.channels_last)
    loss = functional.cross_entropy(model(images), batch[1])
    (loss if run is None else loss + run.penalty()).backward()
    optimizer.step()
    optimizer.zero_grad()
    if run is not None:
        run.step()
    return loss.detach()


def quantize_inputs(model: nn.Module, bits: int, images: list[Tensor]) -> None:
    """Learned ranges of what goes into layers; of the first and last at 8 bits."""
    sites = inputs_of_layers(model, images)
    plan = {
        site: Activation(
            8 if site in (sites[0], sites[-1]) else bits, ranges="mse", training="learned"
        )
        for site in sites
    }
    apply(model, observe(model, plan, images))


class Turns:
    """How often the integers of each weight turned, frozen ones excepted, whatever the row does."""

    def __init__(self) -> None:
        self._watches: dict[str, Watch] = {}
        self._turns: dict[str, Tensor] = {}

    def look(self, run: Run, bits: int) -> None:
        """Count after a step, in tensors of so many bits."""
        for name, surrogate, weight in run.weights():
            if not isinstance(surrogate, Watchable) or surrogate.bits != bits:
                continue
            integers = surrogate.integers(weight.detach())
            if name not in self._watches:
                self._watches[name] = Watch(integers)
                self._turns[name] = torch.zeros_like(integers)
            turned = self._watches[name].look(integers, 0.01, run.done)
            if surrogate.watch is not None:
                turned &= ~surrogate.watch.frozen
            self._turns[name] += turned

    def share(self) -> float:
        """Of weights that turned at least :data:`TWICE`."""
        turns = torch.cat([t.flatten() for t in self._turns.values()])
        return float((turns >= TWICE).float().mean())


def measure(source: nn.Module, name: str, seed: int) -> dict[str, Any]:
    """Train one row."""
    bits, activations, make = ROWS[name]
    start, batches = time.process_time(), resnet20_cifar10.Batches(BATCH, seed + 1)
    model = copy.deepcopy(source)
    if activations is not None:
        quantize_inputs(model, activations, [batches[-1 - i][0] for i in range(4)])
    recipe, is_noise = make(model), activations is None
    rate = NOISE_RATE if is_noise else RATES[bits]
    decay = DECAY if is_noise else oscillations.WEIGHT_DECAY[4 if "frozen" in name else 3]
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=decay)
    run = recipe.attach(model, optimizer=optimizer, steps=STEPS, noise=seed)
    turns = Turns()
    for step in range(STEPS):
        share = (1 + math.cos(math.pi * step / STEPS)) / 2
        loss = train_step(model, optimizer, batches[step], rate * share, run)
        if not is_noise and step >= STEPS - COUNTED:
            turns.look(run, bits)
    row: dict[str, Any] = {"loss": round(float(loss), 4)}
    if not is_noise:
        row |= {"oscillating": turns.share(), "frozen": frozen_share(run)}
    run.finish()
    row["score"] = resnet20_cifar10.evaluate(model.eval(), "test")
    run.finish((batches[STEPS + i][0] for i in range(NORM_BATCHES)), NORM_BATCHES)
    row["re-estimated"] = resnet20_cifar10.evaluate(model.eval(), "test")
    return row | {"cpu_seconds": round(time.process_time() - start, 1)}


def main() -> None:
    """Measure what is missing in the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=["W4A4", "W3A3", "int4"], help="first parts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = kept(RESULTS) or {}
    model = pretrained()
    wanted = [name for part in given.rows for name in ROWS if name.startswith(part)]
    for name, seed in [("fp32", 0), *((n, s) for s in given.seeds for n in wanted)]:
        title = f"{name} / seed {seed}"
        if title in rows:
            continue
        if name == "fp32":
            rows[title] = {"score": resnet20_cifar10.evaluate(model, "test")}
        else:
            rows[title] = measure(model, name, seed)
        print(title, rows[title], flush=True)
        keep(RESULTS, rows)


if __name__ == "__main__":
    main()
