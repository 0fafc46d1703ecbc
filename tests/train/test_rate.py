"""The size that training sees: interpolated code lengths, their slopes, and the truth."""

import pytest
import torch

from dither import LSQ
from dither.archive import code
from dither.train.rate import CodeLengths


def laplace(*shape: int, seed: int = 0) -> torch.Tensor:
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    return -uniform.sign() * (1 - 2 * uniform.abs()).clamp_min(1e-9).log()


def test_at_grid_points_it_is_the_code_length() -> None:
    lengths = CodeLengths.of(torch.tensor([0.0, 0, 0, 0, 1, 1, 2, -1]))
    points = torch.tensor([0.0, 1, 2, -1]) * 0.5
    bits = [float(lengths.total(p.reshape(1), torch.tensor([0.5]))) for p in points]
    assert bits == pytest.approx([1, 2, 3, 3])
    assert float(lengths.total(torch.tensor([0.25]), torch.tensor([0.5]))) == pytest.approx(1.5)


def test_gradients_are_slopes() -> None:
    w = laplace(400).requires_grad_()
    step = torch.tensor([0.7], requires_grad=True)
    lengths = CodeLengths.of(w / 0.7)
    lengths.total(w, step).backward()
    delta = 1e-3
    with torch.no_grad():
        wide = lengths.total(w.double(), step.double() + delta)
        narrow = lengths.total(w.double(), step.double() - delta)
        assert float(step.grad) == pytest.approx(float(wide - narrow) / (2 * delta), rel=2e-2)
        place = (w / step)[:20]
        for i in range(20):
            if float((place[i] - place[i].round()).abs()) < 0.01:
                continue  # a corner
            moved = w.clone().double()
            moved[i] += delta
            slope = lengths.total(moved, step.double()) - lengths.total(w.double(), step.double())
            assert float(w.grad[i]) == pytest.approx(float(slope) / delta, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("step", [0.1, 0.5, 1.0])
def test_the_estimate_is_near_what_the_coder_takes(step: float) -> None:
    w = laplace(200, 500)
    surrogate = LSQ(None, step=step).begin(w)
    bits = float(surrogate.soft_bits(w))
    nbytes = code(surrogate.encode(w)).nbytes
    # Interpolation is the expected length under random rounding: more where steps are coarse.
    assert 0.98 * nbytes < bits / 8 < 1.35 * nbytes


def test_an_empty_weight_costs_nothing() -> None:
    lengths = CodeLengths.of(torch.zeros(0))
    assert float(lengths.total(torch.zeros(0), torch.ones(1))) == 0
