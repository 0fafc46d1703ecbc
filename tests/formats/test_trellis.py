"""Trellis: the laws, the machine, the best path against all paths, and what it gains."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.core import Codes, Encoded, SpecError
from dither.formats import Trellis
from dither.formats.parity_machine import POLYNOMIALS, predecessors, quantizers
from dither.formats.trellis import MOST_CODES
from dither.testing import check_idempotent
from tests.formats.test_laws import SCALES, weights


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60)
@given(
    weight=weights(),
    states=st.sampled_from([4, 8, 64]),
    exponent=st.integers(-44, 2),
    scale_dtype=st.sampled_from(SCALES),
    seed=st.integers(0, 1 << 30),
)
def test_any_parameters(
    weight: Tensor, states: int, exponent: int, scale_dtype: torch.dtype, seed: int
) -> None:
    # Scales far too small or large, denormal, negative and 0.
    axis = seed % weight.ndim if weight.ndim else None
    fmt = Trellis(states, axis=axis, scale_dtype=scale_dtype)
    shape = (fmt.grouping(tuple(weight.shape)).count,)
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0**exponent
    scale[::5] = 0
    try:
        encoded = fmt.assign(weight, {"scale": scale})
    except SpecError as error:
        if "larger step" not in str(error):
            raise
        return
    check_idempotent(encoded, {"scale": scale})
    check_idempotent(encoded)


@pytest.mark.parametrize("states", POLYNOMIALS)
def test_the_machine_is_its_states(states: int) -> None:
    before = predecessors(states)
    assert all(sorted(row) == list(range(states)) for row in before.tolist())
    after = before.argsort(dim=1)
    parities = torch.randint(2, (100, 7), generator=torch.Generator().manual_seed(0))
    state = torch.zeros(7, dtype=torch.int64)
    for found, parity in zip(quantizers(parities, states), parities, strict=True):
        assert torch.equal(found, state & 1)
        state = after[parity, state]


@pytest.mark.parametrize("states", [4, 8])
def test_no_path_is_nearer(states: int) -> None:
    weight = normal(6, 5, seed=states)
    fmt, scale = Trellis(states), torch.tensor([0.7])
    found = (fmt.assign(weight, {"scale": scale}).decode() - weight).square().sum(1)
    paths = torch.tensor(list(itertools.product(range(-3, 4), repeat=5)))
    levels = Codes((paths + 3).T, 7)
    parts = {"levels": levels, "zero": Codes(torch.tensor([3]), MOST_CODES)}
    every = Encoded(fmt, tuple(paths.shape), torch.float32, parts, {"scale": scale}).decode()
    least = (every[None] - weight[:, None]).square().sum(2).amin(1)
    assert torch.allclose(found, least, rtol=1e-6)


def test_errors_are_smaller_than_those_of_a_grid_of_the_same_rate() -> None:
    weight = normal(100, 300)
    errors = [
        float((Trellis(s).assign(weight, {"scale": torch.tensor([0.3])}).decode() - weight).var())
        for s in (4, 8, 64)
    ]
    # Published gains of trellis coded quantization at high rates: 0.99, 1.09, 1.27 dB.
    gains = [10 * np.log10(0.6**2 / 12 / error) for error in errors]
    assert np.allclose(gains, [0.99, 1.09, 1.27], atol=0.08)


def test_rows_are_paths_of_their_own() -> None:
    weight, params = normal(5, 3, 4), {"scale": torch.tensor([0.3])}
    whole = Trellis().assign(weight, params)
    assert whole.codes["levels"].values.shape == (3, 4, 5)
    rows = [Trellis().assign(row[None], params).decode() for row in weight]
    assert torch.equal(whole.decode(), torch.cat(rows))
    assert torch.equal(
        Trellis().assign(weight[0].reshape(-1), params).decode(), rows[0].reshape(-1)
    )


def test_a_constant_is_exact() -> None:
    weight = torch.full((3, 50), 0.3)
    assert torch.equal(Trellis().encode(weight).decode(), weight)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SpecError, match="one of 4, 8"):
        Trellis(5)
    with pytest.raises(SpecError, match="larger step"):
        Trellis().assign(torch.tensor([1.0, 2.0]), {"scale": torch.tensor([1e-9])})
    with pytest.raises(SpecError, match="not finite"):
        Trellis().encode(torch.tensor([torch.nan]))
    good = Trellis().encode(normal(4, 6))
    with pytest.raises(SpecError, match="levels"):
        Encoded(good.format, (6, 4), torch.float32, good.codes, good.params)
    wide = {**good.codes, "levels": Codes(good.codes["levels"].values, MOST_CODES + 1)}
    with pytest.raises(SpecError, match="at most"):
        Encoded(good.format, (4, 6), torch.float32, wide, good.params)
