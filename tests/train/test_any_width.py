"""Training for rounding at any width: what is drawn, and what training then reads."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import dither
from dither import SpecError
from dither.formats import Affine
from dither.testing import same_bits
from dither.train import APQN, MQAT

GRIDS = [Affine(8), Affine(8, axis=0), Affine(8, grid="asymmetric", group=5), Affine(8, axis=1)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_mqat_reads_what_a_file_of_the_drawn_width_would_hold(grid: Affine) -> None:
    weight = numbers(6, 12).requires_grad_()
    spec = MQAT(widths=(2, 5, 8, 32), format=grid, seed=3)
    surrogate, seen = spec.begin(weight), set()
    for step in range(24):
        surrogate.draw(weight, torch.Generator(), step)
        values, width = surrogate(weight), spec.width(step)
        plain = weight.detach()
        wanted = plain if width == 32 else spec.grid(width).encode(plain).decode()
        assert torch.equal(values.detach(), wanted)
        (gradient,) = torch.autograd.grad(values.sum(), weight)
        assert torch.equal(gradient[wanted == plain], torch.ones_like(weight)[wanted == plain])
        assert float(gradient.mean()) > 0.8  # all but a few that the grid clips
        seen.add(width)
    assert seen == {2, 5, 8, 32}
    assert same_bits(surrogate.eval()(weight).detach(), grid.encode(weight.detach()).decode())


@pytest.mark.parametrize("width", [2, 4, 7])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_apqn_adds_noise_of_the_variance_of_rounding(grid: Affine, width: int) -> None:
    weight = numbers(40, 60)
    surrogate = APQN(widths=(width,), format=grid).begin(weight)
    params = grid.__class__(**{**vars(grid), "bits": width}).fit(weight)
    steps = params["scale"].double()
    noise = []
    for step in range(20):
        surrogate.draw(weight, torch.Generator().manual_seed(step), step)
        read = weight.clone().requires_grad_()
        values = surrogate(read)
        (gradient,) = torch.autograd.grad((values * weight).sum(), read)
        assert torch.equal(gradient, weight)  # exact: nothing passes straight through
        noise.append((values - read).detach().double())
    found = torch.stack(noise)
    wanted = float(steps.square().mean()) / 12
    if grid.group is None:
        assert float(found.square().mean()) == pytest.approx(wanted, rel=0.03)
    assert float(found.mean()) == pytest.approx(0, abs=0.01 * float(steps.max()))
    assert float(found.abs().max()) <= 0.5001 * float(steps.max())
    assert float(found.abs().max()) > 0.49 * float(steps.max())


def test_widths_are_drawn_alike_for_all_weights_and_evenly_over_steps() -> None:
    spec = MQAT(widths=(2, 3, 8))
    drawn = Counter(spec.width(step) for step in range(600))
    assert set(drawn) == {2, 3, 8}
    assert min(drawn.values()) > 150
    assert [spec.width(n) for n in range(9)] == [MQAT(widths=(2, 3, 8)).width(n) for n in range(9)]
    other = MQAT(widths=(2, 3, 8), seed=1)
    assert [spec.width(n) for n in range(40)] != [other.width(n) for n in range(40)]


@pytest.mark.parametrize("method", [MQAT, APQN])
def test_training_makes_weights_bear_few_bits(method: type[MQAT] | type[APQN]) -> None:
    inputs = numbers(256, 8)
    goal = (inputs @ numbers(8, 3, seed=1)).sin()

    def error(spec: MQAT | APQN | None) -> float:
        torch.manual_seed(0)
        first, last = nn.Linear(8, 32), nn.Linear(32, 3)
        model = nn.Sequential(first, nn.ReLU(), last)
        run = None if spec is None else dither.attach(model, {"*weight": spec}, steps=400)
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for step in range(400):
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 400)
            optimizer.zero_grad()
            (model(inputs) - goal).square().mean().backward()
            optimizer.step()
            if run is not None:
                run.step()
        if run is not None:
            run.detach(commit=False)
        with torch.no_grad():
            for weight in (first.weight, last.weight):
                weight.copy_(Affine(3).encode(weight).decode())
            return float((model(inputs) - goal).square().mean())

    assert error(method(widths=(3, 4, 5))) < 0.7 * error(None)


@pytest.mark.parametrize("widths", [(), (0,), (17,), (2, 31), (2.0,), (True,)])
def test_widths_that_make_no_sense_are_refused(widths: tuple[int, ...]) -> None:
    for method in (MQAT, APQN):
        with pytest.raises(SpecError, match="widths from 1 to 16"):
            method(widths=widths)
        with pytest.raises(SpecError, match="bounded Affine"):
            method(format=Affine(None))
