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
    bits = [lengths.at(p.reshape(1) / 0.5)[0] for p in points]
    assert bits == pytest.approx([1, 2, 3, 3])
    assert lengths.at(torch.tensor([0.5]))[0] == pytest.approx(1.5)


@pytest.mark.parametrize("where", [{}, {"axis": 0}, {"group": 7}])
def test_gradients_are_those_of_the_estimate(where: dict[str, int]) -> None:
    surrogate = LSQ(None, step=0.7, **where).begin(laplace(8, 21))
    w = laplace(8, 21).requires_grad_()
    surrogate.soft_bits(w).backward()
    step, delta = surrogate.steps().detach(), 1e-3
    lengths = CodeLengths.of(w / step)

    def bits(weight: torch.Tensor, factor: torch.Tensor) -> float:
        return lengths.at(weight / (step * factor))[0]

    with torch.no_grad():
        for at in [(0, 0), (3, 5), (7, 20), (2, 13)]:
            place = float(w[at] / 0.7)
            if abs(place - round(place)) < 0.01:
                continue  # a corner
            moved = w.clone()
            moved[at] += delta
            slope = (bits(moved, torch.ones(1)) - bits(w, torch.ones(1))) / delta
            assert float(w.grad[at]) == pytest.approx(slope, rel=2e-2, abs=2e-3)
        wide, narrow = (bits(w, torch.full((1,), 1 + sign * delta)) for sign in (1, -1))
        total = float(surrogate.log_step.grad.sum())
        assert total == pytest.approx((wide - narrow) / (2 * delta), rel=2e-2)


def test_gradients_stay_until_refreshed() -> None:
    w = laplace(40, 40)
    surrogate = LSQ(None, step=0.5, refresh=3).begin(w)
    first = surrogate.soft_bits(w)
    assert torch.equal(surrogate.soft_bits(w / 2), first)
    surrogate.draw(w, torch.Generator(), 2)
    assert torch.equal(surrogate.soft_bits(w / 2), first)
    surrogate.draw(w, torch.Generator(), 3)
    assert float(surrogate.soft_bits(w / 2).detach()) < 0.9 * float(first.detach())


def test_classes_of_rows_have_tables_of_their_own() -> None:
    rows = torch.cat([torch.zeros(50, 40), laplace(50, 40) * 3])
    classes = torch.arange(100) // 50
    one, own = (CodeLengths.of(rows, c).at(rows, c)[0] for c in (None, classes))
    assert own < 0.9 * one
    lonely = CodeLengths.of(rows[50:]).at(rows[50:])[0]
    assert own == pytest.approx(lonely, rel=0.02)


@pytest.mark.parametrize("step", [0.1, 0.5, 1.0])
def test_the_estimate_is_near_what_the_coder_takes(step: float) -> None:
    w = laplace(200, 500)
    surrogate = LSQ(None, step=step).begin(w)
    bits = float(surrogate.soft_bits(w).detach())
    nbytes = code(surrogate.encode(w)).nbytes
    # Interpolation is the expected length under random rounding: more where steps are coarse.
    assert 0.98 * nbytes < bits / 8 < 1.35 * nbytes


def test_an_empty_weight_costs_nothing() -> None:
    lengths = CodeLengths.of(torch.zeros(0))
    assert lengths.at(torch.zeros(0))[0] == 0
