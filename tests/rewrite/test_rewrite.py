"""Rewrites: the function is preserved where that is claimed, and means are restored."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from dither.core import SpecError
from dither.encoders import Nearest
from dither.formats import Affine
from dither.rewrite import (
    Channels,
    absorb_biases,
    chains,
    correct_bias,
    correct_biases,
    equalize,
    expected_input,
    fold_batch_norm,
)
from dither.rewrite.channels import Layer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


Model = TypeVar("Model", bound=nn.Module)


def awaken(model: Model) -> Model:
    """Random running statistics, weights and biases of batch norms, channels of unlike ranges."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            for tensor in (module.running_var, module.weight.data):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 4 + 0.05)
            for tensor in (module.running_mean, module.bias.data):
                assert tensor is not None
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model.eval()


def alike(one: nn.Module, other: nn.Module, *shape: int) -> float:
    """The largest difference relative to the largest output."""
    with torch.no_grad():
        a, b = one(normal(*shape)), other(normal(*shape))
    return float((a - b).abs().max() / a.abs().max())


class Depthwise(nn.Module):
    """Expand, depthwise, project, with a residual around, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(4, 12, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(12)
        self.project = nn.Conv2d(12, 4, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.expand_norm(self.expand(x)))
        y = nn.functional.relu(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(y)) + x
        logits: Tensor = self.head(torch.flatten(y, 1))
        return logits


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Linear(6, 5), nn.BatchNorm1d(5)], (7, 6)),
        ([nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6)], (3, 4, 8)),
        ([nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)], (3, 4, 8, 8)),
        ([nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)], (2, 2, 4, 4, 4)),
        ([nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)], (3, 4, 5, 5)),
        ([nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), nn.BatchNorm1d(6)], (3, 4, 5)),
    ],
    ids=lambda x: type(x[0]).__name__,
)
def test_folding_preserves_the_function(layers: list[nn.Module], shape: tuple[int, ...]) -> None:
    model = awaken(nn.Sequential(*layers))
    before = copy.deepcopy(model)
    folded = fold_batch_norm(model)
    assert isinstance(model[1], nn.Identity)
    assert alike(before, model, *shape) < 2e-6
    norm: Any = before[1]
    assert torch.equal(folded["0"].mean, norm.bias)
    assert torch.equal(folded["0"].deviation, norm.weight.abs())


def test_folding_a_whole_network() -> None:
    model = awaken(Depthwise())
    before = copy.deepcopy(model)
    assert list(fold_batch_norm(model)) == ["expand", "depthwise", "project"]
    assert alike(before, model, 3, 4, 6, 6) < 1e-5


class Shared(nn.Module):
    """A layer that another reader sees before the norm, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.read_norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.twice, self.twice_norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.read(x)
        y = self.read_norm(y) + y
        logits: Tensor = self.twice_norm(self.twice(self.twice(y)))
        return logits


def test_what_cannot_be_folded_is_left() -> None:
    model = awaken(Shared())
    assert fold_batch_norm(model) == {}
    assert fold_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))) != {}
    alone = nn.BatchNorm1d(2, track_running_stats=False)
    assert fold_batch_norm(nn.Sequential(nn.Linear(2, 2), alone)) == {}
    with pytest.raises(SpecError, match="no running statistics"):
        fold_batch_norm(nn.Sequential(nn.Linear(2, 2), alone), [("0", "1")])
    with pytest.raises(SpecError, match="give a batch norm"):
        fold_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), [("0", "1")])
    with pytest.raises(SpecError, match="no layer 'x'"):
        fold_batch_norm(nn.Sequential(nn.Linear(2, 2)), [("x", "0")])


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.layer(x))) if x.sum() > 0 else x


def test_names_where_tracing_fails() -> None:
    model = awaken(Branching())
    before = copy.deepcopy(model)
    with pytest.raises(SpecError, match=r"torch.fx cannot trace this Branching .*give the names"):
        fold_batch_norm(model)
    assert list(fold_batch_norm(model, [("layer", "norm")])) == ["layer"]
    assert alike(before, model, 5, 4) < 1e-5


def test_equalization_preserves_the_function_and_balances_ranges() -> None:
    model = awaken(Depthwise())
    fold_batch_norm(model)
    assert chains(model) == [("expand", "depthwise"), ("depthwise", "project")]
    before = copy.deepcopy(model)
    factors = equalize(model)
    assert alike(before, model, 3, 4, 6, 6) < 1e-5
    one, old = (m.expand.weight.detach().abs().amax((1, 2, 3)) for m in (model, before))
    middle = model.depthwise.weight.abs().amax((1, 2, 3))
    assert torch.allclose(one, middle, rtol=1e-3)
    assert torch.allclose(middle, model.project.weight.abs().amax((0, 2, 3)), rtol=1e-3)
    assert float((one / old - 1).abs().max()) > 0.1
    biases = model.expand.bias, before.expand.bias
    assert biases[0] is not None
    assert biases[1] is not None
    change = biases[0].detach() / biases[1].detach()
    assert torch.allclose(change, factors["expand"], rtol=1e-4)


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Linear(5, 6), nn.LeakyReLU(), nn.Dropout(), nn.Linear(6, 3)], (4, 5)),
        (
            [nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(4, 6, 2, groups=2)],
            (2, 3, 8, 8),
        ),
        (
            [nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 3, 2)],
            (2, 4, 4, 4),
        ),
        ([nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)], (2, 3, 4, 4)),
    ],
    ids=["linear", "groups", "transposed", "flattened"],
)
def test_equalization_of_all_kinds(layers: list[Any], shape: tuple[int, ...]) -> None:
    model = nn.Sequential(*layers).eval()
    layers[0].weight.data *= torch.logspace(-1, 1, layers[0].weight.shape[1])[
        (None, slice(None), *[None] * (layers[0].weight.ndim - 2))
    ]
    before = copy.deepcopy(model)
    assert len(equalize(model)) == 1
    assert alike(before, model, *shape) < 1e-5


def test_dead_channels_and_other_activations_stay() -> None:
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    model = nn.Sequential(first, nn.ReLU(), second)
    first.weight.data[1] = 0
    second.weight.data[:, 2] = 0
    before = copy.deepcopy(model)
    factors = equalize(model)["0"]
    assert factors[1] == factors[2] == 1
    assert alike(before, model, 5, 3) < 1e-5
    assert equalize(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))) == {}
    assert equalize(nn.Sequential(nn.Linear(3, 4), nn.ReLU6(), nn.Linear(4, 2))) == {}
    with pytest.raises(SpecError, match="4 channels do not fit 2 inputs"):
        equalize(nn.Sequential(nn.Linear(3, 4), nn.Linear(2, 2)), [("0", "1")])


@pytest.mark.parametrize("kind", ["linear", "conv", "groups", "flattened"])
def test_absorption_preserves_the_function_above_the_excess(kind: str) -> None:
    second: Any = {
        "linear": nn.Linear(4, 3),
        "conv": nn.Conv2d(4, 3, 2, bias=False),
        "groups": nn.Conv2d(4, 4, 2, groups=4),
        "flattened": nn.Linear(4 * 9, 3),
    }[kind]
    first: Any = nn.Linear(5, 4) if kind == "linear" else nn.Conv2d(5, 4, 1)
    between = [nn.ReLU(), nn.Flatten()] if kind == "flattened" else [nn.ReLU()]
    model = nn.Sequential(first, *between, second)
    first.bias.data += 20
    before = copy.deepcopy(model)
    known = {"0": Channels(torch.tensor([20.0, 5.0, 1.0, -3.0]), torch.ones(4))}
    taken = absorb_biases(model, known)["0"]
    assert taken.tolist() == [17, 2, 0, 0]
    shape = (6, 5) if kind == "linear" else (6, 5, 3, 3)
    assert alike(before, model, *shape) < 1e-5
    biases: list[Any] = [before[0].bias, model[0].bias]
    gone = biases[0] - biases[1]
    assert torch.allclose(gone, taken, atol=1e-5)
    with pytest.raises(SpecError, match="not those given"):
        absorb_biases(model, {"0": Channels(torch.ones(3), torch.ones(3))})


def test_the_mean_of_a_relu() -> None:
    mean, deviation = torch.tensor([-1.0, 0.0, 0.5, 3.0]), torch.tensor([1.0, 2.0, 0.3, 1.0])
    drawn = torch.relu(mean + deviation * normal(400_000, 4)).mean(0)
    assert torch.allclose(expected_input(Channels(mean, deviation)), drawn, atol=0.01)
    certain = expected_input(Channels(torch.tensor([2.0, -2.0]), torch.zeros(2)))
    assert certain.tolist() == [2, 0]


def encoded(model: Model, step: float) -> Model:
    made = copy.deepcopy(model)
    for module in made.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            coded = Nearest(Affine(None), step).encode(module.weight + 0.2 * step)
            module.weight.data.copy_(coded.decode())
    return made


def test_empirical_correction_restores_every_mean() -> None:
    original = awaken(Depthwise())
    fold_batch_norm(original)
    model, loader = encoded(original, 0.4), [normal(40, 4, 6, 6), normal(40, 4, 6, 6, seed=1)]
    model.head.register_parameter("bias", None)
    uncorrected = copy.deepcopy(model)
    model.train()
    shifts = correct_biases(model, original, loader)
    assert model.training
    assert list(shifts) == ["expand", "depthwise", "project", "head"]
    assert not any(m._forward_hooks for m in [*model.modules(), *original.modules()])
    model.eval()
    with torch.no_grad():
        wanted, found, worse = (m(torch.cat(loader)) for m in (original, model, uncorrected.eval()))
    spread = float(wanted.std())
    assert float((wanted - found).mean(0).abs().max()) < 1e-4 * spread
    assert float((wanted - worse).mean(0).abs().max()) > 0.05 * spread
    assert (found - wanted).square().mean() < (worse - wanted).square().mean()
    with pytest.raises(SpecError, match="no batch"):
        correct_biases(model, original, [])


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(6, 4), nn.Conv2d(6, 4, 3, groups=2, bias=False), nn.ConvTranspose2d(6, 4, 2, 2)],
    ids=lambda x: type(x).__name__,
)
def test_analytic_correction_restores_the_mean(layer: Layer) -> None:
    known = Channels(torch.linspace(-1, 2, 6), torch.linspace(0.5, 1.5, 6))
    shape = (2000, 6) if isinstance(layer, nn.Linear) else (400, 6, 5, 5)
    spread = (slice(None), *[None] * (len(shape) - 2))
    values = torch.relu(known.mean[spread] + known.deviation[spread] * normal(*shape))
    model: Any = encoded(nn.Sequential(layer), 0.5)[0]

    def mean(module: nn.Module) -> Tensor:
        with torch.no_grad():
            output: Tensor = module(values)
        return output.transpose(0, 1).flatten(1).mean(1)

    before = float((mean(model) - mean(layer)).abs().max())
    correct_bias(model, layer.weight, expected_input(known))
    assert float((mean(model) - mean(layer)).abs().max()) < 0.2 * before
    with pytest.raises(SpecError, match="the original weight is"):
        correct_bias(model, layer.weight[:1], expected_input(known))
