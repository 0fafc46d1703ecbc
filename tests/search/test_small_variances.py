"""Small variances beside usual ones never become 0, by which norms would divide."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dither


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(least: float, few: int, length: int) -> dict[str, Tensor]:
    variances = normal(length).abs() + 0.5
    variances[torch.randperm(length, generator=torch.Generator().manual_seed(1))[:few]] = least
    return {
        "conv.weight": normal(64, 16, 3, 3, seed=2),
        "norm.weight": variances.sqrt(),
        "norm.running_var": variances,
        "head.weight": normal(10, 64, seed=3),
    }


@pytest.mark.parametrize("size", ["8x", "20x"])
@pytest.mark.parametrize(("few", "length"), [(1, 64), (1, 1024), (5, 1024), (3, 4096)])
@pytest.mark.parametrize("least", [1e-1, 1e-2, 1e-3, 1e-5, 1e-7])
def test_small_variances_stay(least: float, few: int, length: int, size: str) -> None:
    state = network(least, few, length)
    archive = dither.compress(state, size)
    for name in ("norm.running_var", "norm.weight"):
        assert bool((archive[name] > 0).all()), name
        usual = state[name] > 0.3
        assert bool((archive[name][usual] > state[name][usual] / 4).all()), name


def test_dead_channels_may_be_0() -> None:
    state = network(5.6e-45, 3, 256)
    assert dither.compress(state, "12x").nbytes <= sum(4 * v.numel() for v in state.values()) / 12
