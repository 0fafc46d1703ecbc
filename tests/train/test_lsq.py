"""Learned steps: gradients against autograd, grids, and what the file holds."""

import math
from typing import Any

import pytest
import torch

from dither import LSQ, Affine, SpecError
from dither.train.lsq import LearnedStep


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference(w: torch.Tensor, s: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Equation 1 with straight-through rounding, for autograd."""
    place = (w / s).clamp(low, high)
    return (place + (place.round() - place).detach()) * s


@pytest.mark.parametrize("bits", [2, 4, 8, None])
@pytest.mark.parametrize("where", [{}, {"axis": 0}, {"axis": 1}, {"group": 5}])
def test_values_and_gradients_are_those_of_the_paper(
    bits: int | None, where: dict[str, Any]
) -> None:
    surrogate = LSQ(bits, **where).begin(weight(6, 12))
    with torch.no_grad():  # exact in bfloat16, so that the reference sees the same steps
        surrogate.log_step.copy_(surrogate.log_step.exp().bfloat16().float().log())
    w = weight(6, 12).requires_grad_()
    out = surrogate.noisy(w)
    mixed = weight(6, 12, seed=1)
    (out * mixed).sum().backward()

    other = weight(6, 12).requires_grad_()
    log = surrogate.log_step.detach().clone().requires_grad_()
    grouping = Affine(4, **where).grouping((6, 12))
    steps = log.exp()
    boxes = grouping.views(torch.empty(6, 12))
    wide = torch.cat(
        [p.expand(b.shape).flatten(1) for p, b in zip(grouping.spread(steps), boxes, strict=True)],
        1,
    )
    wide = wide.reshape(6, 12)
    low, high = (-math.inf, math.inf) if bits is None else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    expected = reference(other, wide, low, high)
    (expected * mixed).sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(w.grad, other.grad)
    torch.testing.assert_close(surrogate.log_step.grad, log.grad, rtol=1e-4, atol=1e-5)


def test_the_first_step_is_the_papers() -> None:
    w = weight(50, 40)
    step = LSQ(4).begin(w).log_step.detach().exp()
    assert float(step) == pytest.approx(2 * float(w.abs().mean()) / math.sqrt(7), rel=1e-6)


def test_training_sees_what_the_file_holds() -> None:
    w = weight(30, 20)
    for spec in (LSQ(3), LSQ(None), LSQ(4, axis=0), LSQ(4, group=8)):
        surrogate = spec.begin(w)
        assert torch.equal(surrogate.noisy(w).detach(), surrogate.encode(w).decode()), spec


def test_trim_and_nudge_make_the_file_smaller() -> None:
    w = weight(64, 64)
    surrogate = LSQ(None).begin(w)
    sizes = []
    for surrogate.trim in (0.0, 0.5, 1.0):
        sizes.append(int(surrogate.encode(w).codes["levels"].alphabet))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    surrogate.trim = 0.0
    surrogate.nudge(1.0)
    assert surrogate.encode(w).codes["levels"].alphabet == sizes[-1]


def test_a_step_that_is_not_learned_stays() -> None:
    surrogate = LSQ(None, step=0.25, learn=False).begin(weight(8, 8))
    assert not surrogate.log_step.requires_grad
    surrogate.nudge(1.0)
    assert float(surrogate.log_step.detach().exp()) == 0.25


def test_it_begins_from_steps_of_rows() -> None:
    w = weight(4, 100)
    found = Affine(None, axis=0, scale_dtype=torch.bfloat16).assign(
        w, {"scale": torch.tensor([0.5, 1.0, 1.0, 2.0])}
    )
    surrogate = LSQ(None).begin(w)
    assert isinstance(surrogate, LearnedStep)
    surrogate.start(found)
    assert torch.equal(surrogate.encode(w).decode(), found.decode())
    assert torch.equal(surrogate.noisy(w).detach(), found.decode())
    copy = LSQ(None).begin(w)
    copy.load_state_dict(surrogate.state_dict())
    copy.load_aside(surrogate.aside())
    assert torch.equal(copy.encode(w).decode(), found.decode())


@pytest.mark.parametrize(
    "settings", [{"bits": 1}, {"bits": 17}, {"step": -1.0}, {"axis": 0, "group": 3}]
)
def test_nonsense_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(SpecError):
        LSQ(**settings)  # type: ignore[arg-type]


def test_an_embedding_reads_only_its_rows() -> None:
    """The rows of a lookup, and all gradients, are those of the whole table's noise."""
    found = Affine(None, axis=0, scale_dtype=torch.bfloat16).assign(
        weight(20, 6), {"scale": torch.tensor([0.5, 1.0, 0.25, 1.0]).repeat(5)}
    )
    index = torch.tensor([[3, 4, 4], [0, 19, 3]])
    mixed = weight(2, 3, 6, seed=2)
    for spec in (LSQ(4), LSQ(None), LSQ(4, axis=0)):
        gradients = []
        for is_whole in (True, False):
            surrogate, table = spec.begin(weight(20, 6)), weight(20, 6).requires_grad_()
            surrogate.start(found)
            assert surrogate.reads_rows()
            found_rows = surrogate.look_up(table[index], index)
            assert found_rows is not None
            rows = surrogate(table)[index] if is_whole else found_rows
            (rows * mixed).sum().backward()
            gradients.append((rows.detach(), table.grad, surrogate.log_step.grad))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)


def test_the_size_pulls_only_rows_that_are_read() -> None:
    w = weight(12, 8).requires_grad_()
    surrogate = LSQ(None).begin(weight(12, 8))
    steps = torch.tensor([0.25, 0.5, 1.0]).repeat_interleave(4)
    surrogate.start(Affine(None, axis=0).assign(weight(12, 8), {"scale": steps}))
    everything = torch.autograd.grad(surrogate.soft_bits(w), [w, surrogate.log_step])
    surrogate.draw(w, torch.Generator(), 1)
    index = torch.tensor([[2, 5], [5, 7]])
    assert surrogate.look_up(w[index], index) is not None
    rows = torch.zeros(12, dtype=torch.bool).index_fill(0, index.reshape(-1), value=True)
    to_weight, to_log = torch.autograd.grad(surrogate.soft_bits(w), [w, surrogate.log_step])
    assert torch.equal(to_weight[rows], everything[0][rows])
    assert not to_weight[~rows].any()
    assert to_log.tolist() == [*everything[1][:2].tolist(), 0.0]  # nobody read the last class
    surrogate.draw(w, torch.Generator(), 2)
    surrogate(w)  # a head that shares the table reads all of it
    again = torch.autograd.grad(surrogate.soft_bits(w), [w, surrogate.log_step])
    assert torch.equal(again[0], everything[0])


def test_rows_that_all_differ_keep_their_own_steps() -> None:
    """Classes are in the order of steps, not of rows."""
    w = weight(3, 40).requires_grad_()
    steps = torch.tensor([1.0, 0.25, 0.5])
    by_class, by_axis = LSQ(None).begin(w.detach()), LSQ(None, axis=0).begin(w.detach())
    by_class.start(Affine(None, axis=0).assign(w.detach(), {"scale": steps}))
    with torch.no_grad():
        by_axis.log_step.copy_(steps.log())
    for surrogate in (by_class, by_axis):  # look up the first row, whose step is the largest
        surrogate.draw(w, torch.Generator(), 1)
        surrogate.look_up(w[:1], torch.tensor([0]))
    (mine,) = torch.autograd.grad(by_class.soft_bits(w), [by_class.log_step])
    (other,) = torch.autograd.grad(by_axis.soft_bits(w), [by_axis.log_step])
    assert (mine != 0).tolist() == [False, False, True]
    assert (other != 0).tolist() == [True, False, False]
