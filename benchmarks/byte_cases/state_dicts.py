"""Odd state dicts, compressed without data to several sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import dither
from benchmarks.byte_cases.case import Case, drawn, saved

State = dict[str, Tensor]


def cases() -> Iterator[Case]:
    """Every state dict at every size of its own."""
    for build, sizes in _STATES:
        for size in (*sizes, "smallest", "near the smallest"):
            name = f"state/{build.__name__.strip('_')}/{str(size).replace(' ', '')}"
            yield Case(name, partial(_compressed, build, size))


def _compressed(build: Callable[[], State], size: int | str) -> bytes:
    if size in {"smallest", "near the smallest"}:
        size = _smallest(build()) + (8 if size != "smallest" else 0)
    return saved(dither.compress(build(), size))


def _smallest(state: State) -> int:
    """Bytes, as the refusal of an impossible size says."""
    try:
        return dither.compress(state, 1).nbytes
    except dither.BudgetError as error:
        return int(str(error).rpartition("ask for ")[2].split()[0])


def _empty() -> State:
    return {}


def _no_values() -> State:
    return {"none": torch.zeros(0), "rows": torch.zeros(0, 8), "columns": torch.zeros(8, 0)}


def _scalars() -> State:
    return {
        "temperature": torch.tensor(0.07),
        "half": torch.tensor(1.5, dtype=torch.float16),
        "count": torch.tensor(12345),
        "flag": torch.ones((), dtype=torch.bool),
    }


def _whole_numbers() -> State:
    dtypes = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
    found = {str(d)[6:]: (drawn(40, 7) * 9).abs().to(d) for d in dtypes}
    mask = torch.ones(32, 32, dtype=torch.bool).tril()
    return {**found, "mask": mask, "positions": torch.arange(512)[None], "w": drawn(64, 64)}


def _ties() -> State:
    shared, other = drawn(96, 24), drawn(24, 24, seed=1)
    return {"embed": shared, "head": shared, "a": other, "b": other, "view": drawn(9, 9).T}


def _not_finite() -> State:
    broken, infinite = drawn(32, 16), drawn(16, 16)
    broken[3, 4] = float("nan")
    infinite[0, 0] = float("-inf")
    return {"nan": broken, "inf": infinite, "plain": drawn(64, 64), "-0": torch.full((9,), -0.0)}


def _tiny() -> State:
    return {f"t{n}": drawn(*shape, seed=n) for n, shape in enumerate(_TINY_SHAPES)}


_TINY_SHAPES = ((1,), (2,), (1, 1), (3, 1), (1, 3), (2, 2, 2), (5,), (1, 1, 1, 1), (7, 3))


def _types() -> State:
    found: State = {}
    for n, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float64)):
        weight = (drawn(64, 48, seed=n) * 10.0 ** (n - 2)).to(dtype)
        found |= {f"{n}.weight": weight, f"{n}.bias": weight[:, 0].clone()}
    return found


def _extremes() -> State:
    outlier = drawn(64, 32)
    outlier[5, 5] = 1e4
    return {
        "outlier": outlier,
        "huge": drawn(32, 32) * 1e30,
        "small": drawn(32, 32) * 1e-30,
        "subnormal": torch.full((16, 16), 1e-42),
        "bf16": (drawn(32, 32) * 1e35).bfloat16(),
        "fp16": (drawn(32, 32) * 6e-8).half(),
    }


def _constant() -> State:
    return {
        "zeros": torch.zeros(64, 64),
        "ones": torch.ones(64),
        "third": torch.full((32, 16), 1 / 3),
        "signs": drawn(64, 64).sign(),
        "two": torch.where(drawn(48, 48) > 1, 0.25, -0.5),
        "grid": (drawn(64, 64) * 4).round() / 8,
        "sparse": drawn(64, 64) * (drawn(64, 64, seed=1) > 1.5),
    }


def _tables() -> State:
    """Rows that get rarer and longer, as tokens do, correlated columns, and a plain matrix."""
    rows = torch.arange(1, 1501).float()[:, None]
    tokens = drawn(1500, 12) @ drawn(12, 32, seed=1) * rows.log1p()
    return {
        "embeddings.word_embeddings.weight": 0.02 * (tokens + drawn(1500, 32, seed=2)),
        "embeddings.position_embeddings.weight": (rows[:200] / 50 * drawn(1, 32, seed=3)).sin(),
        "encoder.weight": drawn(32, 32, seed=4),
        "encoder.norm.weight": 1 + 0.1 * drawn(32, seed=5),
        "encoder.norm.bias": 0.1 * drawn(32, seed=6),
    }


def _rows() -> State:
    scales = torch.logspace(-3, 1, 96)
    return {
        "by_row": drawn(96, 40) * scales[:, None],
        "by_column": drawn(40, 96, seed=1) * scales,
        "long": drawn(3, 2000, seed=2),
        "tall": drawn(2000, 3, seed=3),
    }


def _kernels() -> State:
    return {
        "conv1d.weight": drawn(16, 8, 5),
        "conv2d.weight": drawn(16, 8, 3, 3, seed=1),
        "depthwise.weight": drawn(32, 1, 3, 3, seed=2),
        "conv3d.weight": drawn(8, 4, 3, 3, 3, seed=3),
        "experts": drawn(4, 16, 24, seed=4),
        "strided": drawn(24, 16, 3, seed=5).transpose(0, 1),
        "bn.running_mean": drawn(16, seed=6),
        "bn.running_var": drawn(16, seed=7).square() + 0.01,
        "bn.num_batches_tracked": torch.tensor(100),
    }


def _heavy_tails() -> State:
    laplace = (
        drawn(128, 128).sign()
        * -torch.rand(128, 128, generator=torch.Generator().manual_seed(1)).clamp(1e-6).log()
    )
    return {"laplace": laplace, "cubed": drawn(128, 128) ** 3, "uniform": drawn(128, 128).erf()}


_STATES: tuple[tuple[Callable[[], State], tuple[int | str, ...]], ...] = (
    (_empty, (1000,)),
    (_no_values, (1000,)),
    (_scalars, (1000, "90%")),
    (_whole_numbers, ("60%", "4x")),
    (_ties, ("50%", "8x", "3 bits")),
    (_not_finite, ("60%", "30%")),
    (_tiny, ("300%", 700)),
    (_types, ("50%", "6x", "2 bits")),
    (_extremes, ("50%", "20%")),
    (_constant, ("50%", "10%", "3%")),
    (_tables, ("50%", "8x", "16x", "1.5 bits")),
    (_rows, ("8x", "2 bits")),
    (_kernels, ("50%", "8x", "16x")),
    (_heavy_tails, ("4x", "8x", "1 bits")),
)
