"""Evaluation and the file agree bit for bit, however weights lie in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
from dither import LSQ, Affine, DiffQ
from dither.core import Encoder
from dither.train.method import Method


def channels_last() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def transposed() -> nn.Module:
    convolution, other = nn.Conv1d(8, 12, 3), nn.ConvTranspose1d(12, 5, 4)
    for layer in (convolution, other):
        turned = layer.weight.detach().transpose(0, 1).contiguous()
        layer.weight = nn.Parameter(turned.transpose(0, 1))
    return nn.Sequential(convolution, nn.Tanh(), other)


CASES: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (channels_last, (4, 8, 12, 12)),
    (transposed, (4, 8, 40)),
]


@pytest.mark.parametrize("spec", [LSQ(4), Affine(4), DiffQ()])
@pytest.mark.parametrize(("build", "shape"), CASES, ids=["channels last", "transposed"])
def test_outputs_are_those_of_the_file(
    build: Callable[[], nn.Module], shape: tuple[int, ...], spec: Encoder | Method, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model: Any = build()
    inputs = torch.randn(shape)
    run = dither.attach(model, {"*": spec})
    model(inputs).square().mean().backward()
    run.step()
    run.finish()
    run.save(tmp_path / "m.dither")
    torch.manual_seed(0)
    fresh: Any = build().eval()
    dither.load_into(fresh, tmp_path / "m.dither")
    with torch.no_grad():
        evaluated: Tensor = model.eval()(inputs)
        assert torch.equal(fresh(inputs), evaluated)
    seen = model[0]._modules["dither_shadows"]["weight"](model[0].weight)
    assert seen.stride() == fresh[0].weight.stride()
