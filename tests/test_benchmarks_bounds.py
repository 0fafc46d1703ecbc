"""The bounds and tables of the benchmarks of rounding: against closed forms, and on small cases."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.gaussian import METHODS, RATES, least_bits, row_of, source, table
from benchmarks.rounding import encoders, weights_of
from benchmarks.rounding import table as rounding_table


@pytest.mark.parametrize("kind", ["gaussian", "laplacian"])
def test_sources_have_variance_one(kind: str) -> None:
    values = source(kind, (500, 400)).double()
    assert math.isclose(float(values.square().mean()), 1, abs_tol=0.02)
    assert abs(float(values.mean())) < 0.01
    fourth = {"gaussian": 3.0, "laplacian": 6.0}[kind]
    assert math.isclose(float((values**4).mean()), fourth, rel_tol=0.06)


def test_the_bound_of_a_gaussian_source() -> None:
    assert math.isclose(least_bits("gaussian", 1 / 16), 2.0)
    assert least_bits("gaussian", 1.5) == 0
    # Shannon's lower bound is that much below the Gaussian source's: their entropies differ.
    differ = 0.5 * math.log2(2 * math.pi * math.e) - math.log2(math.sqrt(2) * math.e)
    assert math.isclose(least_bits("laplacian", 0.01), least_bits("gaussian", 0.01) - differ)


def test_reverse_water_filling() -> None:
    even = torch.full((8,), 2.0, dtype=torch.float64)
    assert math.isclose(least_bits("gaussian", 0.125, even), 2.0)
    # Water at 1: the small eigenvalue takes no bits and is lost whole.
    uneven = torch.tensor([16.0, 4.0, 0.5], dtype=torch.float64)
    assert math.isclose(least_bits("gaussian", 2.5 / 3, uneven), (2 + 1 + 0) / 3, rel_tol=1e-9)


@pytest.mark.parametrize("gram", [None, "AR(1), 0.9"])
def test_rows_lie_above_the_bound_and_near_the_rate(gram: str | None) -> None:
    shape = (64, 256)
    gaps = {}
    for name in ("nearest", "trellis, 8 states"):
        row = row_of(METHODS[name], 2.0, "gaussian", shape, gram, fed=name != "nearest")
        assert abs(row["bits"] - 2) < 0.1
        assert math.isclose(row["gap"], row["bits"] - row["bound"], abs_tol=1e-4)
        gaps[name] = row["gap"]
    assert 0 < gaps["trellis, 8 states"] < gaps["nearest"] - 0.1


def test_tables_hold_every_row() -> None:
    rows = {f"gaussian 4x4 | nearest | {rate:g}": {"gap": rate / 10} for rate in RATES}
    assert "| nearest | 0.100 | 0.200 | 0.300 | 0.400 |" in table(rows)
    scores = {"fp32": {"dev": 90.0, "test": 80.0, "error": 0.0}}
    for bits in (4, 2):
        for name in encoders("resnet20_cifar10", bits):
            scores[f"{bits} bits, parallel, {name}"] = {
                "dev": 10.0 * bits,
                "test": 1.0,
                "error": 0.1 / bits,
            }
    text = rounding_table({"environment": {}, "resnet20_cifar10": scores})
    assert "fp32: 90.00 / 80.00" in text
    assert "| parallel | GPTQ, mse | 40.00 / 1.00 (2.50) |  | 20.00 / 1.00 (5.00) |" in text
    assert "sequence" not in text


def test_all_convolutions_and_linear_layers_are_rounded() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Linear(2, 2)
    )
    assert weights_of("resnet20_cifar10", model) == ["0.weight", "2.weight"]
    assert weights_of("minilm_stsb", model) == []
