"""Ranges and steps: each method does what it says, for all scales at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.core import SpecError, Stats
from dither.encoders import Nearest, Ranges
from dither.encoders.importance import weighted_error
from dither.formats import Affine, Codebook
from dither.testing import awkward_weights, check_encoder, check_repr

GRIDS = ["symmetric", "asymmetric", "endpoint"]
SHARES: list[dict[str, int]] = [{}, {"axis": 0}, {"axis": 1}, {"group": 8}]


def heavy(*shape: int, seed: int = 0) -> Tensor:
    """Heavy tails: clipping pays."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) ** 3


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("share", SHARES, ids=repr)
def test_laws(method: str, grid: str, share: dict[str, int]) -> None:
    encoder = Ranges(Affine(3, grid=grid, **share), method)  # type: ignore[arg-type]
    check_repr(encoder)
    for name, weight in awkward_weights().items():
        if name == "huge" or (share.get("axis") is not None and weight.ndim <= share["axis"]):
            continue
        check_encoder(encoder, weight)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("share", SHARES, ids=repr)
def test_mse_is_never_worse_and_clips_heavy_tails(
    bits: int, grid: str, share: dict[str, int]
) -> None:
    weight = heavy(24, 40)
    fmt = Affine(bits, grid=grid, **share)  # type: ignore[arg-type]
    errors = {
        method: weighted_error(weight, Ranges(fmt, method).encode(weight).decode())
        for method in ("minmax", "mse")
    }
    assert errors["mse"] <= errors["minmax"] * (1 + 1e-6)
    if bits in {2, 3, 4} and not share:
        assert errors["mse"] < 0.95 * errors["minmax"]


@pytest.mark.parametrize("grid", GRIDS)
def test_mse_is_near_an_exhaustive_search(grid: str) -> None:
    weight = heavy(400)
    fmt = Affine(3, grid=grid)
    found = weighted_error(weight, Ranges(fmt).encode(weight).decode())
    low, high = weight.double().min(), weight.double().max()
    best = min(
        weighted_error(weight, fmt.assign(weight, fmt.cover(low * a, high * b)).decode())
        for a in torch.linspace(0.05, 1, 20).double()[:, None]
        for b in torch.linspace(0.05, 1, 20).double()[:, None]
    )
    assert found <= best * 1.05


@pytest.mark.parametrize("grid", GRIDS)
def test_mse_of_each_row_is_found_alone(grid: str) -> None:
    weight = heavy(6, 200) * torch.logspace(-3, 3, 6)[:, None]
    together = Ranges(Affine(4, axis=0, grid=grid)).encode(weight).decode()
    for row, expected in zip(weight, together, strict=True):
        assert torch.equal(Ranges(Affine(4, grid=grid)).encode(row).decode(), expected)


def test_mse_follows_importance() -> None:
    weight = heavy(30, 30)
    importance = torch.rand(30, 30, generator=torch.Generator().manual_seed(1)) ** 6
    plain, weighted = (
        Ranges(Affine(3)).encode(weight, stats).decode() for stats in (None, Stats(importance))
    )
    errors = [weighted_error(weight, decoded, importance) for decoded in (weighted, plain)]
    assert errors[0] < errors[1]


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), share=st.sampled_from(SHARES), percentile=st.floats(50, 100))
def test_percentile_keeps_that_share(seed: int, share: dict[str, int], percentile: float) -> None:
    weight = heavy(16, 21, seed=seed)
    fmt = Affine(8, grid="endpoint", **share)  # type: ignore[arg-type]
    params = Ranges(fmt, "percentile", percentile).params(weight)
    low = params["offset"].double()
    high = low + params["scale"].double() * 255
    grouping = fmt.grouping((16, 21))
    for box, least, most in zip(
        grouping.views(weight), grouping.spread(low), grouping.spread(high), strict=True
    ):
        inside = (box > least - 1e-6) & (box < most + 1e-6)
        count = inside.sum(grouping.reduced)
        size = box.numel() // count.numel()
        expected = percentile / 100 * (size - 1)
        assert bool((count >= expected - 2).all())
        assert bool((count <= expected + 3).all())


def test_percentile_100_is_minmax() -> None:
    weight = heavy(9, 9)
    one, two = (
        Ranges(Affine(4, group=4), method, 100.0).encode(weight)
        for method in ("percentile", "minmax")
    )
    assert torch.equal(one.decode(), two.decode())


def test_minmax_is_the_formats_own_choice() -> None:
    weight = heavy(9, 9)
    for grid in GRIDS:
        fmt = Affine(5, axis=1, grid=grid)
        assert torch.equal(
            Ranges(fmt, "minmax").encode(weight).decode(), fmt.encode(weight).decode()
        )


def test_nearest_takes_the_step() -> None:
    weight = heavy(5, 8)
    for fmt in (Affine(None), Affine(None, axis=0), Affine(16, group=3)):
        encoder = Nearest(fmt, step=0.25)
        check_repr(encoder)
        encoded = check_encoder(encoder, weight)
        assert torch.equal(encoded.decode(), (weight / 0.25).round() * 0.25)
    clipped = Nearest(Affine(2), step=0.25).encode(weight).decode()
    assert clipped.unique().tolist() == [-0.5, -0.25, 0.0, 0.25]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Nearest, {"format": Codebook(4), "step": 1.0}),
        (Nearest, {"format": Affine(4, grid="endpoint"), "step": 1.0}),
        (Nearest, {"format": Affine(4), "step": 0.0}),
        (Nearest, {"format": Affine(4), "step": float("nan")}),
        (Nearest, {"format": Affine(4), "step": True}),
        (Ranges, {"format": Affine(None)}),
        (Ranges, {"format": Codebook(4)}),
        (Ranges, {"format": Affine(4), "method": "max"}),
        (Ranges, {"format": Affine(4), "percentile": 0}),
        (Ranges, {"format": Affine(4), "percentile": 101.0}),
    ],
)
def test_bad_settings(kind: type[Nearest] | type[Ranges], values: dict[str, object]) -> None:
    with pytest.raises(SpecError, match="give"):
        kind(**values)  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_refused() -> None:
    for method in ("minmax", "percentile", "mse"):
        with pytest.raises(SpecError, match="finite"):
            Ranges(Affine(4), method).encode(torch.tensor([1.0, torch.nan]))
