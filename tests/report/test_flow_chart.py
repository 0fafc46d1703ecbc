"""The flow chart names the remedy for what was broken on purpose, and tries it by real passes."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import dither
from dither import Activation, Affine, SpecError
from dither.encoders import Ranges
from dither.report import Diagnosis
from dither.testing import same_bits


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def perceptron(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layer = nn.Linear(inputs, outputs)
        nn.init.normal_(layer.weight, std=inputs**-0.5)
        layers += [layer, nn.Tanh()]  # nothing to equalize
    return nn.Sequential(*layers[:-1])


def batches(width: int, count: int = 3) -> list[Tensor]:
    return [normal(64, width, seed=seed) for seed in range(count)]


def trial(found: Diagnosis, start: str) -> dither.report.diagnosis.Trial:
    return next(t for t in found.trials if t.remedy.startswith(start))


def whole(found: Diagnosis, name: str) -> float:
    return next(part.distance for part in found.overall if part.name == name)


def test_rows_of_unlike_ranges_need_a_scale_each() -> None:
    model = perceptron(16, 32, 8)
    with torch.no_grad():
        scales = 2.0 ** -torch.arange(8.0)
        for value in model[2].parameters():
            value.mul_(scales.view(8, *[1] * (value.ndim - 1)))
    data = dither.Data(batches(16), distance=lambda a, b: ((a - b) / scales).square().mean())
    plan = {"*.weight": Affine(6)}
    found = dither.diagnose(model, data, plan, allowed=1e-3)
    assert whole(found, "weights") > 1e-3
    assert found.next_step == "weights: a scale for each output (axis=0), least squared error"
    assert not trial(found, "ranges of the least").is_enough
    # What was tried is what the plan would give.
    own = dither.diagnose(model, data, {"*.weight": Ranges(Affine(6, axis=0))})
    assert trial(found, "a scale for each").distance == pytest.approx(whole(own, "weights"))


def test_a_few_bad_tensors_are_named() -> None:
    model = perceptron(*([24] * 13))
    plan = {"10.weight": Affine(2, axis=0), "*.weight": Affine(8, axis=0)}
    found = dither.diagnose(model, batches(24), plan, allowed=1e-3)
    assert found.next_step.startswith("weights: more bits for 10.weight")
    assert "of 12" in found.next_step
    assert "a scale for each" not in str(found.trials)  # there is one already


def test_activations_with_rare_great_values_need_least_squares() -> None:
    model = perceptron(32, 32, 4)
    some = batches(32)
    for batch in some:
        batch[0, 0] = 40.0
    plan = {"*.weight": Affine(8, axis=0), "*@in": Activation(4)}
    found = dither.diagnose(model, some, plan, allowed=0.5)
    assert whole(found, "weights") < 0.5 < whole(found, "activations")
    assert found.next_step == "activations: ranges='mse'"
    own = dither.diagnose(model, some, {"*@in": Activation(4, ranges="mse")})
    assert trial(found, "ranges='mse'").distance == pytest.approx(whole(own, "activations"))


def test_channels_that_can_be_equalized_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    factors = 2.0 ** (torch.arange(32.0) % 8 - 4)
    with torch.no_grad():
        for value in model[0].parameters():
            value.mul_(factors.view(32, *[1] * (value.ndim - 1)))
        model[2].get_parameter("weight").div_(factors)
    before = copy.deepcopy(model)
    found = dither.diagnose(model, batches(16), {"*.weight": Affine(5)}, allowed=0.01)
    assert found.next_step.startswith("weights: layers equalized")
    assert all(
        same_bits(a, b)
        for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_no_quick_remedy_mends_goes_on_to_adaround_and_training() -> None:
    model = perceptron(16, 32, 8)
    found = dither.diagnose(model, batches(16), {"*.weight": Affine(2)}, allowed=1e-4)
    assert "AdaRound" in found.next_step
    assert not any(t.is_enough for t in found.trials)
    best = min(found.trials, key=lambda t: t.distance)
    assert best.remedy in found.next_step  # it helps, though not enough
    found = dither.diagnose(model, batches(16), {"*@in": Activation(2)}, allowed=1e-4)
    assert "learned ranges" in found.next_step


def test_where_nothing_is_lost_there_is_nothing_to_do() -> None:
    model, data = perceptron(16, 32, 8), batches(16)
    found = dither.diagnose(model, data, allowed=0.5)
    assert found.next_step.startswith("none: ")
    assert not found.trials
    assert dither.diagnose(model, data).next_step == ""
    both = whole(dither.diagnose(model, data), "both")
    sides = max(whole(found, "weights"), whole(found, "activations"))
    between = dither.diagnose(model, data, allowed=(both + sides) / 2)
    assert "both together" in between.next_step


def test_scores_count_where_there_are_any() -> None:
    model, data = perceptron(16, 32, 8), batches(16)
    wanted = [model(batch).detach() for batch in data]

    def score(one: nn.Module) -> float:
        with torch.no_grad():
            pairs = zip(data, wanted, strict=True)
            return 50 - 100 * sum(float((one(b) - w).square().mean()) for b, w in pairs)

    found = dither.diagnose(model, data, {"*.weight": Affine(3)}, evaluate=score, allowed=2.0)
    assert all(t.score is not None and t.is_enough == (t.score >= 48) for t in found.trials)
    loss = 50 - next(part.score or 0.0 for part in found.overall if part.name == "weights")
    same = dither.diagnose(
        model, data, {"*.weight": Affine(3)}, evaluate=score, allowed=loss + 1e-6
    )
    assert same.next_step.startswith("none")
    for allowed in (-1.0, math.nan):
        with pytest.raises(SpecError, match="0 or more"):
            dither.diagnose(model, data, allowed=allowed)


def test_an_original_that_varies_comes_first() -> None:
    class Varies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x)
            return y + torch.randn_like(y)

    found = dither.diagnose(Varies(), [torch.ones(8, 4)], allowed=1e-3)
    assert found.next_step.startswith("make the original give the same")


def test_the_step_is_in_table_and_json() -> None:
    model = perceptron(16, 32, 8)
    found = dither.diagnose(model, batches(16), {"*.weight": Affine(3)}, allowed=1e-3)
    assert str(found).endswith(f"next: {found.next_step}")
    assert trial(found, "ranges").remedy in str(found)
    told = found.to_json()
    assert told["next_step"] == found.next_step
    assert [t["remedy"] for t in told["trials"]] == [t.remedy for t in found.trials]
