"""Rotated: the laws, what it gains and at which cost, and when a plain grid stands in."""

import math

import pytest
import torch
from torch import Tensor

from dither.archive import code, pack
from dither.core import Encoded, SpecError, Stats
from dither.encoders.gptq import GPTQ
from dither.encoders.rotated import Rotated, basis_step, principal_axes
from dither.formats import Affine, Factors
from dither.testing import check_idempotent

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def table(rows: int = 6000, columns: int = 32) -> Tensor:
    """Columns that are mixtures of others of falling size."""
    basis: Tensor = torch.linalg.qr(normal(columns, columns, seed=1))[0]
    return (normal(rows, columns) * torch.linspace(0, -4, columns).exp2()) @ basis


def error(encoded: Encoded, weight: Tensor) -> float:
    return float((encoded.decode() - weight).double().square().sum())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("step", [0.01, 0.2, 3.0])
def test_laws_on_tables(dtype: torch.dtype, step: float) -> None:
    weight = table(300, 16).to(dtype)
    encoded = Rotated(torch.linspace(step, 2 * step, 300)).encode(weight)
    check_idempotent(encoded)
    back = pack({"w": encoded}).encoded("w")
    assert torch.equal(back.decode(), encoded.decode())
    assert isinstance(encoded.format, Factors)


def test_it_takes_fewer_bytes_at_the_same_error() -> None:
    weight = table()
    plain, rotated = GPTQ(0.3).encode(weight), Rotated(0.3).encode(weight)
    assert isinstance(rotated.format, Factors)
    assert error(rotated, weight) < 1.02 * error(plain, weight)
    assert code(rotated).nbytes < 0.8 * code(plain).nbytes


@pytest.mark.parametrize("step", [0.1, 0.3, 1.0])
def test_the_rule_for_the_basis_is_near_the_best(step: float) -> None:
    weight = table()

    def loss(precision: float | None) -> float:
        encoded = Rotated(step, precision=precision).encode(weight)
        # Bytes at equal error: six decibels are a bit.
        bits = weight.numel() * math.log2(error(encoded, weight)) / 2
        return code(encoded).nbytes + bits / 8

    assert loss(None) < 1.004 * min(loss(2.0**-k) for k in range(2, 12))
    assert error(Rotated(step).encode(weight), weight) < 1.02 * error(
        Rotated(step, precision=2.0**-11).encode(weight), weight
    )


def test_axes_without_codes_are_left_out() -> None:
    weight = table()
    ranks = [Rotated(s).encode(weight).codes["left"].values.shape[1] for s in (0.3, 3.0, 1e3)]
    assert 32 == ranks[0] > ranks[1] > ranks[2] == 0
    assert not Rotated(1e3).encode(weight).decode().any()


def test_rows_have_steps_of_their_own() -> None:
    weight = table()
    steps = torch.where(torch.arange(6000) < 1000, 0.125, 0.5)
    encoded = Rotated(steps).encode(weight)
    assert encoded.params["scale"].dtype == torch.bfloat16
    found = (encoded.decode() - weight).square().mean(1)
    for part, step in ((found[:1000], 0.125), (found[1000:], 0.5)):
        assert float(part.mean()) == pytest.approx(step**2 / 12, rel=0.35)


def test_axes_are_orthonormal_and_sorted() -> None:
    weight = table(500, 8)
    axes = principal_axes(weight)
    torch.testing.assert_close(axes.T @ axes, torch.eye(8), atol=1e-5, rtol=0)
    assert bool(((weight @ axes).var(0).diff() < 0).all())
    first = principal_axes(weight, (torch.arange(500) < 1).double())[:, 0]
    cosine = float((weight[0] @ first).abs() / weight[0].norm())
    assert cosine == pytest.approx(1, abs=1e-4)


def test_counts_and_importance_turn_the_basis() -> None:
    weight = torch.cat([normal(300, 2) * torch.tensor([9.0, 1]), normal(300, 2).mul(3)])
    seen = torch.where(torch.arange(600) < 300, 0, 10_000)
    plain = Rotated(1.0).encode(weight)
    for stats in (Stats(counts=seen), Stats(importance=seen[:, None].float())):
        assert not torch.equal(Rotated(1.0).encode(weight, stats).decode(), plain.decode())
    with pytest.raises(SpecError, match="counts of shape"):
        Rotated(1.0).encode(weight, Stats(counts=seen[:5]))


@pytest.mark.parametrize("weight", [normal(8, 8), normal(5), normal(4, 9), torch.zeros(0, 3)])
def test_without_more_rows_than_columns_the_grid_is_plain(weight: Tensor) -> None:
    assert isinstance(Rotated(0.25).encode(weight).format, Affine)


def test_what_is_refused() -> None:
    for weight in (table().fill_(math.nan), torch.full((9, 2), math.inf)):
        with pytest.raises(SpecError, match="not finite"):
            Rotated(0.1).encode(weight)
    with pytest.raises(SpecError, match="basis of shape"):
        Rotated(0.1, normal(5, 5)).encode(normal(20, 4))
    with pytest.raises(SpecError, match="Raw"):
        Rotated(0.1).encode(torch.arange(40).reshape(20, 2))


def test_zeros_and_constants() -> None:
    for value in (torch.zeros(50, 4), torch.full((50, 4), 0.3)):
        encoded = Rotated(0.01).encode(value)
        assert float((encoded.decode() - value).abs().max()) < 0.01
        check_idempotent(encoded)


def test_the_rule_for_the_basis() -> None:
    assert basis_step(torch.ones(2, 1), 1.0) == 0.5
    assert basis_step(torch.ones(50, 16), 1 / 12) == 0.125
    assert basis_step(torch.ones(50, 0), 1.0) == 1
    assert basis_step(torch.ones(50, 16), 0.0) == basis_step(torch.ones(50, 16), 1e-30) == 2.0**-18
