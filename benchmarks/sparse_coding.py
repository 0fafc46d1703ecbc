"""What the coder makes of sparse matrices: coded bytes against those of an ideal code.

``python -m benchmarks.sparse_coding`` codes matrices of 95 % zeros whose rows and columns are
equally full, of uneven density, or mostly empty, and ResNet-20's kernels pruned by magnitude. Two
bounds: of drawn matrices what a code takes that knows the chance of a value other than 0 in each
place and the values' frequencies, which no file says; and of all, the shortest description with
densities of rows, of columns, of both or of neither, each density and frequency at half a logarithm
of how many places it was counted in (Rissanen 1983).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import describe
from benchmarks.tasks import resnet20_cifar10
from dither import Affine
from dither.archive import code

RESULTS = Path(__file__).parent / "results"
SHAPES = ((64, 576), (512, 512), (1536, 384))
DENSITY = 0.05
BLOCK = 4


def chances(kind: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """The chance of a value other than 0 in each place, 5 % on the average."""
    high, wide = torch.ones(rows), torch.ones(columns)
    if kind == "uneven":
        high = torch.randn(rows, generator=generator).exp()
        wide = torch.randn(columns, generator=generator).exp()
    if kind in {"empty rows", "empty rows and columns"}:
        high = (torch.rand(rows, generator=generator) < 0.25).float()
    if kind == "empty rows and columns":
        wide = (torch.rand(columns, generator=generator) < 0.5).float()
    full = high[:, None] * wide
    if kind == "blocks":  # whole kernels of a 2 x 2 convolution
        full = torch.rand(rows, columns // BLOCK, generator=generator) < 2 * DENSITY
        full = full.float().repeat_interleave(BLOCK, 1)
    for _ in range(30):
        full = (full * DENSITY / full.mean()).clamp(max=0.95)
    return full


def value_bits(codes: Tensor) -> tuple[float, float]:
    """Of values that are not 0 by their frequencies, and of describing these."""
    counts = codes[codes != 0].unique(return_counts=True)[1].double()
    total = float(counts.sum())
    return -float((counts * (counts / total).log2()).sum()), len(counts) * math.log2(total) / 2


def place_bits(used: Tensor, chance: Tensor) -> float:
    """Of which places are not 0, where each has a chance."""
    likely = torch.where(used, chance, 1 - chance).double().clamp(min=1e-12)
    return -float(likely.log2().sum())


def described_bits(codes: Tensor) -> float:
    """The shortest description with densities of rows, columns, both or neither."""
    used = codes.flatten(1) != 0
    full = used.double()
    density = full.mean()
    high = full.mean(1, keepdim=True)
    kernel = math.prod(codes.shape[2:])
    wide = full.mean(0).reshape(codes.shape[1], kernel).mean(1).repeat_interleave(kernel)[None]
    rows = len(full) * math.log2(full.shape[1]) / 2
    columns = codes.shape[1] * math.log2(len(full) * kernel) / 2
    both = (high * wide / density).clamp(max=1 - 1e-9)
    least = min(
        place_bits(used, density.expand_as(full)),
        place_bits(used, high.expand_as(full)) + rows,
        place_bits(used, wide.expand_as(full)) + columns,
        place_bits(used, both) + rows + columns,
    )
    return least + sum(value_bits(codes))


def row_of(name: str, codes: Tensor, chance: Tensor | None = None) -> dict[str, Any]:
    """Coded bytes of a matrix of integers, and both bounds."""
    grid = Affine(None).assign(codes.float(), {"scale": torch.ones(1)})
    zeros = float((codes == 0).float().mean())
    nbytes, described = code(grid).nbytes, described_bits(codes) / 8
    made: dict[str, Any] = {"matrix": name, "shape": list(codes.shape)}
    made |= {"zeros": round(100 * zeros, 1), "bytes": nbytes, "described": round(described)}
    made["more"] = round(100 * (nbytes / described - 1), 1)
    if chance is not None:
        known = place_bits(codes != 0, chance) + value_bits(codes)[0]
        made["known"] = round(known / 8)
    print(json.dumps(made), flush=True)
    return made


def drawn(seed: int) -> list[dict[str, Any]]:
    """Synthetic matrices with Laplacian values."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for kind in ("even", "uneven", "empty rows", "empty rows and columns", "blocks"):
        for rows, columns in SHAPES:
            chance = chances(kind, rows, columns, generator)
            used = torch.rand(rows, columns, generator=generator) < chance
            size = (1 - torch.rand(rows, columns, generator=generator)).log().neg().ceil()
            sign = torch.randn(rows, columns, generator=generator).sign()
            made.append(row_of(kind, (used * size * sign).int(), chance))
    return made


def kernels(share: float) -> list[dict[str, Any]]:
    """ResNet-20's, of which the smallest are pruned, all together, and the rest is rounded."""
    state = resnet20_cifar10.load().state_dict()
    wanted = {n: v for n, v in state.items() if v.ndim > 1 and v.numel() > 1 << 13}
    edge = torch.cat([v.abs().flatten() for v in wanted.values()]).quantile(share)
    made = []
    for name, value in wanted.items():
        kept = value * (value.abs() >= edge)
        codes = (kept / (edge / 2)).round().int()
        made.append(row_of(f"ResNet-20 {name} {share}", codes))
    whole = {key: sum(row[key] for row in made) for key in ("bytes", "described")}
    more = round(100 * (whole["bytes"] / whole["described"] - 1), 1)
    made.append({"matrix": f"ResNet-20, all of these, {share}"} | whole | {"more": more})
    return made


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=RESULTS / "sparse_coding.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [*drawn(0), *kernels(0.9), *kernels(0.95)]
    result = {"environment": describe(), "rows": rows}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
