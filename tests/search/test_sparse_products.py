"""Sparse factors are stored where they take fewer bytes, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dither
from dither.formats import Affine, Factors
from dither.search import Offering, SparseProducts, data_free

OFFERED = Offering(SparseProducts())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(rows: int, columns: int, rank: int, noise: float, *, density: float = 1.0) -> Tensor:
    right = normal(rank, columns, seed=1)
    right = right * (
        torch.rand(rank, columns, generator=torch.Generator().manual_seed(2)) < density
    )
    made: Tensor = normal(rows, rank) @ right / rank**0.5
    return made + noise * normal(rows, columns, seed=3)


def lost(archive: dither.Archive, weights: dict[str, Tensor]) -> float:
    return sum(float((archive[name] - value).square().sum()) for name, value in weights.items())


@pytest.mark.parametrize("shape", [(96, 200), (200, 96), (64, 16, 3, 3)])
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_a_product_is_stored_as_one(shape: tuple[int, ...], density: float) -> None:
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    factored = product(rows, columns, 6, 0.02, density=density).reshape(shape)
    weights = {"factored": factored, "full": normal(80, 120, seed=5) * 0.3}
    size = 4 * (factored.numel() + weights["full"].numel()) // 14
    plain = dither.compress(weights, size)
    offered = dither.compress(weights, size, sensitivity=OFFERED)
    assert offered.nbytes <= size
    assert isinstance(offered.encoded("factored").format, Factors)
    assert isinstance(offered.encoded("full").format, Affine)
    assert lost(offered, weights) < 0.6 * lost(plain, weights)


@pytest.mark.parametrize("size", ["8x", "16x", "32x"])
def test_where_grids_take_fewer_bytes_nothing_changes(size: str) -> None:
    weights = {"w": normal(96, 128), "k": normal(32, 16, 3, 3, seed=1), "b": normal(96, seed=2)}
    plain, offered = (dither.compress(weights, size, sensitivity=s) for s in (data_free, OFFERED))
    assert all(torch.equal(plain[name], offered[name]) for name in weights)


def test_what_is_proposed_is_what_is_coded() -> None:
    known = OFFERED({"w": product(64, 96, 4, 0.05)})["w"]
    found = list(SparseProducts().propose(known))
    assert len(found) >= 4
    for choice in found:
        encoded = choice.encode(known)
        error = float((encoded.decode() - known.value).double().square().sum())
        energy = float(known.value.double().square().sum())
        assert choice.loss == pytest.approx(
            known.sensitivity * error / (1 - (error / energy) ** 4), rel=1e-4
        )


@pytest.mark.parametrize(
    "value", [normal(64), normal(8, 8), torch.zeros(80, 80), torch.full((80, 80), torch.nan)]
)
def test_tensors_for_which_there_is_no_product(value: Tensor) -> None:
    known = OFFERED({"w": value})["w"]
    assert not list(SparseProducts().propose(known))
