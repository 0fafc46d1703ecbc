"""Training to a budget: sizes arrive, files fit, evaluation is the file."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import dither
from dither import LSQ, Affine, BudgetError, Raw, SpecError
from dither.train import BayesianBits, DiffQ, Method, Plan
from dither.train.controller import AIM, ARRIVE, Controller


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(64, 3, 8, 8, generator=generator)
    return images, torch.randint(10, (64,), generator=generator)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)
    )


def trained(budget: int | str, steps: int = 60, plan: dither.Plan | None = None) -> dither.Run:
    model, (images, labels) = network(), data()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    run = dither.attach(model, plan, budget=budget, steps=steps, optimizer=optimizer)
    for _ in range(steps):
        loss = functional.cross_entropy(model(images), labels) + run.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()
    return run


@pytest.mark.parametrize("budget", [1500, 2200, 4000])
def test_the_file_fills_its_budget_and_is_what_was_evaluated(budget: int, tmp_path: Path) -> None:
    run, (images, _) = trained(budget), data()
    run.finish([images])
    run.model.eval()
    logits = run.model(images)
    path = tmp_path / "model.dither"
    nbytes = run.save(path)
    assert nbytes == path.stat().st_size <= budget
    assert nbytes >= 0.985 * budget or nbytes >= budget - 64
    fresh = network(1).eval()
    assert dither.load_into(fresh, path).exact
    assert torch.equal(fresh(images), logits)


@pytest.mark.parametrize(
    ("method", "share"),
    [
        (BayesianBits(lr=0.01), 0.1),
        (DiffQ(noise="uniform", lr=0.02), 0.14),
        (DiffQ(noise="uniform", lr=0.02), 0.08),
    ],
    ids=repr,
)
def test_learned_widths_reach_a_budget(method: Method, share: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    budget = int(share * sum(4 * p.numel() for p in net.parameters()))
    plan = Plan({"*weight": method, "*bias": Affine(8)})
    run = dither.attach(net, plan, budget=budget, steps=60)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    run.join(optimizer)
    for step in range(60):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
        ((net(x) - x).square().mean() + run.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()
    assert 0.985 * budget <= run.finish() <= budget


def test_the_size_arrives_by_training_not_by_trimming() -> None:
    run = trained(2200, steps=120)
    assert run.measure() == pytest.approx(2200 * AIM, rel=0.03)
    assert run.predicted_nbytes() == pytest.approx(run.measure(), rel=0.01)
    assert {"step", "nbytes", "lambda"} <= set(run.history[-1])


def test_training_again_takes_the_commit_back() -> None:
    run, (images, labels) = trained(2200, steps=10), data()
    run.finish([images])
    norm = run.model.get_submodule("1")
    assert float(norm.get_buffer("running_var").sum()) == 16  # moved into weight and bias
    run.model.train()
    functional.cross_entropy(run.model(images), labels).backward()
    run.step()
    assert float(norm.get_buffer("running_var").sum()) != 16
    with pytest.raises(SpecError, match="finish"):
        run.save("never-written.dither")
    run.finish([images])
    assert run.archive.nbytes <= 2200


def test_stored_weights_are_never_overwritten() -> None:
    run, (images, _) = trained(2200, steps=10), data()
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.finish([images])
    run.model.eval()(images)
    assert all(torch.equal(before[name], p) for name, p in run.model.named_parameters())
    run.detach()
    assert torch.equal(run.model.get_parameter("4.weight"), run.archive["4.weight"])


def test_an_impossible_budget_names_the_smallest() -> None:
    plan = dither.Plan({"4.weight": Affine(4), "*": Raw()})
    run = trained(3000, steps=2, plan=plan)
    with pytest.raises(BudgetError, match="nothing in it can be made coarser") as caught:
        run.finish()
    assert caught.value.smallest == run.measure() > 3000


def test_a_budget_needs_steps_and_attach_needs_something_to_do() -> None:
    with pytest.raises(SpecError, match="number of optimizer steps"):
        dither.attach(network(), budget="2kB")
    with pytest.raises(SpecError, match="give a plan"):
        dither.attach(network())
    run = dither.attach(network(), {"*": LSQ(4)})
    with pytest.raises(SpecError, match="attached already"):
        dither.attach(run.model, {"*": LSQ(4)})


def test_the_wanted_size_falls_geometrically_and_stays() -> None:
    controller = Controller(1000)
    controller.update(4000, 0.0)
    goal = 1000 * AIM
    assert controller.wanted(0) == 4000
    assert controller.wanted(ARRIVE / 2) == pytest.approx(math.sqrt(4000 * goal))
    assert controller.wanted(ARRIVE) == controller.wanted(1.0) == pytest.approx(goal)


def test_a_file_too_large_coarsens_all_steps_and_less_so_late() -> None:
    controller = Controller(1000, count=2000)
    assert controller.update(AIM * 1000, 0.0) == 0
    early, late = controller.update(1010, 0.1), controller.update(1010, 1.0)
    assert 0 < late < early
    assert controller.update(500, 0.1) == -controller.update(2000, 0.1) == pytest.approx(-0.05)


def test_lambda_rises_while_the_file_is_too_large() -> None:
    controller = Controller(1000)
    controller.update(1000, 0.0)
    before = controller.weight
    controller.update(1100, 0.8)
    assert controller.weight > before
    for _ in range(5):
        controller.update(800, 0.9)
    assert controller.weight < before
    copy = Controller(1000)
    copy.load_state_dict(controller.state_dict())
    assert copy.weight == controller.weight
