"""Every encoder and format once, directly, on fixed weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.byte_cases.case import Case, drawn, short, written
from dither.core import Encoded, Encoder, SpecError, Stats
from dither.encoders import (
    GPTQ,
    AdaRound,
    KMeans,
    Nearest,
    Ranges,
    RateDistortion,
    Rotated,
    SequentialMSE,
    Viterbi,
)
from dither.formats import Affine, Codebook, Factors, Mixed, Product, Raw, Trellis


def cases() -> Iterator[Case]:
    """One for each encoder: all weights that it takes, with and without statistics, in one file."""
    for encoder in _ENCODERS:
        yield Case(f"encoder/{short(encoder)}", partial(_file, encoder))
    steps = torch.linspace(0.2, 0.6, 24)
    for kind in (GPTQ, RateDistortion, Rotated, Viterbi):
        yield Case(f"encoder/{kind.__name__}(step for each row)", partial(_file, kind(steps)))


def _file(encoder: Encoder) -> bytes:
    found: dict[str, Encoded] = {}
    for name, weight in _weights().items():
        for kind, stats in _stats(weight).items():
            try:
                found[f"{name}.{kind}"] = encoder.encode(weight, stats)
            except SpecError:
                continue  # it does not take this weight
    if not found:
        raise AssertionError(f"{encoder!r} takes none of the weights")
    return written(found)


def _weights() -> dict[str, Tensor]:
    rough = drawn(24, 36, seed=3) ** 3
    rough[0] = 0
    return {
        "matrix": drawn(24, 32),
        "odd": drawn(24, 37, seed=1),
        "kernel": drawn(24, 4, 3, 3, seed=2),
        "rough": rough,
        "bf16": drawn(24, 32, seed=4).bfloat16(),
        "vector": drawn(24, seed=5),
        "tall": drawn(400, 4, seed=6) @ drawn(4, 16, seed=7) + 0.01 * drawn(400, 16, seed=8),
    }


def _stats(weight: Tensor) -> dict[str, Stats | None]:
    if weight.ndim < 2:
        return {"plain": None}
    inputs = weight[0].numel()
    mixing = 0.5 * torch.eye(inputs) + 0.1 * drawn(inputs, inputs, seed=9)
    vectors = drawn(200, inputs, seed=10) @ mixing + 0.3
    gram = vectors.T @ vectors
    noisy = vectors + 0.1 * drawn(200, inputs, seed=11)
    return {
        "plain": None,
        "importance": Stats(importance=drawn(*weight.shape, seed=12).square()),
        "gram": Stats(gram=gram, mean=vectors.mean(0), samples=200),
        "cross": Stats(gram=noisy.T @ noisy, cross=noisy.T @ vectors, samples=200),
        "counts": Stats(counts=torch.arange(len(weight)).flip(0) // 3),
    }


_FINE = Affine(None)

_ENCODERS: tuple[Encoder, ...] = (
    Raw(),
    Raw(torch.float16),
    Affine(8),
    Affine(1),
    Affine(4, axis=0),
    Affine(3, group=8, scale_dtype=torch.bfloat16),
    Affine(4, grid="asymmetric"),
    Affine(5, axis=0, grid="endpoint"),
    Affine(None),
    Codebook(16),
    Codebook(5, bucket=16, shift=True),
    Product(4, 16),
    Product(8, 8, dtype=torch.float32),
    Mixed(8),
    Mixed(64, grid="symmetric"),
    Trellis(),
    Trellis(64, axis=0),
    Factors(),
    Factors(axis=0),
    AdaRound(Affine(4), iterations=60),
    AdaRound(Affine(3, axis=0), iterations=60),
    AdaRound(_FINE, step=0.4, iterations=60),
    GPTQ(0.4),
    GPTQ(0.4, damping=0.05, strength=0.1),
    GPTQ(0.4, refit=True),
    GPTQ(format=Affine(4)),
    GPTQ(format=Affine(3, axis=0), ranges="minmax", damping=0.01),
    GPTQ(format=Affine(4, group=4, grid="asymmetric"), ordered=True, damping=0.01),
    KMeans(Codebook(16)),
    KMeans(Codebook(8, bucket=64, shift=True), start="kmeans++"),
    KMeans(Codebook(16), backend="torch"),
    KMeans(Product(4, 32), backend="torch", seed=3),
    KMeans(Product(4, 16)),
    Nearest(_FINE, 0.3),
    Nearest(Affine(3), 0.3),
    Ranges(Affine(4)),
    Ranges(Affine(4, axis=0, grid="asymmetric")),
    Ranges(Affine(3), "percentile", percentile=99.0),
    Ranges(Affine(3, group=8), "minmax"),
    RateDistortion(0.5),
    RateDistortion(0.5, strength=0.0),
    Rotated(0.3),
    Rotated(0.3, precision=0.01),
    SequentialMSE(Affine(4)),
    SequentialMSE(Affine(3, axis=0, grid="asymmetric"), candidates=8),
    Viterbi(0.25),
    Viterbi(0.25, strength=0.1, states=4),
    Viterbi(0.25, damping=0.05, refit=True, states=16),
)
