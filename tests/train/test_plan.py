"""Plans: which tensor a rule matches, ties, JSON, and errors that say what to do."""

import json

import pytest
import torch
from torch import nn

from dither import LSQ, Affine, Plan, Raw, SpecError


def tied() -> nn.Module:
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 4), "head": nn.Linear(4, 10)})
    model["head"].weight = model["embedding"].weight
    return model


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_the_first_rule_wins() -> None:
    found = Plan({"*.bias": Raw(), "0.*": LSQ(3), "*": Affine(8)}).resolve(convolution())
    assert found == {
        "0.weight": LSQ(3),
        "0.bias": Raw(),
        "1.weight": Affine(8),
        "1.bias": Raw(),
    }


@pytest.mark.parametrize(
    ("glob", "is_named"),
    [("*", False), ("1.*", False), ("*norm*", False), ("*.running_mean", True), ("*mean", True)],
)
def test_buffers_must_be_named(glob: str, is_named: bool) -> None:
    found = Plan({glob: Affine(8), "0.weight": Raw()}).resolve(convolution())
    assert ("1.running_mean" in found) == is_named
    assert "1.num_batches_tracked" not in found


def test_a_tied_weight_stands_once_and_is_treated_one_way() -> None:
    assert set(Plan({"*.weight": Affine(4)}).resolve(tied())) == {"embedding.weight"}
    with pytest.raises(SpecError, match="same tensor"):
        Plan({"embedding.*": Affine(4), "*": Affine(8)}).resolve(tied())


def test_a_rule_that_names_nothing_is_refused() -> None:
    with pytest.raises(SpecError, match=r"'0.wieght'"):
        Plan({"0.wieght": Affine(4)}).resolve(convolution())


def test_json_keeps_order_and_settings() -> None:
    plan = Plan(
        {"*.bias": Raw(torch.float16), "*": LSQ(None, lr=0.01), "a": Affine(4, group=8)},
        owners={"a.weight": ""},
    )
    copy = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert copy == plan
    assert list(copy.rules) == list(plan.rules)


@pytest.mark.parametrize(
    "values",
    [{}, {"rules": 3}, {"rules": [["*"]]}, {"rules": [["*", {"method": "magic"}]]}],
)
def test_json_that_is_no_plan_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        Plan.from_json(values)


def test_a_plan_holds_specs() -> None:
    with pytest.raises(SpecError, match="globs to formats"):
        Plan({"*": 4})  # type: ignore[dict-item]
