"""Models that are elsewhere: on a pretend device, and on a GPU where there is one."""

import re

import pytest
import torch
from torch import Tensor

from dither import encoders
from dither.core import Encoder, Format, SpecError, Stats
from dither.formats import FORMATS, Affine, Codebook, Factors, Mixed, Product, Raw, Trellis
from dither.testing import awkward_weights, check_device, check_surrogate
from dither.train.method import Method
from tests.fake_device import pretend
from tests.train.layers import EXAMPLES

DEVICES = ["pretend", *(["cuda"] if torch.cuda.is_available() else [])]

FORMATS_TO_TEST = [
    Raw(),
    Raw(torch.float16),
    Affine(4, group=8),
    Affine(1),
    Affine(3, grid="asymmetric", axis=-1, scale_dtype=torch.float16),
    Affine(4, grid="endpoint"),
    Affine(None, axis=0),
    Codebook(16, bucket=8, shift=True),
    Product(4, points=16),
    Product(3, points=8, dtype=torch.int8),
    Mixed(3),
    Trellis(axis=0),
    Factors(),
]

ENCODERS: list[Encoder] = [
    encoders.AdaRound(Affine(3, axis=0), iterations=20),
    encoders.AdaRound(Affine(None), step=0.1, iterations=20),
    encoders.GPTQ(0.1, strength=0.1, refit=True),
    encoders.GPTQ(torch.full((12,), 0.1)),
    encoders.GPTQ(format=Affine(3, axis=0), ordered=True, ranges="output"),
    encoders.KMeans(Codebook(8)),
    encoders.KMeans(Codebook(8, bucket=8), start="kmeans++"),
    encoders.KMeans(Product(4, points=8), start="kmeans++", backend="torch"),
    encoders.Nearest(Affine(None), 0.1),
    encoders.Ranges(Affine(3, group=4)),
    encoders.Ranges(Affine(3), "percentile"),
    encoders.RateDistortion(0.1),
    encoders.Rotated(0.1),
    encoders.Rotated(0.1, basis=torch.eye(8)),
    encoders.SequentialMSE(Affine(3, axis=0)),
    encoders.Viterbi(0.1, strength=0.1, refit=True),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return pretend(monkeypatch) if request.param == "pretend" else torch.device(request.param)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def known_of(weight: Tensor) -> list[Stats | None]:
    """What data may say about a matrix."""
    inputs = normal(64, weight.shape[1])
    gram = inputs.T @ inputs / 64 + 0.1 * torch.eye(weight.shape[1])
    rows = torch.arange(1.0, len(weight) + 1)
    return [
        None,
        Stats(importance=weight.square() + 0.1),
        Stats(gram=gram, mean=inputs.mean(0), samples=64),
        Stats(gram=gram, cross=gram + 0.01 * torch.eye(len(gram))),
        Stats(counts=rows),
    ]


def test_the_lists_are_complete() -> None:
    assert {type(fmt) for fmt in FORMATS_TO_TEST} == set(FORMATS.values())
    known = {getattr(encoders, name) for name in encoders.__all__}
    assert {type(encoder) for encoder in ENCODERS} == known


@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda encoder: type(encoder).__name__)
def test_encoders_compute_on_the_cpu(encoder: Encoder, device: torch.device) -> None:
    weight = normal(12, 8)
    for stats in known_of(weight):
        check_device(encoder, weight, device, stats)


@pytest.mark.parametrize("fmt", FORMATS_TO_TEST, ids=repr)
def test_formats_compute_where_the_weight_is(fmt: Format, device: torch.device) -> None:
    for weight in awkward_weights().values():
        try:
            fmt.encode(weight)
        except SpecError as error:
            with pytest.raises(SpecError, match=re.escape(str(error))):
                fmt.encode(weight.to(device))
        else:
            check_device(fmt, weight, device)


@pytest.mark.parametrize("spec", [s for specs in EXAMPLES.values() for s in specs], ids=repr)
def test_training_runs_on_the_device(spec: Method, device: torch.device) -> None:
    weights = awkward_weights()
    for name in ("odd sizes", "kernel", "constant"):
        check_surrogate(spec, weights[name].to(device))
