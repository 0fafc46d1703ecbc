"""The benchmark of quantized gradients: what it moves, what it trains, and that it resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import gradients
from benchmarks.tasks import resnet20_cifar10
from benchmarks.traffic import Layer, backward, forward, layers_of, totals, written
from dither.activations import Activation, Gradient
from dither.activations.gradients import GradientQuantizer
from dither.activations.integer_grid import cover
from dither.activations.quantizer import Quantizer

IMAGES = 2


class FakeBatches:
    """A few random images instead of CIFAR-10."""

    per_epoch = 8

    def __init__(self, size: int, seed: int) -> None:
        del size
        self.seed = seed

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(100 * self.seed + number)
        images = torch.randn(IMAGES, 3, 32, 32, generator=generator)
        return images, torch.randint(0, 10, (IMAGES,), generator=generator)


# --- bytes ---------------------------------------------------------------------------------------


def test_a_layer_moves_what_counting_by_hand_gives() -> None:
    # 64 -> 64 channels, 3x3, 56x56: 36,864 weights, 200,704 numbers in, as many out.
    layer = Layer("conv", 64 * 64 * 9, 64 * 56 * 56, 64 * 56 * 56)
    assert forward(layer, "static") == 36_864 + 200_704 + 200_704 + 8
    assert forward(layer, "dynamic") == 438_272 + 8 + 2 * 4 * 200_704 == 2_043_912
    # For the inputs: weights, gradient, result. For the weights: inputs, gradient, result.
    inputs, weights = 36_864 + 200_704 + 200_704 + 16, 200_704 + 200_704 + 4 * 36_864
    assert backward(layer, "hindsight") == inputs + weights
    assert backward(layer, "dynamic") - backward(layer, "static") == 2 * 4 * 200_704


def test_a_first_layer_gives_no_gradient() -> None:
    first = Layer("conv", 432, 3072, 16_384, is_first=True)
    assert backward(first, "dynamic") == backward(first, "hindsight") == 3072 + 16_384 + 4 * 432


def test_expansion_of_channels_costs_dynamic_ranges_most() -> None:
    # 1x1 from 16 to 96 channels at 112x112: mostly output, so nearly the bound of 9.
    layer = Layer("expand", 16 * 96, 16 * 112 * 112, 96 * 112 * 112)
    assert forward(layer, "dynamic") / forward(layer, "static") == pytest.approx(7.85, abs=0.005)


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="hindsight"):
        written(1, "guess")


def test_layers_of_resnet20() -> None:
    layers = layers_of(resnet20_cifar10.ResNet20(), torch.zeros(1, 3, 32, 32))
    assert len(layers) == 20
    assert [layer.name for layer in layers if layer.is_first] == ["conv1"]
    assert (layers[0].inputs, layers[0].outputs, layers[-1].outputs) == (3 * 1024, 16 * 1024, 10)
    assert sum(layer.weights for layer in layers) == 269_722 - 2 * 688 - 10  # batch norm, bias
    outputs = 7 * 16 * 1024 + 6 * 32 * 256 + 6 * 64 * 64 + 10
    assert sum(layer.outputs for layer in layers) == outputs
    moved = {scheme: totals(layers, scheme, 64) for scheme in ("dynamic", "static")}
    assert moved["dynamic"]["forward"] - moved["static"]["forward"] == 64 * 8 * outputs
    assert moved["dynamic"]["results"] / moved["static"]["results"] == pytest.approx(9, abs=1e-3)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["dynamic", "running", "hindsight"])
def test_every_layer_is_quantized_in_all_three(arm: str) -> None:
    model = resnet20_cifar10.ResNet20()
    run = gradients.attach(model, arm, 8, 0)
    assert run is not None
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert set(run.surrogates) == {f"{name}.weight" for name in layers}
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer | GradientQuantizer)]
    assert len(quantizers) == 2 * len(layers) == 40
    for quantizer in quantizers:
        assert quantizer.spec.bits == 8
        assert quantizer.spec.dynamic is (arm == "dynamic")
        if isinstance(quantizer.spec, Activation):
            assert quantizer.spec.training == ("fixed" if arm == "dynamic" else arm)
        else:
            assert isinstance(quantizer, gradients.RunningGradient) is (arm == "running")


def test_running_ranges_include_the_gradient_at_hand() -> None:
    spec = Gradient(8, stochastic=False)
    running, hindsight = gradients.RunningGradient(spec), GradientQuantizer(spec)
    first, second = torch.tensor([-1.0, 2.0]), torch.tensor([-5.0, 0.3, 4.0])
    for quantizer in (running, hindsight):
        quantizer.quantize(first)
        quantizer.step()
    scale, zero = cover(torch.tensor([-1.4]), torch.tensor([2.2]), 8, symmetric=False)
    codes = ((second / scale).round() + zero).clamp(0, 255)
    assert torch.allclose(running.quantize(second), (codes - zero) * scale)
    hindsight.quantize(second)
    for quantizer in (running, hindsight):
        quantizer.step()
        assert torch.allclose(quantizer.low, torch.tensor([-1.4]))
        assert torch.allclose(quantizer.high, torch.tensor([2.2]))


@pytest.mark.parametrize("arm", ["fp32", "running", "hindsight"])
def test_training_takes_up_where_it_was_stopped(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resnet20_cifar10, "Batches", FakeBatches)
    setting = gradients.SETTINGS["scratch"]
    whole, _ = gradients.train(setting, arm, 3, tmp_path / "whole.pt", 3)
    gradients.train(setting, arm, 3, tmp_path / "parts.pt", 2)
    parts, _ = gradients.train(setting, arm, 3, tmp_path / "parts.pt", 3)
    assert whole.state_dict().keys() == parts.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(whole(image), parts(image))


def test_arms_of_a_seed_begin_alike_and_differ_by_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resnet20_cifar10, "Batches", FakeBatches)
    setting = gradients.SETTINGS["scratch"]
    assert gradients.attach(resnet20_cifar10.ResNet20(), "fp32", 8, 0) is None
    states: dict[str, Any] = {}
    for arm in ("dynamic", "hindsight", gradients.OTHER):
        model, _ = gradients.train(setting, arm, 0, tmp_path / f"{arm}.pt", 1)
        states[arm] = model.state_dict()
    # The first step has no hindsight: it uses the ranges of the tensors at hand.
    assert torch.equal(states["dynamic"]["conv1.weight"], states["hindsight"]["conv1.weight"])
    assert not torch.equal(
        states["dynamic"]["conv1.weight"], states[gradients.OTHER]["conv1.weight"]
    )


def test_learning_rates_rise_and_fall_to_nothing() -> None:
    shares = [gradients.share(step, 100) for step in range(101)]
    assert shares[0] == 1 / 20
    assert shares[19] == shares[20] == 1
    assert shares[100] == pytest.approx(0)
    assert shares[20:] == sorted(shares[20:], reverse=True)


def test_differences_are_of_the_same_seed_and_setting() -> None:
    def row(setting: str, arm: str, seed: int, test: float) -> dict[str, Any]:
        return {"setting": setting, "arm": arm, "seed": seed, "test": test, "dev": 0.0}

    rows = [
        row("scratch", "dynamic", 0, 50.0),
        row("scratch", "dynamic", 1, 60.0),
        row("scratch", "hindsight", 1, 59.5),
        row("scratch", "hindsight", 0, 50.3),
        row("scratch", "hindsight", 2, 99.0),
        row("checkpoint", "dynamic", 2, 90.0),
    ]
    assert gradients.differences(rows, "scratch", "hindsight", "test") == [0.3, -0.5]
    assert "| +0.30, -0.50 | -0.10 ± 0.40 |" in gradients.table(rows)
