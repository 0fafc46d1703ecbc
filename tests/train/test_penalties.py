"""Penalties: their formulas, and that training follows them."""

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.formats import Affine, Raw
from dither.train import LSQ, Kurtosis, Ramp, Size


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 4))


def kurtosis(weight: Tensor) -> float:
    values = weight.detach().double().flatten()
    return float((((values - values.mean()) / values.std(correction=0)) ** 4).mean())


def test_kurtosis_is_the_papers() -> None:
    net = model()
    run = dither.attach(net, {"*": Affine(4)}, penalties=[Kurtosis(0.5, target=3.0)])
    weights = [p for p in net.parameters() if p.ndim == 2]
    wanted = 0.5 * sum((kurtosis(w) - 3.0) ** 2 for w in weights) / 2
    assert float(run.penalty().detach()) == pytest.approx(wanted, rel=1e-4)


def test_kurtosis_is_driven_to_the_uniform_distributions_and_helps_rounding() -> None:
    net = nn.Linear(64, 64)
    with torch.no_grad():
        net.weight.copy_(numbers(64, 64))

    def error() -> float:
        values = Affine(4).encode(net.weight.detach()).decode()
        return float((values - net.weight.detach()).norm() / net.weight.detach().norm())

    before = error()
    run = dither.attach(net, {"weight": Affine(4)}, penalties=[Kurtosis(1.0)])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(150):
        loss = run.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()
    assert kurtosis(net.weight) == pytest.approx(1.8, abs=0.1)
    assert error() < 0.8 * before


def test_kurtosis_of_nothing_that_varies_is_nothing() -> None:
    net = nn.Linear(4, 4)
    with torch.no_grad():
        net.weight.fill_(0.25)
    run = dither.attach(net, {"*": Raw()}, penalties=[Kurtosis(1.0)])
    assert float(run.penalty()) == 0


def test_size_counts_estimated_bits_in_its_unit() -> None:
    run = dither.attach(model(), {"*.weight": LSQ(None)}, penalties=[Size(2.0, unit=8.0)])
    bits = float(run.soft_bits().detach())
    assert float(run.penalty().detach()) == pytest.approx(2.0 * bits / 8, rel=1e-6)


def test_the_size_penalty_makes_the_file_smaller() -> None:
    sizes = []
    for weight in (0.0, 3e-5):
        net = model()
        inputs = numbers(64, 32)
        goals = net(inputs).detach()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        plan = {"*.weight": LSQ(None, lr=2e-2)}
        run = dither.attach(net, plan, optimizer=optimizer, penalties=[Size(weight, unit=8.0)])
        for _ in range(60):
            loss = (net(inputs) - goals).square().mean() + run.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step()
        sizes.append(run.finish())
    assert sizes[1] < 0.9 * sizes[0]


def test_weights_may_be_ramps() -> None:
    run = dither.attach(model(), {"*": Affine(4)}, steps=10, penalties=[Kurtosis(Ramp(0.0, 1.0))])
    assert float(run.penalty().detach()) == 0
    for _ in range(5):
        run.step()
    half = float(run.penalty().detach())
    for _ in range(5):
        run.step()
    assert float(run.penalty().detach()) == pytest.approx(2 * half, rel=1e-5)
    assert half > 0


def test_a_penalty_is_any_callable() -> None:
    net = model()
    run = dither.attach(
        net,
        {"*.weight": LSQ(4)},
        penalties=[lambda r: sum(w.abs().amax() for *_, w in r.weights())],
    )
    largest = sum(float(p.detach().abs().max()) for p in net.parameters() if p.ndim == 2)
    assert float(run.penalty().detach()) == pytest.approx(largest, rel=1e-6)
