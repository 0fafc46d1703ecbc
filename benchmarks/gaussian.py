"""Bits for each weight above the rate-distortion bound, on sources whose bound is known.

``python -m benchmarks.gaussian`` codes matrices of independent normal numbers at about 1, 2, 3 and
4 bits for each weight, and counts every byte of every part, tables and scales included. The bound
is ``R(D) = log2(variance / D) / 2``; of a Laplacian source, Shannon's lower bound on it, which no
coder reaches at low rates. With a Gram matrix ``H`` of inputs the error is ``tr(E H E')``, and the
bound reverse water-filling over the eigenvalues of ``H``: those of a first-order autoregression
with 0.9, and of layers of MiniLM and ResNet-20 on training samples, with 1 % of the mean added to
the diagonal.

Every row is saved at once and not computed again. The table and the plot are made from the rows.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.calibration import samples
from benchmarks.environment import describe
from benchmarks.rounding import TASKS, replace_text
from dither.archive import code
from dither.core import Encoder, Stats
from dither.encoders import GPTQ, RateDistortion, Viterbi

RESULTS = Path(__file__).parent / "results" / "gaussian.json"
RATES = (1.0, 2.0, 3.0, 4.0)
SLOPE = 0.37
"""Lambda in squared steps of a trellis: the slope ``2 ln 2 D`` of its error D, 0.26 to 0.28."""

Make = Callable[[float], Encoder]


def _trellis(states: int) -> Make:
    return lambda step: Viterbi(step / 2, SLOPE, states, refit=True)


METHODS: Mapping[str, Make] = {
    "nearest": GPTQ,
    "nearest, refit": lambda step: GPTQ(step, refit=True),
    "rate-distortion rounding": RateDistortion,
    **{f"trellis, {states} states": _trellis(states) for states in (4, 8, 16, 64, 256)},
    "trellis, 8 states, errors alone": lambda step: Viterbi(step / 2),
}
FED: Mapping[str, Make] = {
    "nearest": GPTQ,
    "GPTQ": GPTQ,
    "GPTQ, rate": lambda step: GPTQ(step, strength=0.1155, refit=True),
    "GPTQ, trellis, 8 states": _trellis(8),
    "GPTQ, trellis, 64 states": _trellis(64),
}
SHAPES = ((1024, 1024), (256, 4096))
FED_ROWS = 256
GRAMS = {
    "MiniLM query": ("minilm_stsb", "encoder.layer.3.attention.self.query.weight"),
    "ResNet-20 conv": ("resnet20_cifar10", "layer2.1.conv1.weight"),
}
INPUTS = {"AR(1), 0.9": 256, "MiniLM query": 384, "ResNet-20 conv": 288}


def source(kind: str, shape: tuple[int, int]) -> Tensor:
    """Independent numbers of variance 1."""
    generator = torch.Generator().manual_seed(0)
    if kind == "gaussian":
        return torch.randn(shape, generator=generator)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    return (-uniform.sign() * (1 - 2 * uniform.abs()).log() / math.sqrt(2)).float()


def least_bits(kind: str, error: float, eigenvalues: Tensor | None = None) -> float:
    """The bound, in bits for each weight, at a mean error for each weight."""
    if eigenvalues is not None:
        low, high = 1e-30, float(eigenvalues.max())
        for _ in range(200):
            level = math.sqrt(low * high)
            is_above = float(eigenvalues.clamp(max=level).mean()) > error
            low, high = (low, level) if is_above else (level, high)
        return float((eigenvalues / level).log2().clamp(min=0).mean() / 2)
    # Shannon's lower bound: entropy of the source less that of normal noise of this variance.
    entropy = {
        "gaussian": math.log2(2 * math.pi * math.e) / 2,
        "laplacian": math.log2(math.sqrt(2) * math.e),
    }[kind]
    return max(entropy - math.log2(2 * math.pi * math.e * error) / 2, 0.0)


@cache
def gram_of(name: str) -> Tensor:
    """Second moments of inputs, float64, of mean diagonal 1."""
    if name == "AR(1), 0.9":
        place = torch.arange(INPUTS[name])
        return 0.9 ** (place[:, None] - place).abs().double()
    from dither.calibrate import collect

    task, weight = GRAMS[name]
    gram = collect(TASKS[task].load(), samples(task))[weight].gram
    assert gram is not None
    moments = gram.double()
    moments /= moments.diagonal().mean()
    moments.diagonal().add_(0.01)
    return moments / moments.diagonal().mean()


def measure(
    make: Make, step: float, weight: Tensor, gram: Tensor | None, *, fed: bool
) -> tuple[float, float]:
    """Bits and mean error for each weight."""
    stats = Stats(gram=gram.float()) if gram is not None and fed else None
    encoded = make(step).encode(weight, stats)
    error = (encoded.decode() - weight).double()
    felt = error if gram is None else error @ gram
    return 8 * code(encoded).nbytes / weight.numel(), float((error * felt).mean())


def row_of(
    make: Make, rate: float, kind: str, shape: tuple[int, int], gram_name: str | None, *, fed: bool
) -> dict[str, float]:
    """One point near a rate: the step is sought on a part of the rows."""
    gram = None if gram_name is None else gram_of(gram_name)
    weight = source(kind, shape)
    part = weight[: max(32, 65536 // shape[1])]
    step = 2.0 ** (2.05 - rate)
    for _ in range(3):  # a bit more for each halving, about
        bits, _ = measure(make, step, part, gram, fed=fed)
        step *= 2.0 ** max(min(bits - rate, 0.6), -0.6)
    start = time.monotonic()
    bits, error = measure(make, step, weight, gram, fed=fed)
    seconds = time.monotonic() - start
    eigenvalues = None if gram is None else torch.linalg.eigvalsh(gram)
    bound = least_bits(kind, error, eigenvalues)
    row = {"bits": bits, "error": error, "bound": bound, "gap": bits - bound, "step": step}
    return {name: round(value, 5) for name, value in row.items()} | {"seconds": round(seconds, 1)}


def cases() -> list[tuple[str, str, str, tuple[int, int], str | None, Make]]:
    """Title, method, kind of source, shape, Gram matrix and encoder, the important ones first."""
    found: list[tuple[str, str, str, tuple[int, int], str | None, Make]] = []
    for shape, kind in ((SHAPES[0], "gaussian"), (SHAPES[1], "gaussian"), (SHAPES[0], "laplacian")):
        for name, make in METHODS.items():
            if (shape, kind) == (SHAPES[0], "gaussian") or name.endswith(("nearest", " 8 states")):
                title = f"{kind} {shape[0]}x{shape[1]}"
                found.append((title, name, kind, shape, None, make))
    for gram, inputs in INPUTS.items():
        for name, make in FED.items():
            title = f"gaussian {FED_ROWS}x{inputs}, inputs {gram}"
            found.append((title, name, "gaussian", (FED_ROWS, inputs), gram, make))
    return found


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The gaps as Markdown, for each source one table."""
    lines = ["`python -m benchmarks.gaussian`: coded bits for each weight above the bound."]
    title = ""
    for key in rows:
        source_title, method, rate = key.split(" | ")
        if float(rate) != RATES[0]:
            continue
        if source_title != title:
            title = source_title
            heads = " | ".join(f"{r:g} bit{'s' if r > 1 else ''}" for r in RATES)
            lines += ["", f"**{title}**", "", f"| method | {heads} |"]
            lines += ["| --- |" + " --- |" * len(RATES)]
        found = [rows.get(f"{title} | {method} | {r:g}") for r in RATES]
        cells = " | ".join(f"{row['gap']:.3f}" if row else "" for row in found)
        lines.append(f"| {method} | {cells} |")
    return "\n".join(lines) + "\n"


def plot(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Gaps of the Gaussian source against bits, as PNG and SVG; lines differ without colour."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "dither", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    title = f"gaussian {SHAPES[0][0]}x{SHAPES[0][1]}"
    marks = "osD^v<>pX"
    for place, method in enumerate(METHODS):
        found = [rows[k] for r in RATES if (k := f"{title} | {method} | {r:g}") in rows]
        if found:
            grey = str(0.65 * place / len(METHODS))
            dashes = "-" if method.startswith("trellis") else "--"
            points = [row["bits"] for row in found], [row["gap"] for row in found]
            axes.plot(*points, dashes, marker=marks[place], color=grey, label=method, lw=1.2, ms=5)
    axes.axhline(0.1, color="0.5", lw=0.8, ls=":")
    axes.set(xlabel="coded bits for each weight", ylabel="bits above R(D)", ylim=(0, None))
    axes.set_title("Gaussian source: distance from the rate-distortion bound", fontsize=10)
    axes.legend(fontsize=7, frameon=False, ncols=2)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)


def save(results: dict[str, Any]) -> None:
    """The rows, with those that were saved meanwhile, in order, and their table."""
    if RESULTS.is_file():
        results["rows"] |= json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] | results["rows"]
    order = [f"{case[0]} | {case[1]} | {rate:g}" for case in cases() for rate in RATES]
    results["rows"] = {key: results["rows"][key] for key in order if key in results["rows"]}
    replace_text(RESULTS, json.dumps(results, indent=1) + "\n")
    replace_text(RESULTS.with_suffix(".md"), table(results["rows"]))


def main() -> None:
    """Measure what is missing in the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose title or method holds this text")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    results.setdefault("rows", {})
    results["environment"] = describe()
    for title, method, kind, shape, gram, make in cases():
        for rate in RATES:
            key = f"{title} | {method} | {rate:g}"
            if key in results["rows"] or given.only not in key:
                continue
            row = row_of(make, rate, kind, shape, gram, fed=method != "nearest")
            print(f"{key:60} {row['bits']:.3f} {row['gap']:.3f}", flush=True)
            results["rows"][key] = row
            save(results)
    save(results)
    plot(results["rows"], RESULTS)


if __name__ == "__main__":
    main()
