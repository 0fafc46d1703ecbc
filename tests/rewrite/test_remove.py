"""Channels that are always zero go, with all that makes and reads them; the function stays."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dither import LSQ, Pruned, SpecError, attach
from dither.rewrite import remove_channels
from dither.train import OneShot
from dither.train.pruned import Masked


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics and parameters of batch norms, so that nothing is as it begins."""
    generator = torch.Generator().manual_seed(seed)
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            state = model.state_dict()
            for name in ("weight", "running_var"):
                value = state[f"{path}.{name}"]
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            for name in ("bias", "running_mean"):
                value = state[f"{path}.{name}"]
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return model.eval()


def dead(model: nn.Module, layer: str, rows: slice, norm: str = "") -> None:
    """Outputs of a layer that are 0, behind its batch norm if it has one."""
    state = model.state_dict()
    for name in (f"{layer}.weight", f"{layer}.bias", f"{norm}.bias", f"{norm}.running_mean"):
        if name in state:
            state[name][rows] = 0


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.one, self.one_norm = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.two, self.two_norm = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        y = self.deep(torch.relu(self.one_norm(self.one(x)))).relu()
        x = (x + self.two_norm(self.two(y))).relu()
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def mlp() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU()),
        *(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 4)),
    )


def cnn() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 6, 1), nn.ReLU6(), nn.AvgPool2d(2, padding=1), nn.Flatten()),
        nn.Linear(6 * 9, 5),
    )


def equal(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return torch.allclose(one(x), other(x), rtol=1e-5, atol=1e-5)


def test_a_chain_of_linear_layers() -> None:
    torch.manual_seed(0)
    model = filled(mlp())
    dead(model, "0", slice(3, 8), "1")
    dead(model, "3", slice(0, 2))
    before = copy.deepcopy(model)
    assert remove_channels(model) == {"0": 5, "3": 2}
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 2] == [
        (11, 6),
        (10, 11),
        (4, 10),
    ]
    assert equal(before, model, torch.randn(9, 6))


def test_convolutions_norms_pools_and_a_flattened_image() -> None:
    torch.manual_seed(0)
    model = filled(cnn())
    dead(model, "0", slice(0, 3), "1")
    dead(model, "4", slice(4, 6))
    before = copy.deepcopy(model)
    assert remove_channels(model) == {"0": 3, "4": 2}
    assert model.get_parameter("8.weight").shape == (5, 36)
    assert equal(before, model, torch.randn(2, 3, 10, 10))


def test_a_constant_below_zero_is_dead_behind_a_relu() -> None:
    torch.manual_seed(0)
    model = filled(cnn())
    model.state_dict()["1.weight"][:2] = 0  # gamma 0: beta is all that is left
    model.state_dict()["1.bias"][:4] = torch.tensor([-1.0, 1.0, -1.0, -1.0])
    before = copy.deepcopy(model)
    assert remove_channels(model) == {"0": 1}
    assert equal(before, model, torch.randn(2, 3, 10, 10))


def test_residual_blocks_need_all_branches() -> None:
    torch.manual_seed(0)
    model = filled(Residual())
    dead(model, "stem", slice(0, 3), "stem_norm")
    dead(model, "one", slice(5, 9), "one_norm")
    dead(model, "deep", slice(5, 9))
    before = copy.deepcopy(model)
    assert remove_channels(model) == {"one": 4}
    assert equal(before, model, torch.randn(2, 3, 6, 6))
    dead(model, "two", slice(1, 3), "two_norm")
    before = copy.deepcopy(model)
    assert remove_channels(model) == {"stem": 2, "two": 2}
    assert model.get_submodule("deep").groups == 8
    assert model.get_parameter("deep.weight").shape == (8, 1, 3, 3)
    assert model.get_parameter("head.weight").shape == (5, 6)
    assert equal(before, model, torch.randn(2, 3, 6, 6))


def test_a_depthwise_bias_keeps_a_channel() -> None:
    torch.manual_seed(0)
    model = filled(Residual())
    dead(model, "one", slice(5, 9), "one_norm")
    model.state_dict()["deep.bias"][5:9] = torch.tensor([1.0, -1.0, 0.0, 2.0])
    before = copy.deepcopy(model)
    assert remove_channels(model) == {"one": 2}  # behind -1 and 0 a ReLU gives 0
    assert equal(before, model, torch.randn(2, 3, 6, 6))


def test_one_channel_remains() -> None:
    model = filled(mlp())
    dead(model, "0", slice(0, 16), "1")
    before = copy.deepcopy(model)
    assert remove_channels(model) == {"0": 15}
    assert equal(before, model, torch.randn(3, 6))


class Softmaxed(nn.Module):
    """What is not known here may make anything of a zero."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x).softmax(-1))
        return out


class Twice(Softmaxed):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(self.one(x)[:, :6])[:, :8])
        return out


def _normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def _grouped() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(6, 8, 1), nn.Conv1d(8, 8, 1, groups=2), nn.Flatten())


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("make", [Softmaxed, Twice, _normed, _grouped, _tied])
def test_what_cannot_be_proven_stays(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    dead(model, next(iter(model.state_dict())).rpartition(".")[0], slice(0, 2))
    shapes = [p.shape for p in model.parameters()]
    assert remove_channels(model) == {}
    assert [p.shape for p in model.parameters()] == shapes


def test_pruned_channels_leave_the_model_and_the_file_is_smaller() -> None:
    torch.manual_seed(0)
    model = filled(mlp())
    plan = {name: Pruned(LSQ(8), OneShot(0.5), pattern="channels") for name in ("3.weight",)}
    run = attach(model, plan, steps=2)
    surrogate = run.surrogates["3.weight"]
    assert isinstance(surrogate, Masked)
    with torch.no_grad():
        model.get_parameter("3.bias").masked_fill_(~surrogate.mask[:, 0], 0.0)
    run.step()
    before = run.finish()
    detached = run.detach(commit=True)
    x = torch.randn(5, 6)
    wanted = detached(x)
    assert remove_channels(detached) == {"3": 6}
    assert torch.allclose(detached(x), wanted, atol=1e-5)
    again = attach(detached, {"3.weight": LSQ(8)}, steps=1)
    assert again.finish() < before


def test_refuses_an_attached_model() -> None:
    model = mlp()
    attach(model, {"*.weight": LSQ(4)})
    with pytest.raises(SpecError, match="attached"):
        remove_channels(model)
