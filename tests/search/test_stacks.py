"""Tensors that hold several matrices, as experts do, are stored as if each stood alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import dither
from dither.model import collect
from dither.search import data_free
from dither.search.priors import prior_gram


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


EXPERTS, OUTPUTS, INPUTS = 4, 48, 32


class Experts(nn.Module):
    """All experts in one tensor; its name says nothing of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(normal(EXPERTS, OUTPUTS, INPUTS))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eoi->...o", x, self.first)


class Turned(nn.Module):
    """Experts that are multiplied from the left, as transformers marks them."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(normal(EXPERTS, OUTPUTS, INPUTS))


def normed_convolution() -> nn.Module:
    made: nn.Module = weight_norm(nn.Conv1d(32, 48, 16))
    return made


class OwnConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(normal(48, 32, 16))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(Experts()), {"0.first"}),
        (nn.ModuleDict({"experts": nn.Conv1d(64, 48, 33)}), set()),
        (nn.ModuleDict({"experts": normed_convolution()}), set()),
        (nn.ConvTranspose1d(64, 48, 16), set()),
        (OwnConv(), set()),
        (Turned(), set()),
        (nn.Bilinear(16, 24, 8), {"weight"}),
    ],
)
def test_owners_tell_stacks(model: nn.Module, expected: set[str]) -> None:
    assert collect(model).stacks == expected


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("layers.0.mlp.experts.gate_up_proj", (8, 64, 32), True),
        ("layers.0.mlp.experts.weight", (8, 64, 32), True),
        ("layers.0.experts.conv.weight", (64, 32, 9), False),
        ("layers.0.conv.weight", (64, 32, 9), False),
        ("experts.gate_up_proj", (1, 64, 32), False),
        ("experts.bias", (8, 1, 32), False),
    ],
)
def test_names_tell_stacks(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert (name in collect({name: torch.zeros(shape)}).stacks) == expected


@pytest.mark.parametrize("is_turned", [False, True])
def test_projections_that_fit_the_other_way_round(is_turned: bool) -> None:
    up, down = normal(4, 64, 16), normal(4, 16, 32)
    if is_turned:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    weights = {"experts.gate_up_proj": up, "experts.down_proj": down}
    assert collect(weights).stacks == (set() if is_turned else set(weights))


def test_knowledge_is_that_of_each_matrix() -> None:
    model = Experts()
    tensors = collect(model)
    alone = data_free({"a": model.first[0].detach()})["a"]
    stacked = data_free({"experts.up": model.first.detach()})["experts.up"]
    assert stacked.sensitivity == alone.sensitivity
    assert stacked.gram is alone.gram
    assert stacked.is_stack
    assert tensors.stacks == {"first"}
    kernel = data_free({"conv.weight": normal(48, 32, 9)})["conv.weight"]
    assert kernel.gram is not None
    assert len(kernel.gram) == 32 * 9
    assert not kernel.is_stack
    assert not data_free({"conv.weight": normal(48, 1, 9)})["conv.weight"].is_stack


def output_error(weight: Tensor, decoded: Tensor) -> float:
    gram = prior_gram(weight[0])
    error = (decoded - weight).flatten(0, 1)
    assert gram is not None
    return float((error @ gram * error).sum() / (weight.flatten(0, 1).square()).sum())


@pytest.mark.parametrize("size", ["4 bits", "3 bits", "2 bits"])
def test_a_stack_is_as_good_as_its_matrices(size: str) -> None:
    model = Experts()
    weight = model.first.detach()
    archive = dither.compress(model, size)
    apart = dither.compress({f"e{i}": part for i, part in enumerate(weight)}, archive.nbytes)
    split = torch.stack([apart[f"e{i}"] for i in range(EXPERTS)])
    named = dither.compress({"experts.first": weight}, archive.nbytes + 8)
    ours = output_error(weight, archive["first"])
    assert archive["first"].shape == weight.shape
    assert ours < 1.03 * output_error(weight, split)
    assert output_error(weight, named["experts.first"]) < 1.03 * output_error(weight, split)
    as_kernel = dither.compress({"kernel": weight}, archive.nbytes)
    assert ours < 0.9 * output_error(weight, as_kernel["kernel"])


def test_a_stack_is_saved_and_loaded(tmp_path: object) -> None:
    model = nn.Sequential(nn.Linear(INPUTS, INPUTS), Experts())
    archive = dither.compress(model, "8x", data=[normal(16, INPUTS, seed=i) for i in range(2)])
    assert all(not getattr(trial, "error", "") for trial in archive.trials)
    archive.save(f"{tmp_path}/a.dither")
    assert torch.equal(dither.load(f"{tmp_path}/a.dither")["1.first"], archive["1.first"])
