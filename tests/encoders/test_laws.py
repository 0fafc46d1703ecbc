"""Every encoder obeys the laws: those of the list below, and every format, which is one too."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import dither.encoders
from dither.core import Encoder, SpecError, Stats
from dither.encoders import (
    GPTQ,
    AdaRound,
    KMeans,
    Nearest,
    Ranges,
    RateDistortion,
    Rotated,
    SequentialMSE,
    SparseFactors,
    Viterbi,
)
from dither.formats import FORMATS, Affine, Codebook, Product
from dither.testing import awkward_weights, check_encoder, check_repr
from tests.formats.test_laws import FLOATS, FORMATS_TO_TEST, may_refuse, round_trip


def largest(weight: Tensor) -> float:
    return float(weight.abs().max()) if weight.numel() else 0.0


@dataclass(frozen=True)
class InSteps:
    """An encoder whose step is ``share`` of the largest weight, for ``rows`` less in later rows."""

    make: Callable[[float | Tensor], Encoder]
    share: float = 1 / 3
    rows: bool = False

    def __call__(self, weight: Tensor) -> Encoder:
        step = min(max(largest(weight) * self.share, 2.0**-126), 3e38) if largest(weight) else 1.0
        each = self.rows and weight.ndim and len(weight) > 1
        return self.make(step * torch.linspace(1, 0.5, len(weight)) if each else step)

    def __repr__(self) -> str:
        return f"{self.make(self.share)!r}{' by row' if self.rows else ''}"


CLUSTERED: list[Codebook | Product] = [
    Codebook(4),
    Codebook(16, dtype=torch.float32),
    Codebook(16, bucket=8, shift=True),
    Codebook(8, bucket=5),
    Product(4, points=16),
    Product(3, points=8, dtype=torch.float32),
    Product(2, points=300),
    Product(9, points=16, dtype=torch.int8),
]
ENCODERS: list[Encoder | InSteps] = [
    *FORMATS_TO_TEST,
    Nearest(Affine(4), step=0.25),
    InSteps(lambda step: Nearest(Affine(3, axis=0), float(step))),
    InSteps(lambda step: Nearest(Affine(None, group=5), float(step))),
    Ranges(Affine(3, group=8)),
    Ranges(Affine(4, axis=0, grid="asymmetric"), "percentile"),
    Ranges(Affine(2, grid="endpoint"), "minmax"),
    *(KMeans(fmt, iterations=3, backend=b) for fmt in CLUSTERED for b in ("torch", "auto")),
    KMeans(Codebook(8, bucket=8), start="kmeans++"),
    InSteps(GPTQ),
    InSteps(GPTQ, rows=True),
    InSteps(lambda step: GPTQ(step, 0.01, 0.1155, refit=True)),
    GPTQ(format=Affine(4, group=5, grid="asymmetric"), damping=0.01, ordered=True),
    GPTQ(format=Affine(1, axis=0, grid="endpoint"), damping=0.01, ordered=True),
    GPTQ(format=Affine(3, axis=0), damping=0.01, ranges="output"),
    InSteps(RateDistortion),
    InSteps(RateDistortion, rows=True),
    InSteps(lambda step: RateDistortion(step, 0.0), rows=True),
    AdaRound(Affine(3, axis=0), iterations=4),
    AdaRound(Affine(4, group=3, grid="asymmetric"), iterations=4),
    AdaRound(Affine(2, grid="endpoint"), iterations=4),
    InSteps(lambda step: AdaRound(Affine(None), float(step), iterations=4)),
    SequentialMSE(Affine(3)),
    SequentialMSE(Affine(2, axis=0, grid="asymmetric"), candidates=5),
    InSteps(Rotated, 0.1),
    InSteps(lambda step: Rotated(step, precision=0.02), rows=True),
    SparseFactors(1, 0.5, sweeps=2),
    SparseFactors(1, 1.0, left_bits=4, right_bits=8, sweeps=2),
    InSteps(Viterbi, 0.05),
    InSteps(lambda step: Viterbi(step, 0.4), rows=True),
    InSteps(lambda step: Viterbi(step, states=32)),
    InSteps(lambda step: Viterbi(step, 0.1, 4, 0.01, refit=True)),
]
FED = (GPTQ, AdaRound, SequentialMSE, Viterbi)
"""Encoders that read a Gram matrix; a single number has no inputs, and they refuse one for it."""


def gram(size: int) -> Tensor:
    """Second moments of random inputs that share a part."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * size, size, generator=generator)
    inputs += torch.randn(2 * size, 1, generator=generator)
    return inputs.T @ inputs / len(inputs) + 0.01 * torch.eye(size)


def test_every_public_encoder_is_in_the_list() -> None:
    made = {type(e(torch.ones(2)) if isinstance(e, InSteps) else e).__name__ for e in ENCODERS}
    assert made == {*dither.encoders.__all__, *(kind.__name__ for kind in FORMATS.values())}


@pytest.mark.parametrize("entry", ENCODERS, ids=repr)
def test_law_1(entry: Encoder | InSteps) -> None:
    if isinstance(entry, InSteps):
        entry = entry.make(entry.share)
    check_repr(entry)


def test_encoders_with_a_step_for_each_row_can_be_compared() -> None:
    steps, others = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])
    assert GPTQ(steps) == GPTQ(steps)
    assert hash(GPTQ(steps)) == hash(GPTQ(steps))
    assert len({GPTQ(steps), GPTQ(others), GPTQ(1.0), Viterbi(1.0), Viterbi(1.0)}) == 4
    assert GPTQ(1.0) != GPTQ(steps)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("entry", ENCODERS[len(FORMATS_TO_TEST) :], ids=repr)
def test_laws_on_awkward_weights(entry: Encoder | InSteps, dtype: torch.dtype) -> None:
    for weight in awkward_weights(dtype).values():
        encoder = entry(weight) if isinstance(entry, InSteps) else entry
        sizes = {max(math.prod(weight.shape[1:]), 1), 4} if isinstance(encoder, FED) else set()
        grams = [gram(size) for size in sizes if weight.ndim]
        for stats in (None, *(Stats(gram=each) for each in grams)):
            try:
                check_encoder(encoder, weight, stats, round_trip)
            except SpecError as error:
                if not may_refuse(weight, error):
                    raise
