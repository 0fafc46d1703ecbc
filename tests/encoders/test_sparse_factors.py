"""Sparse quantized factors: the special cases are what others find, and nothing rises."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from dither.core import SpecError, Stats
from dither.encoders import SparseFactors
from dither.encoders.lloyd import spread_start
from dither.formats import Factors


def matrix(rows: int = 24, columns: int = 40, rank: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator)
    right = torch.randn(rank, columns, generator=generator)
    return left @ right + 0.3 * torch.randn(rows, columns, generator=generator)


def gram(columns: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(200, columns, generator=generator) * torch.linspace(0.1, 3, columns)
    return inputs.T @ inputs / 200


def error(encoded: Tensor, weight: Tensor) -> float:
    return float((encoded - weight).double().square().sum())


@pytest.mark.parametrize("stats", [None, Stats(gram=gram())])
@pytest.mark.parametrize("density", [0.2, 0.6, 1.0])
def test_the_objective_never_rises(density: float, stats: Stats | None) -> None:
    found = SparseFactors(8, density, 6, 4).objectives(matrix(), stats)
    for held in (False, True):
        values = [value for is_held, value in found if is_held == held]
        assert len(values) >= 1
        assert all(after <= before for before, after in pairwise(values))


def test_without_grids_and_zeros_it_is_the_truncated_svd() -> None:
    weight = matrix()
    decoded = SparseFactors(4, 1.0, 16, 16).encode(weight).decode()
    least = float(torch.linalg.svdvals(weight.double())[4:].square().sum())
    assert error(decoded, weight) == pytest.approx(least, rel=1e-4)


def test_no_worse_than_sparse_principal_components() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    weight = matrix()
    wanted = decomposition.SparsePCA(6, alpha=2.0, ridge_alpha=0.0, random_state=0, max_iter=300)
    centred = weight - weight.mean(0)
    codes = wanted.fit_transform(centred.numpy())
    density = float((wanted.components_ != 0).mean())
    assert 0.2 < density < 0.95
    # The same support, and the best factor for it: least squares for the codes.
    codes = np.linalg.lstsq(wanted.components_.T, centred.numpy().T, rcond=None)[0].T
    theirs = error(torch.from_numpy(codes @ wanted.components_), centred)
    ours = error(SparseFactors(6, density, 16, 16, sweeps=200).encode(centred).decode(), centred)
    assert ours <= theirs


def test_with_one_hot_columns_it_is_k_means() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    weight = matrix(24, 200, rank=3, seed=3)
    columns = (weight.double() / weight.abs().max()).T.contiguous()
    start = spread_start(columns, 12, None, torch.Generator().manual_seed(0)).numpy()
    theirs = cluster.KMeans(12, init=start, n_init=1, max_iter=200, tol=0.0).fit(columns.numpy())
    encoded = SparseFactors(12, left_bits=16, sweeps=200, one_hot=True).encode(weight)
    right = encoded.codes["right"].values.int() - int(encoded.codes["zero"].values[1])
    assert bool((right.sum(0) == 1).all())
    assert bool((right.amax(0) == 1).all())
    ours = error(encoded.decode(), weight) / float(weight.abs().max()) ** 2
    assert ours == pytest.approx(theirs.inertia_, rel=1e-4)


@pytest.mark.parametrize("density", [0.1, 0.3])
def test_no_worse_than_zeros_however_coarse_the_grids(density: float) -> None:
    for seed in (0, 1):
        weight = torch.randn(96, 48, generator=torch.Generator().manual_seed(seed))
        decoded = SparseFactors(48, density, 2, 2, sweeps=3).encode(weight).decode()
        assert error(decoded, weight) < float(weight.double().square().sum())


def test_as_many_zeros_as_asked_for_and_values_on_the_grid() -> None:
    encoded = SparseFactors(8, 0.3, 6, 4).encode(matrix())
    assert isinstance(encoded.format, Factors)
    zero = encoded.codes["zero"].values
    left, right = (
        encoded.codes[n].values.int() - int(zero[i]) for i, n in enumerate(("left", "right"))
    )
    assert int((right != 0).sum()) <= 0.3 * 8 * 40
    assert int(left.abs().max()) <= 31
    assert int(right.abs().max()) <= 7


def test_a_gram_matrix_moves_the_error_to_where_it_costs_less() -> None:
    weight, moments = matrix(), gram()
    plain, led = (
        SparseFactors(5, 0.5).encode(weight, s).decode() for s in (None, Stats(gram=moments))
    )

    def loss(decoded: Tensor) -> float:
        difference = (decoded - weight).double()
        return float(((difference @ moments.double()) * difference).sum())

    assert loss(led) < 0.9 * loss(plain)


def test_refusals() -> None:
    with pytest.raises(SpecError, match="share above 0 to 1"):
        SparseFactors(3, 0.0)
    with pytest.raises(SpecError, match="NaN or infinite"):
        SparseFactors(1).encode(torch.tensor([[1.0, torch.nan]]))
