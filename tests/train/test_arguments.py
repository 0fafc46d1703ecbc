"""What is no plan, size, loader or optimizer is refused at once, and leaves the model as it was."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dither
from dither import LSQ, Affine, Budget, BudgetError, Plan, SpecError, attach
from dither.train import Dampening


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))


NO_PLANS: dict[str, Any] = {
    "a number": 5,
    "a text": "LSQ",
    "a method": LSQ(4),
    "a class": LSQ,
    "a number for a glob": {3: LSQ(4)},
    "a text for a spec": {"*": "4 bits"},  # it has `encode`, as an encoder has
    "bytes for a spec": {"*": b"4"},
    "nothing for a spec": {"*": None},
    "a class for a spec": {"*": Affine},
    "a plan for a spec": {"*": Plan({})},
    "a method at a site": {"*@in": LSQ(4)},
    "an activation for weights": {"*": dither.Activation(8)},
    "no rules": {},
}


@pytest.mark.parametrize("plan", NO_PLANS.values(), ids=NO_PLANS.keys())
def test_what_is_no_plan_is_refused(plan: Any) -> None:  # noqa: ANN401
    with pytest.raises(
        SpecError, match=r"Activation\(|a plan maps|LSQ\(4\)|in place of an instance"
    ):
        attach(net(), plan)
    if not isinstance(plan, str):  # that is the name of a file
        with pytest.raises(SpecError):
            dither.diagnose(net(), [torch.randn(4, 64)], plan)


SIZES: tuple[Any, ...] = (
    4000,
    4e3,
    np.int64(4000),
    np.float32(4000),
    "4kB",
    "2x",
    "14 bits",
    "50%",
)


@pytest.mark.parametrize("size", SIZES, ids=repr)
def test_attach_plan_and_compress_take_the_same_sizes(size: Any) -> None:  # noqa: ANN401
    for budget in (size, Budget(size), Budget("5kB", start=size)):
        assert attach(net(), budget=budget, steps=4).controller is not None
    assert dither.compress(net(), size).nbytes
    assert dither.plan(net(), size).sizes == dither.plan(net(), [size]).sizes


@pytest.mark.parametrize("size", [6.5, math.nan, math.inf, True, [3], {}, "x", "9 parsecs", 0, -1])
def test_what_is_no_size_is_refused(size: Any) -> None:  # noqa: ANN401
    for budget in (size, Budget(size), Budget("5kB", start=size)):
        with pytest.raises(BudgetError):
            attach(net(), budget=budget, steps=4)
    with pytest.raises(BudgetError):
        dither.compress(net(), size)
    with pytest.raises(BudgetError):
        dither.plan(net(), [size])
    if not isinstance(size, list):
        with pytest.raises(BudgetError):
            dither.plan(net(), size)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"steps": "5"}, "steps is a whole number"),
        ({"steps": 2.5}, "steps is a whole number"),
        ({"noise": "seed"}, "noise is a seed"),
        ({"optimizer": 5}, "optimizer is one of torch.optim"),
    ],
)
def test_arguments_of_another_kind_are_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        attach(net(), {"*": LSQ(4)}, **given)
    for model in (5, net().state_dict()):
        with pytest.raises(SpecError, match="attach takes a model"):
            attach(model, {"*": LSQ(4)})  # type: ignore[arg-type]
    for share in ("0.5", 0, math.nan):
        with pytest.raises(SpecError, match="share of the steps"):
            Budget("5kB", arrive=share)  # type: ignore[arg-type]


def test_what_could_not_begin_leaves_the_model_as_it_was() -> None:
    model = net()
    before = [type(module) for module in model.modules()]

    def fail(run: object, step: int) -> None:
        raise RuntimeError(f"{run} {step}")

    for settings in (
        {"penalties": 5},
        {"schedules": [fail]},
        {"penalties": [Dampening(0.1)], "schedules": 5},
    ):
        with pytest.raises((RuntimeError, TypeError)):
            attach(model, {"*": LSQ(4)}, **settings)
        assert [type(module) for module in model.modules()] == before
    assert attach(model, {"*": LSQ(4)}).surrogates
