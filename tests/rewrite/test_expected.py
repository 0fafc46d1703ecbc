"""What batch norms tell without data, against what is sampled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dither.core import SpecError
from dither.encoders import Ranges
from dither.formats import Affine
from dither.rewrite import (
    Channels,
    Passing,
    correct_biases,
    correct_biases_by_norms,
    expected_input,
    expected_inputs,
    fold_batch_norm,
)
from dither.rewrite.channels import Layer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


KNOWN = Channels(torch.tensor([-2.0, -0.3, 0.0, 0.8, 5.5]), torch.tensor([1.0, 0.5, 2.0, 0.1, 1.5]))


FUNCTIONS = (
    *(nn.ReLU(), nn.ReLU6(inplace=True), nn.LeakyReLU(0.2), nn.Hardswish(), nn.SiLU(), nn.GELU()),
    *(nn.Sigmoid(), nn.Hardtanh(-1, 2), nn.Tanh()),
)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: type(f).__name__)
def test_moments_and_ends_behind_a_function_are_those_of_samples(function: nn.Module) -> None:
    found = Passing.normal(KNOWN).through(function)
    assert found.mean is not None
    assert found.deviation is not None
    assert found.low is not None
    assert found.high is not None
    drawn = function(KNOWN.mean + KNOWN.deviation * normal(400_000, 5)).double()
    spread = drawn.std(0)
    assert bool(((found.mean - drawn.mean(0)).abs() < 5 * spread / 400_000**0.5 + 1e-6).all())
    assert torch.allclose(found.deviation, spread, rtol=0.02, atol=1e-3)
    assert bool((found.low <= drawn.amin(0) + 1e-5).all())
    assert bool((found.high >= drawn.amax(0) - 1e-5).all())


def test_quadrature_is_the_closed_form_for_relu_and_relu6() -> None:
    for function, ceiling in ((nn.ReLU(), None), (nn.ReLU6(), 6.0)):
        found = Passing.normal(KNOWN).through(function).mean
        assert found is not None
        assert torch.allclose(found.float(), expected_input(KNOWN, ceiling), atol=1e-5)


class Net(nn.Module):
    """Expand, depthwise, project around a residual, then a head, and a layer without a norm."""

    def __init__(self, *, functions: bool = False) -> None:
        super().__init__()
        self.functions = functions
        self.stem, self.stem_norm = nn.Conv2d(12, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(24)
        self.project, self.project_norm = nn.Conv2d(24, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.head, self.head_norm = nn.Conv2d(24, 40, 1), nn.BatchNorm2d(40, affine=False)
        self.bare, self.act, self.pool = nn.Conv2d(40, 16, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1)
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        act: Any = functional.relu6 if self.functions else self.act
        x = act(self.stem_norm(self.stem(x)))
        y = act(self.depthwise_norm(self.depthwise(x)))
        y = self.project_norm(self.project(y))
        x = torch.add(x, y) if self.functions else x + y
        x = self.bare(act(self.head_norm(self.head(x))))
        x = x.mean((2, 3)) if self.functions else self.pool(x).flatten(1)
        logits: Tensor = self.last(x)
        return logits


def settled(**settings: bool) -> Net:
    """Statistics of all norms are those of much data, so that norms say what is so."""
    torch.manual_seed(0)
    net = Net(**settings)
    for norm in (net.stem_norm, net.depthwise_norm, net.project_norm):
        nn.init.uniform_(norm.weight, 0.3, 2.0)
        nn.init.uniform_(norm.bias, -1, 2)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    with torch.no_grad():
        for seed in range(4):
            net.train()(normal(64, 12, 16, 16, seed=seed))
    return net.eval()


def passed(net: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """What goes into each layer, ``(values, channels)``."""
    found: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        if isinstance(module, Layer):

            def note(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                found[name] = args[0].transpose(0, 1).flatten(1).T

            module.register_forward_pre_hook(note)
    with torch.no_grad():
        net(batch)
    return found


@pytest.mark.parametrize("is_folded", [False, True])
@pytest.mark.parametrize("functions", [False, True])
def test_what_goes_into_layers_is_what_norms_say(is_folded: bool, functions: bool) -> None:
    net = settled(functions=functions)
    channels = fold_batch_norm(net) if is_folded else None
    found = expected_inputs(net, channels)
    assert list(found) == ["depthwise", "project", "head", "bare", "last"]
    seen = passed(copy.deepcopy(net), normal(64, 12, 16, 16, seed=9))
    for name, passing in found.items():
        assert passing.mean is not None
        spread = seen[name].double().std(0)
        wrong = (passing.mean - seen[name].double().mean(0)).abs() / spread
        # Behind the mean of images, the spread is only that between images.
        assert float(wrong.max()) < (1.0 if name == "last" else 0.15), name
        if name == "last":
            assert passing.low is None
            continue
        assert passing.low is not None
        assert passing.high is not None
        outside = (seen[name] < passing.low - 1e-4) | (seen[name] > passing.high + 1e-4)
        assert float(outside.float().mean()) < 1e-4, name
        width = float(passing.high.max() - passing.low.min())
        assert width < 2.5 * float(seen[name].max() - seen[name].min()), name


def test_inputs_that_are_told_are_known_too() -> None:
    net = settled()
    known = Channels(torch.full((12,), 0.5), torch.full((12,), 2.0))
    found = expected_inputs(net, inputs=known)
    stem = found["stem"]
    assert stem.mean is not None
    assert stem.low is not None
    assert stem.mean.tolist() == [0.5] * 12
    assert stem.low.tolist() == [-11.5] * 12


def test_the_whole_model_is_corrected_without_data() -> None:
    original = settled()
    channels = fold_batch_norm(original)
    model = copy.deepcopy(original)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Layer):
                coded = Ranges(Affine(3), "minmax").encode(module.weight)
                module.weight.copy_(coded.decode())
    measured, analytic = copy.deepcopy(model), copy.deepcopy(model)
    batch = normal(64, 12, 16, 16, seed=9)
    by_data = correct_biases(measured, original, [batch])
    by_norms = correct_biases_by_norms(analytic, original, expected_inputs(original, channels))
    assert list(by_norms) == list(by_data)[1:]  # nothing is known of the image

    def off(one: nn.Module) -> float:
        """Mean outputs against the original's, in deviations."""
        with torch.no_grad():
            made, wanted = one(batch), original(batch)
        return float(((made - wanted).mean(0) / wanted.std(0)).abs().mean())

    plain, told, seen = off(model), off(analytic), off(measured)
    assert told < 0.4 * plain
    assert seen < told  # what is measured is exact
    for name in ("depthwise", "project", "head"):
        assert float((by_norms[name] - by_data[name]).norm() / by_data[name].norm()) < 0.6, name


def test_what_is_not_known_is_left_alone() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.twice, self.last = (
                nn.BatchNorm2d(4),
                nn.Conv2d(4, 4, 1),
                nn.Linear(4, 2),
            )
            self.wide = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            x = self.twice(self.twice(x))
            x = self.wide(torch.cat([x, self.norm(x)], 1))
            logits: Tensor = self.last(x.amax((2, 3)))
            return logits

    net = Odd().eval()
    assert expected_inputs(net) == {}
    shifts = correct_biases_by_norms(copy.deepcopy(net), net, expected_inputs(net))
    assert shifts == {}
    with pytest.raises(SpecError, match="'stem' has 24 channels"):
        expected_inputs(settled(), {"stem": KNOWN})


def test_ends_pass_maxima_where_means_do_not() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 1)).eval()
    found = expected_inputs(net)["3"]
    assert found.mean is None
    assert found.low is not None
    assert found.high is not None
    assert found.low.tolist() == [0, 0, 0]
    assert found.high.tolist() == [6, 6, 6]
    assert correct_biases_by_norms(copy.deepcopy(net), net, {"3": found}) == {}
