"""The size that training sees: interpolated code lengths, their slopes, and the truth."""

from typing import Any

import pytest
import torch

from dither import LSQ
from dither.archive import code
from dither.train.code_lengths import CodeLengths


def laplace(*shape: int, seed: int = 0) -> torch.Tensor:
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    return -uniform.sign() * (1 - 2 * uniform.abs()).clamp_min(1e-9).log()


def interpolated(lengths: CodeLengths, place: torch.Tensor) -> float:
    """The sum of lengths between grid points, in float64, for one class."""
    whole = place.double().floor()
    index = (whole - lengths.lowest).long().clamp(0, lengths.bits.shape[1] - 2)
    table = lengths.bits[0].double()
    return float((table[index] + (table[index + 1] - table[index]) * (place - whole)).sum())


def test_lengths_are_those_of_the_histogram() -> None:
    lengths = CodeLengths.of(torch.tensor([0.0, 0.1, -0.2, 0, 1, 1.3, 2, -1]))
    points = torch.tensor([0, 1, 2, -1]) - lengths.lowest
    assert lengths.bits[0, points].tolist() == pytest.approx([1, 2, 3, 3])
    assert lengths.total == pytest.approx(4 * 1 + 2 * 2 + 3 + 3)
    assert lengths.slopes(torch.tensor([0.5, 1.2, -0.5])).tolist() == pytest.approx([1, 1, -2])


@pytest.mark.parametrize("where", [{}, {"axis": 0}, {"group": 7}])
def test_gradients_are_those_of_the_estimate(where: dict[str, Any]) -> None:
    surrogate = LSQ(None, step=0.7, **where).begin(laplace(8, 21))
    w = laplace(8, 21).requires_grad_()
    surrogate.soft_bits(w).backward()
    assert w.grad is not None
    assert surrogate.log_step.grad is not None
    step, delta = surrogate.steps().detach(), 1e-4
    lengths = CodeLengths.of(w / step)
    place = (w.detach() / step).double()
    away = (place - place.round()).abs() > 0.01  # from corners
    moved = place + delta * torch.ones_like(place) / step
    for at in [(0, 0), (3, 5), (7, 20), (2, 13)]:
        if away[at]:
            slope = interpolated(lengths, moved[at]) - interpolated(lengths, place[at])
            assert float(w.grad[at]) == pytest.approx(slope / delta, rel=1e-3, abs=1e-4)
    wide, narrow = (interpolated(lengths, place / (1 + sign * delta)) for sign in (1, -1))
    total = float(surrogate.log_step.grad.sum())
    assert total == pytest.approx((wide - narrow) / (2 * delta), rel=1e-2)


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
    one, own = (CodeLengths.of(rows, c) for c in (None, classes))
    assert own.total < 0.9 * one.total
    lonely = CodeLengths.of(rows[50:])
    assert own.total == pytest.approx(lonely.total, rel=0.01)
    shift = lonely.lowest - own.lowest
    codes = torch.arange(lonely.bits.shape[1])
    torch.testing.assert_close(own.bits[1, codes + shift], lonely.bits[0])


@pytest.mark.parametrize("step", [0.1, 0.5, 1.0])
def test_the_estimate_is_near_what_the_coder_takes(step: float) -> None:
    w = laplace(200, 500)
    surrogate = LSQ(None, step=step).begin(w)
    bits = float(surrogate.soft_bits(w).detach())
    nbytes = code(surrogate.encode(w)).nbytes
    assert bits / 8 == pytest.approx(nbytes, rel=0.02)


def test_an_empty_weight_costs_nothing() -> None:
    lengths = CodeLengths.of(torch.zeros(0))
    assert lengths.total == 0
