"""Sparse factors are trained end to end: their zeros stay, and what they compute gets better."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dither import LearnedFactors, SpecError, attach
from dither.encoders import SparseFactors
from dither.formats import Factors
from dither.train import Run
from dither.train.learned_factors import LearnedProduct

SPEC = LearnedFactors(6, 0.4, 6, 4)


def begun() -> tuple[nn.Sequential, Tensor, Tensor, Run]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))
    inputs = torch.randn(64, 24)
    with torch.no_grad():
        goal = model(inputs)
    return model, inputs, goal, attach(model, {"*.weight": SPEC}, steps=60)


def test_it_begins_with_what_the_encoder_finds_and_gets_better() -> None:
    model, inputs, goal, run = begun()
    weight = model.get_parameter("0.weight").detach()
    first = SparseFactors(6, 0.4, 6, 4).encode(weight).decode()
    assert torch.equal(run.encode()["0.weight"].decode(), first)
    surrogate = run.surrogates["0.weight"]
    assert isinstance(surrogate, LearnedProduct)
    zeros = ~surrogate.mask
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-3), []
    run.join(optimizer)
    for _ in range(60):
        loss = (model(inputs) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    run.finish()
    encoded = run.encode()["0.weight"]
    assert isinstance(encoded.format, Factors)
    assert not torch.equal(encoded.decode(), first)
    assert torch.equal(~surrogate.mask, zeros)
    right = encoded.codes["right"].values.int() - int(encoded.codes["zero"].values[1])
    assert int((right != 0).sum()) <= round(0.4 * 6 * 24)
    assert int(right.abs().max()) <= 7


def test_what_is_read_while_training_is_what_the_file_would_hold() -> None:
    generator = torch.Generator().manual_seed(0)
    for bits in (4, 16):  # products beyond float32's integers, too
        weight = torch.randn(20, 4, 3, 3, generator=generator)
        surrogate = LearnedFactors(8, 0.7, bits, bits).begin(weight)
        assert isinstance(surrogate, LearnedProduct)
        with torch.no_grad():
            surrogate.left.add_(torch.randn(surrogate.left.shape, generator=generator))
            surrogate.right.add_(torch.randn(surrogate.right.shape, generator=generator))
        assert torch.equal(surrogate.noisy(weight), surrogate.encode(weight).decode())


def test_both_factors_get_gradients_and_masked_entries_none() -> None:
    weight = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    surrogate = LearnedFactors(5, 0.3).begin(weight)
    assert isinstance(surrogate, LearnedProduct)
    surrogate.noisy(weight).square().sum().backward()
    assert surrogate.left.grad is not None
    assert surrogate.right.grad is not None
    assert bool(surrogate.left.grad.any())
    reached = surrogate.right.grad.reshape(surrogate.mask.shape) != 0
    assert bool(reached.any())
    assert not bool((reached & ~surrogate.mask).any())


def test_refusals() -> None:
    with pytest.raises(SpecError, match="share above 0 to 1"):
        LearnedFactors(4, 0.0)
    with pytest.raises(SpecError, match="no product"):
        LearnedFactors(4).begin(torch.tensor(1.0))
