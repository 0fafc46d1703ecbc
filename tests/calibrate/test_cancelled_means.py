"""Inputs far from 0 that hardly vary: what is left about their means can still be factored."""

import pytest
import torch

from dither.calibrate.mean_shift import centered
from dither.core import Stats
from dither.encoders.outputs import cholesky


@pytest.mark.parametrize("offset", [0.0, 1.0, 10.0, 30.0])
@pytest.mark.parametrize("groups", [0, 3])
def test_moments_about_the_mean_have_a_factor(offset: float, groups: int) -> None:
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        few = torch.randn(max(groups, 1), 4000, 4, generator=generator)
        spread = few @ torch.randn(4, 48, generator=generator)
        inputs = offset * torch.rand(48, generator=generator) + 0.1 * spread
        gram, mean = inputs.mT @ inputs / 4000, inputs.mean(1)
        one = slice(None) if groups else 0
        stats = Stats(gram=gram[one], cross=gram[one], mean=mean[one], samples=4000)
        found = centered(stats, mean[one])
        assert found.gram is not None
        torch.testing.assert_close(found.cross, found.gram)
        for moments in found.gram if groups else [found.gram]:
            cholesky(moments.double())


def test_sums_that_are_off_by_a_thousandth_have_one_too() -> None:
    inputs = 3 + 0.05 * torch.randn(2, 500, 9, generator=torch.Generator().manual_seed(0))
    gram, mean = inputs.mT @ inputs / 500, inputs.mean(1)
    gram[1] *= 1 - 1e-3
    found = centered(Stats(gram=gram, cross=gram, mean=mean, samples=500), mean).gram
    assert found is not None
    for moments in found:
        cholesky(moments.double())
    wanted = inputs[0] - mean[0]
    torch.testing.assert_close(found[0], wanted.T @ wanted / 500, rtol=0.01, atol=1e-5)
