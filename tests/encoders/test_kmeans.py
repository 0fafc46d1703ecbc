"""k-means: never worse than its start, exact in one dimension, weighted, and without duplicates."""

import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.archive import Archive, pack
from dither.core import Encoded, SpecError, Stats
from dither.encoders import KMeans
from dither.encoders.importance import weighted_error
from dither.encoders.lloyd import SortedValues, lloyd_scalar, lloyd_vectors, spread_start
from dither.formats import Affine, Codebook, Product
from dither.formats.matching import least_index

FORMATS = [
    Codebook(4),
    Codebook(16, dtype=torch.float32),
    Codebook(16, bucket=8, shift=True),
    Codebook(8, bucket=5),
    Product(4, points=16),
    Product(3, points=8, dtype=torch.float32),
    Product(2, points=300),
    Product(9, points=16, dtype=torch.int8),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def round_trip(encoded: Encoded) -> Encoded:
    return Archive.from_bytes(pack({"weight": encoded}).to_bytes()).encoded("weight")


@pytest.mark.parametrize("start", ["quantile", "kmeans++"])
@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_never_worse_than_the_start_and_better_on_real_spreads(
    fmt: Codebook | Product, start: str
) -> None:
    weight = normal(48, 40) * 0.02
    first = weighted_error(weight, fmt.encode(weight).decode())
    found = KMeans(fmt, start=start).encode(weight)
    assert weighted_error(weight, found.decode()) < first
    stats = Stats(importance=torch.rand(48, 40, generator=torch.Generator().manual_seed(1)) ** 4)
    weighted = KMeans(fmt, start=start).encode(weight, stats)
    errors = [weighted_error(weight, e.decode(), stats.importance) for e in (weighted, found)]
    if start == "quantile":  # the other one ends in local minima
        assert errors[0] < errors[1]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1 << 30),
    size=st.integers(1, 60),
    points=st.integers(2, 9),
    digits=st.integers(0, 3),
    weighted=st.booleans(),
)
def test_scalar_steps_equal_plain_lloyd(
    seed: int, size: int, points: int, digits: int, weighted: bool
) -> None:
    values = normal(size, seed=seed).double().round(decimals=digits)
    cost = torch.rand(size, generator=torch.Generator().manual_seed(seed)).double() + 0.01
    cost = cost if weighted else torch.ones_like(cost)
    start = normal(points, seed=seed + 1).double().sort().values

    def error(centroids: Tensor) -> float:
        return float((cost * (values[:, None] - centroids).square().min(1).values).sum())

    ordered = SortedValues.of(values, cost if weighted else None)
    found, _ = lloyd_scalar(ordered, start, 1)
    nearest = (values[:, None] - start).abs().argmin(1)  # the first, on a tie, as here
    mass = torch.zeros(points).double().index_add_(0, nearest, cost)
    if bool((mass > 0).all()):
        mean = torch.zeros(points).double().index_add_(0, nearest, cost * values) / mass
        assert torch.allclose(found, mean.sort().values, atol=1e-9)
    errors = [error(lloyd_scalar(ordered, start, n)[0]) for n in range(6)]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(errors))


def test_scalar_finds_separated_clusters_from_a_bad_start() -> None:
    values = torch.cat([center + normal(50, seed=1) * 1e-3 for center in (0, 9, 30)]).double()
    start = torch.tensor([1e3, 2e3, 3e3]).double()
    found, error = lloyd_scalar(SortedValues.of(values), start, 30)
    assert torch.allclose(found.float(), torch.tensor([0.0, 9.0, 30.0]), atol=1e-2)
    assert error == pytest.approx(float((values[:, None] - found).square().min(1).values.sum()))


@pytest.mark.parametrize(("points", "best"), [(4, 0.1175), (16, 0.01154), (256, 6.0e-5)])
def test_scalar_result_is_near_the_best_for_a_normal_distribution(points: int, best: float) -> None:
    # Max 1960; 256 points by Panter and Dite: sqrt(3) pi / 2 / 256**2 is 4.15e-5, from above.
    weight = normal(400, 250)
    encoded = KMeans(Codebook(points, dtype=torch.float32)).encode(weight)
    assert weighted_error(weight, encoded.decode()) / weight.numel() < best * 1.01


def test_vectors_find_separated_clusters_although_clusters_start_empty() -> None:
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    blocks = centres.repeat(40, 1) + normal(160, 2) * 1e-3
    far = torch.full((4, 2), 5.0) + torch.arange(4)[:, None]
    far[0] = 0
    found = lloyd_vectors(blocks, far, 40, None, torch.Generator().manual_seed(0))
    assert float(torch.cdist(centres, found).min(1).values.max()) < 0.01


def test_weighted_vectors_equal_plain_lloyd() -> None:
    blocks, start = normal(500, 3), normal(8, 3, seed=1)
    cost = torch.rand(500, 3, generator=torch.Generator().manual_seed(2)) + 0.1
    distance = (cost[:, None] * (blocks[:, None] - start).square()).sum(2)
    nearest = distance.argmin(1)
    mass = torch.zeros(8, 3).index_add_(0, nearest, cost)
    mean = torch.zeros(8, 3).index_add_(0, nearest, cost * blocks) / mass
    found = lloyd_vectors(blocks, start, 1, cost, torch.Generator())
    assert torch.allclose(found, mean, atol=1e-4)


def test_importance_moves_centroids_to_what_matters() -> None:
    weight = torch.tensor([[0.0, 1.0, 2.0, 10.0]])
    importance = torch.tensor([[1.0, 1.0, 1000.0, 1.0]])
    encoded = KMeans(Codebook(2, dtype=torch.float32)).encode(weight, Stats(importance))
    assert encoded.decode()[0, 2].item() == pytest.approx(2.0, abs=0.01)


def test_zero_importance_is_ignored() -> None:
    weight = torch.cat([normal(4, 8), torch.full((4, 8), 100.0)])
    importance = torch.cat([torch.ones(4, 1), torch.zeros(4, 1)])
    encoded = KMeans(Codebook(4)).encode(weight, Stats(importance))
    assert float(encoded.params["points"].max()) < 5
    vectors = KMeans(Product(2, points=4), backend="torch").encode(weight, Stats(importance))
    alone = weighted_error(weight[:4], vectors.decode()[:4])
    assert alone <= weighted_error(weight[:4], Product(2, points=4).encode(weight[:4]).decode())


@pytest.mark.parametrize("fmt", [Codebook(16), Product(2, points=16)], ids=repr)
def test_never_more_points_than_distinct_ones(fmt: Codebook | Product) -> None:
    weight = torch.tensor([[1.0, 2.0, 1.0, 2.0], [3.0, 4.0, 1.0, 2.0]]).repeat(100, 1)
    encoded = KMeans(fmt).encode(weight)
    assert torch.equal(encoded.decode(), weight)
    name = "points" if isinstance(fmt, Codebook) else "centroids"
    assert len(encoded.params[name]) == (4 if isinstance(fmt, Codebook) else 2)


def test_deterministic_for_a_seed() -> None:
    weight = normal(40, 40)
    encoder = KMeans(Product(4, points=32), start="kmeans++", seed=3, backend="torch")
    one, two = encoder.encode(weight), encoder.encode(weight)
    assert torch.equal(one.decode(), two.decode())
    other = KMeans(Product(4, points=32), start="kmeans++", seed=4, backend="torch").encode(weight)
    assert not torch.equal(one.decode(), other.decode())


def test_plus_plus_takes_distinct_points_only() -> None:
    points = torch.tensor([[0.0], [1.0], [1.0], [3.0]])
    chosen = spread_start(points, 10, None, torch.Generator().manual_seed(0))
    assert sorted(chosen.flatten().tolist()) == [0.0, 1.0, 3.0]
    cost = torch.tensor([1.0, 0.0, 0.0, 1.0])
    chosen = spread_start(points, 10, cost, torch.Generator().manual_seed(0))
    assert sorted(chosen.flatten().tolist()) == [0.0, 3.0]


@pytest.mark.parametrize("count", [2, 16, 100, 256, 4096, 5000])
def test_packed_minimum(count: int) -> None:
    scores = normal(64, count).square() + 1e-3
    exact = scores.min(1).values
    found = least_index(scores.clone()).long()
    chosen = scores.gather(1, found[:, None]).squeeze(1)
    assert bool((chosen <= exact * (1 + 2.0**-10)).all())


def test_faiss_and_torch_agree() -> None:
    pytest.importorskip("faiss")
    weight = normal(256, 96) * 0.02
    errors = [
        weighted_error(weight, KMeans(Product(8, 64), backend=backend).encode(weight).decode())
        for backend in ("torch", "faiss")
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
    rows = Stats(torch.rand(256, 1, generator=torch.Generator().manual_seed(0)))
    errors = [
        weighted_error(
            weight,
            KMeans(Product(8, 64), backend=backend).encode(weight, rows).decode(),
            rows.importance.expand(256, 96) if rows.importance is not None else None,
        )
        for backend in ("torch", "faiss")
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_faiss_missing_or_unable(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = normal(64, 16), torch.rand(64, 16)
    with pytest.raises(SpecError, match="one importance"):
        KMeans(Product(4, 16), backend="faiss").encode(weight, Stats(importance))
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    KMeans(Product(4, 16)).encode(weight)
    with pytest.raises(SpecError, match=r"pip install dither\[pq\]"):
        KMeans(Product(4, 16), backend="faiss").encode(weight)


@pytest.mark.parametrize(
    "importance",
    [torch.ones(3), torch.full((8, 8), -1.0), torch.full((8, 8), torch.nan), torch.zeros(8, 8)],
)
def test_bad_importance_is_refused(importance: Tensor) -> None:
    with pytest.raises(SpecError, match="importance"):
        KMeans(Codebook(4)).encode(normal(8, 8), Stats(importance))


@pytest.mark.parametrize(
    "values",
    [
        {"format": Affine()},
        {"iterations": -1},
        {"iterations": 1.5},
        {"seed": -1},
        {"start": "random"},
        {"backend": "numpy"},
    ],
)
def test_bad_settings(values: dict[str, object]) -> None:
    with pytest.raises(SpecError, match="give"):
        KMeans(**{"format": Codebook(4), **values})  # type: ignore[arg-type]
