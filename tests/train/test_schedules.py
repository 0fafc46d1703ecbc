"""Ramps at their ends and between; schedules that vary settings and warm up."""

import math

import pytest
import torch
from torch import nn

import dither
from dither.core import SpecError
from dither.train import LSQ, Ramp, Run, Vary, WarmUp
from dither.train.ramp import value_at


def test_ramps_stay_before_and_after() -> None:
    for shape in ("linear", "cosine", "cubic", "exponential"):
        ramp = Ramp(0.1, 0.4, begin=0.25, until=0.75, shape=shape)
        assert ramp.at(0.0) == ramp.at(0.25) == 0.1
        assert ramp.at(0.75) == ramp.at(1.0) == 0.4
        inside = [ramp.at(0.25 + k / 40) for k in range(1, 20)]
        assert inside == sorted(inside)


def test_shapes_are_what_their_names_say() -> None:
    quarter = {
        "linear": 0.25,
        "cosine": (1 - math.cos(math.pi / 4)) / 2,
        "cubic": 1 - 0.75**3,
    }
    for shape, share in quarter.items():
        assert Ramp(2.0, 4.0, shape=shape).at(0.25) == pytest.approx(2 + 2 * share)
    assert Ramp(1.0, 16.0, shape="exponential").at(0.25) == pytest.approx(2.0)
    assert Ramp(0.0, 1.0, begin=0.5, until=0.5).at(0.5) == 1.0
    assert (value_at(3.0, 0.1), value_at(Ramp(0.0, 1.0), 0.1)) == (3.0, 0.1)


def test_ramps_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SpecError, match="shapes"):
        Ramp(0, 1, shape="square")
    with pytest.raises(SpecError, match="within training"):
        Ramp(0, 1, begin=0.6, until=0.5)
    with pytest.raises(SpecError, match="positive"):
        Ramp(0, 1, shape="exponential")
    with pytest.raises(SpecError, match="share"):
        WarmUp(2.0)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def test_warming_up_reads_weights_as_they_are_and_evaluates_quantized() -> None:
    net = model()
    inputs = torch.ones(2, 4)
    plain = net(inputs).detach()
    run = dither.attach(net, {"*.weight": LSQ(2)}, steps=4, schedules=[WarmUp(0.5)])
    outputs = []
    for _ in range(4):
        outputs.append(torch.equal(net(inputs).detach(), plain))
        run.step()
    assert outputs == [True, True, False, False]

    run = dither.attach(run.detach(), {"*.weight": LSQ(2)}, steps=4, schedules=[WarmUp(0.5)])
    assert not torch.equal(net.eval()(inputs).detach(), plain)


def test_settings_follow_ramps_from_the_first_step_and_after_resuming() -> None:
    plan = {"*.weight": LSQ(4)}
    schedule = Vary("lr", Ramp(1.0, 0.0), match="0.*")

    def settings(run: Run) -> list[float]:
        return [round(surrogate.lr, 3) for surrogate in run.surrogates.values()]

    run = dither.attach(model(), plan, steps=4, schedules=[schedule])
    seen = [settings(run)]
    for _ in range(2):
        run.step()
        seen.append(settings(run))
    assert seen == [[1.0, 0.001], [0.75, 0.001], [0.5, 0.001]]
    again = dither.attach(model(), plan, steps=4, schedules=[schedule])
    again.load_state_dict(run.state_dict())
    assert settings(again) == [0.5, 0.001]
    with pytest.raises(SpecError, match="'zeal'"):
        dither.attach(model(), plan, steps=4, schedules=[Vary("zeal", Ramp(0, 1))])


def test_schedules_see_every_step_once_and_step_zero() -> None:
    steps: list[int] = []
    run = dither.attach(model(), {"*": LSQ(4)}, schedules=[lambda run, step: steps.append(step)])
    for _ in range(3):
        run.step()
    assert steps == [0, 1, 2, 3]
