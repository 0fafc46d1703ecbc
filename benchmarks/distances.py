"""How far outputs are from fp32's: it moves where scores stand still by chance."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dither
from benchmarks.calibrated import samples_of

OTHER = 1_000
"""Added to a seed for samples that no file was fitted to."""


@torch.no_grad()
def distance(model: nn.Module, original: nn.Module, data: dither.Data) -> float:
    """Mean distance of outputs."""
    each = [data.distance(data.output(model, b), data.output(original, b)) for b in data]
    return sum(map(float, each)) / len(each)


def of_file(task: str, path: Path, seed: int = 0) -> float:
    """That of a file, of a task whose checkpoint is published, on samples it was not fitted to."""
    module: Any = importlib.import_module(f"benchmarks.tasks.{task}")
    model = module.load()
    dither.load_into(model, path)
    return distance(model, module.load(), samples_of(task, seed + OTHER))
