"""ResNet-20 for one epoch with 8-bit weights, activations and gradients: where ranges come from.

``python -m benchmarks.gradients`` trains from scratch and from the checkpoint, three seeds, with
ranges of activations and gradients of the tensor at hand (dynamic), of a moving average that
includes it (running), or of earlier steps alone (in hindsight; Fournarakis and Nagel 2021, arXiv
2105.04246). Runs of a seed share initial weights, batches and seeds of rounding. One more run with
dynamic ranges rounds gradients otherwise: so much do two runs of one method differ by chance.

As in the paper, every convolution and the classifier are quantized, the first and the last, too:
what they read, their weights (always by their own extremes) and the gradient that comes back to
what they give, rounded at random. Grids are asymmetric, one for each tensor; batch norm, sums, the
gradients of weights and the optimizer are in fp32. In evaluation, dynamic ranges are those of each
batch of 100 images.

Runs save their state as they go and take up where they were stopped. Use one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import dither
from benchmarks.environment import describe
from benchmarks.tasks import resnet20_cifar10
from benchmarks.traffic import layers_of, totals
from dither.activations import Activation, Gradient, resolve
from dither.activations.gradients import GradientQuantizer
from dither.activations.sites import place
from dither.formats import Affine

RESULTS = Path(__file__).parent / "results" / "gradients.json"
BATCH = 64
MOMENTUM, DECAY = 0.9, 1e-4
WARM = 0.2
SEEDS = 3
BITS = 8
OTHER = "dynamic, other rounding"
ARMS = ["fp32", "dynamic", "running", "hindsight", OTHER]
LIMIT = 0.3
_SAVE_EVERY = 100
_LAYERS = ("*conv?", "linear")


@dataclass(frozen=True)
class Setting:
    """Where training begins, and how fast it goes.

    Attributes:
        is_trained: from the checkpoint, or else from new weights.
        rate: the highest learning rate of SGD.
    """

    is_trained: bool
    rate: float


SETTINGS = {
    "scratch": Setting(is_trained=False, rate=0.1),
    "checkpoint": Setting(is_trained=True, rate=0.01),
}


class RunningGradient(GradientQuantizer):
    """Ranges of a moving average that includes the gradient at hand, for comparison."""

    def quantize(self, gradient: Tensor) -> Tensor:
        kept = self.low, self.high
        if int(self.steps) and gradient.numel():
            least, most = (end.float().reshape(1) for end in gradient.detach().aminmax())
            old = self.spec.momentum
            self.low, self.high = (
                end * old + now * (1 - old) for end, now in zip(kept, (least, most), strict=True)
            )
        quantized = super().quantize(gradient)
        self.low, self.high = kept
        return quantized


def attach(model: nn.Module, arm: str, steps: int, seed: int) -> dither.Run | None:
    """Quantize weights, activations and gradients in training as an arm says; fp32: nothing."""
    if arm == "fp32":
        return None
    is_dynamic = arm.startswith("dynamic")
    training = "fixed" if is_dynamic else arm
    rounding = seed + (1000 if arm == OTHER else 0)
    rules: dict[str, Any] = {}
    for layer in _LAYERS:
        rules[f"{layer}.weight"] = dither.StraightThrough(Affine(BITS, grid="asymmetric"))
        rules[f"{layer}@in"] = Activation(BITS, dynamic=is_dynamic, training=training)
        rules[f"{layer}@grad"] = Gradient(BITS, dynamic=is_dynamic, seed=rounding)
    if arm == "running":
        for site, spec in resolve(model, rules).items():
            if isinstance(spec, Gradient):
                place(model, site, RunningGradient(spec, site))
    return dither.attach(model, rules, steps=steps, noise=seed)


def share(step: int, steps: int) -> float:
    """Part of the highest learning rate: up along a line, then down along a cosine."""
    warm = max(1, round(WARM * steps))
    if step < warm:
        return (step + 1) / warm
    return (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


def keep(path: Path, state: dict[str, Any]) -> None:
    """Save training in the middle, whole or not at all."""
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def train(
    setting: Setting, arm: str, seed: int, path: Path, steps: int | None = None
) -> tuple[nn.Module, float]:
    """An epoch, or some steps of it; takes up what ``path`` holds.

    Returns:
        The model in evaluation mode, and CPU seconds.
    """
    batches = resnet20_cifar10.Batches(BATCH, seed)
    total = batches.per_epoch
    torch.manual_seed(seed)
    model = resnet20_cifar10.load() if setting.is_trained else resnet20_cifar10.ResNet20()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = attach(model, arm, total, seed)
    optimizer = torch.optim.SGD(
        model.parameters(), setting.rate, momentum=MOMENTUM, weight_decay=DECAY
    )
    first, spent = 0, 0.0
    if path.is_file():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if run is not None:
            run.load_state_dict(state["run"])
        first, spent = state["step"], state["seconds"]
    begun = time.process_time() - spent
    model.train()
    last = total if steps is None else steps
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = setting.rate * share(step, total)
        images, labels = batches[step]
        images = images.contiguous(memory_format=torch.channels_last)
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if run is not None:
            run.step()
        if (step + 1) % _SAVE_EVERY == 0 or step + 1 == last:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step + 1, "seconds": time.process_time() - begun}
            keep(path, state | {"run": run.state_dict() if run else None})
            print(f"{path.stem} {step + 1}/{total} loss {float(loss.detach()):.4f}", flush=True)
    return model.eval(), time.process_time() - begun


def differences(rows: list[dict[str, Any]], setting: str, arm: str, split: str) -> list[float]:
    """Score of an arm less that with dynamic ranges, by seed."""
    scores = {(r["arm"], r["seed"]): r[split] for r in rows if r["setting"] == setting}
    seeds = sorted(seed for name, seed in scores if name == arm and ("dynamic", seed) in scores)
    return [round(scores[arm, seed] - scores["dynamic", seed], 2) for seed in seeds]


def table(rows: list[dict[str, Any]]) -> str:
    """Scores and paired differences, then bytes moved, as markdown."""
    lines = [
        "Test accuracy in %, mean over seeds; differences to dynamic ranges of the same seed.",
        "",
        "| begins from | ranges | test | dev | test - dynamic | mean ± standard error | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for setting in SETTINGS:
        for arm in ARMS:
            found = [r for r in rows if (r["setting"], r["arm"]) == (setting, arm)]
            if not found:
                continue
            test, dev = (statistics.mean(r[split] for r in found) for split in ("test", "dev"))
            apart = differences(rows, setting, arm, "test") if arm != "dynamic" else []
            mean = f"{statistics.mean(apart):+.2f}" if apart else ""
            if len(apart) > 1:
                mean += f" ± {statistics.stdev(apart) / math.sqrt(len(apart)):.2f}"
            pairs = ", ".join(f"{d:+.2f}" for d in apart)
            lines.append(
                f"| {setting} | {arm} | {test:.2f} | {dev:.2f} | {pairs} | {mean} | {len(found)} |"
            )
    return "\n".join([*lines, "", *traffic_table()]) + "\n"


def traffic_table() -> list[str]:
    """Lines of a table of megabytes moved, with the factor over ranges in hindsight."""
    lines = [
        f"Megabytes moved in one step of ResNet-20 at {BITS} bits, with sums of 32 bits; in",
        "brackets, how many times as much as in hindsight. Results: activations and their",
        "gradients alone, without operands and the gradients of weights.",
        "",
        "| batch | ranges | forward | backward | both | of these results |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for batch in (1, BATCH):
        moved = movement(batch)
        for scheme, parts in moved.items():
            cells = [
                f"{count / 1e6:.2f} ({count / moved['hindsight'][part]:.2f})"
                for part, count in parts.items()
            ]
            lines.append(f"| {batch} | {scheme} | {' | '.join(cells)} |")
    return lines


def movement(batch: int) -> dict[str, dict[str, int]]:
    """Bytes that a step of ResNet-20 moves, by scheme and part."""
    layers = layers_of(resnet20_cifar10.ResNet20(), torch.zeros(1, 3, 32, 32))
    return {scheme: totals(layers, scheme, batch) for scheme in ("dynamic", "running", "hindsight")}


def main() -> None:
    """Train what the results lack, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)))
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "gradients"))
    parser.add_argument("--table", action="store_true", help="write the tables only")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    result = json.loads(given.json.read_text(encoding="utf-8")) if given.json.is_file() else {}
    rows = result.setdefault("rows", [])
    wanted = [(s, seed, arm) for s in given.settings for seed in given.seeds for arm in given.arms]
    for setting, seed, arm in wanted if not given.table else []:
        key = {"setting": setting, "arm": arm, "seed": seed}
        if any(key.items() <= row.items() for row in rows):
            continue
        path = given.work / f"{setting}-{seed}-{ARMS.index(arm)}.pt"
        model, seconds = train(SETTINGS[setting], arm, seed, path)
        scores = {s: resnet20_cifar10.evaluate(model, s) for s in ("dev", "test")}
        result["environment"] = describe()
        commit = result["environment"]["commit"]
        rows.append({**key, **scores, "cpu_seconds": round(seconds), "commit": commit})
        print(rows[-1], flush=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result["megabytes"] = {str(batch): movement(batch) for batch in (1, BATCH)}
    given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    given.json.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
