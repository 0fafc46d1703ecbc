"""Files fill their budgets also where layers in sequence move what took no bytes before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.search import LEAST_SHARE, SLACK_NBYTES, Trial


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """As a transformer begins: biases are 0, and norms are 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return out


def untrained(depth: int = 2, width: int = 24) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(width) for _ in range(depth)], nn.Linear(width, 5)).eval()


MODEL = untrained()
BATCHES = [normal(32, 24, seed=i) for i in range(4)]


def check(archive: dither.Archive, budget: int) -> None:
    for trial in archive.trials:
        assert isinstance(trial, Trial)
        assert not trial.error
        least = min(LEAST_SHARE * budget, budget - SLACK_NBYTES)
        assert budget >= trial.nbytes >= least, trial


@pytest.mark.parametrize("bits", [1.5, 2, 3, 5])
def test_every_way_fills_its_budget(bits: float) -> None:
    values = sum(p.numel() for p in MODEL.parameters())
    budget = round(bits * values / 8)
    check(dither.compress(MODEL, budget, data=BATCHES), budget)


@pytest.mark.parametrize("ratio", [10])
def test_a_vision_transformer_fills_its_budget(ratio: int) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    settings |= {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**settings)).eval()
    batches = [{"pixel_values": normal(8, 3, 32, 32, seed=i)} for i in range(4)]
    data = dither.Data(batches, forward=lambda m, batch: m(**batch).logits)
    archive = dither.compress(model, f"{ratio}x", data=data)
    check(archive, sum(p.numel() for p in model.parameters()) * 4 // ratio)
