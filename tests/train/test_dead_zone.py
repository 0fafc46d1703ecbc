"""A dead zone is learned: wider for the size, narrower for weights that would grow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dither import LSQ, DeadZone, SpecError, attach
from dither.coding import code_lengths
from dither.train.dead_zone import LearnedZone


def weights(count: int = 40_000, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.distributions.Laplace(0.0, 1.0).sample((100, count // 100))


def zone_of(weight: Tensor, spec: DeadZone) -> LearnedZone:
    surrogate = spec.begin(weight)
    assert isinstance(surrogate, LearnedZone)
    return surrogate


@pytest.mark.parametrize("spec", [DeadZone(None, step=0.5, zone=2.7), DeadZone(4, 0, zone=1.5)])
def test_what_lies_in_the_zone_is_0_and_the_rest_is_rounded(spec: DeadZone) -> None:
    weight = weights(4000)
    surrogate = zone_of(weight, spec)
    steps = surrogate.steps().detach()
    plain = LSQ(spec.bits, spec.axis, step=spec.step).begin(weight).encode(weight).decode()
    wanted = plain.masked_fill(weight.abs() < steps * spec.zone / 2, 0.0)
    assert torch.equal(surrogate.encode(weight).decode(), wanted)
    assert torch.equal(surrogate.train()(weight), wanted)
    assert int((wanted == 0).sum()) > int((plain == 0).sum())


def test_a_zone_of_one_step_trains_as_learned_steps_do_until_it_learns() -> None:
    weight, seen = weights(4000), []
    for spec in (LSQ(None, step=0.7), DeadZone(None, step=0.7)):
        surrogate, parameter = spec.begin(weight), nn.Parameter(weight.clone())
        values = surrogate.train()(parameter)
        bits = surrogate.soft_bits(parameter)
        (values.square().sum() + bits).backward()
        assert parameter.grad is not None
        seen.append((values.detach(), bits.detach(), parameter.grad))
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


@pytest.mark.parametrize("zone", [1.3, 2.0, 3.4])
def test_the_size_falls_by_its_slope_as_the_zone_widens(zone: float) -> None:
    """Against lengths of the codes counted anew, with those of the table held."""
    weight, step = weights(400_000), 0.8
    surrogate = zone_of(weight, DeadZone(None, step=step, zone=zone))
    surrogate.soft_bits(weight).backward()
    assert surrogate.log_zone.grad is not None
    slope = float(surrogate.log_zone.grad)

    def codes(width: float) -> Tensor:
        kept = weight.masked_fill(weight.abs() < surrogate.steps().detach() * width / 2, 0.0)
        return (kept / surrogate.steps().detach()).round().long().flatten()

    lowest = int(codes(zone).min())
    lengths = torch.from_numpy(code_lengths(torch.bincount(codes(zone) - lowest).numpy()))
    near = [float(lengths[codes(zone * 2**d) - lowest].sum()) for d in (-0.02, 0.02)]
    wanted = (near[1] - near[0]) / (0.04 * 0.6931)
    assert wanted < 0
    assert slope == pytest.approx(wanted, rel=0.15)


def test_weights_that_would_grow_make_the_zone_narrower() -> None:
    weight = nn.Parameter(weights(4000))
    slopes = []
    for sign in (1.0, -1.0):
        surrogate = zone_of(weight.detach(), DeadZone(None, step=0.5, zone=3.0))
        values = surrogate.train()(weight)
        (sign * -(values * weight.detach().sign()).sum()).backward()
        assert surrogate.log_zone.grad is not None
        slopes.append(float(surrogate.log_zone.grad))
    assert slopes[0] > 0 > slopes[1]  # descent narrows, and widens
    assert weight.grad is not None
    assert bool((weight.grad == 0).all())  # the two cancel: straight through to each weight


def test_rows_that_are_looked_up_are_those_of_the_table() -> None:
    table = weights(4000)
    surrogate = zone_of(table, DeadZone(None, step=0.5, zone=2.5)).train()
    index = torch.tensor([[3, 7], [7, 99]])
    assert surrogate.reads_rows()
    assert torch.equal(surrogate.noisy_rows(table[index], index), surrogate.noisy(table)[index])


def test_a_budget_is_kept_and_the_zone_learns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    run = attach(model, {"*": DeadZone(None, lr=0.02)}, budget=700, steps=60)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    run.join(optimizer)
    for _ in range(60):
        x = torch.randn(32, 16)
        loss = (model(x) - x[:, :8]).square().mean() + run.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()
    assert 0.985 * 700 - 64 <= run.finish() <= 700
    found = run.surrogates["0.weight"]
    assert isinstance(found, LearnedZone)
    assert float(found.log_zone.detach()) != 0.0


def test_refusals() -> None:
    with pytest.raises(SpecError, match="width of 1 or more steps"):
        DeadZone(zone=0.5)
