"""Training to a budget: sizes arrive, files fit, evaluation is the file."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import dither
from dither import LSQ, Affine, BudgetError, Raw, SpecError
from dither.train import BayesianBits, DiffQ, Method, Plan, StraightThrough
from dither.train.controller import AIM, ARRIVE, Controller
from dither.train.plan import Rule


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


@pytest.mark.parametrize(
    ("plan", "budget", "match"),
    [
        ({"4.weight": Affine(4), "*": Raw()}, 3000, "nothing in it can be made coarser"),
        ({"4.weight": StraightThrough(Affine(4)), "*": Raw()}, 3000, "nothing in it can be made"),
        ({"4.weight": LSQ(4), "*": Raw()}, 2000, "even far coarser"),
        ({"4.weight": LSQ(None), "*": Raw()}, 2000, "even far coarser"),
        ({"4.weight": DiffQ(), "*": Raw()}, 1900, "even far coarser"),
        (None, 300, "impossible"),
    ],
    ids=str,
)
def test_an_impossible_budget_is_refused_before_training(
    plan: dict[str, Rule] | None, budget: int, match: str
) -> None:
    model = network()
    with pytest.raises(BudgetError, match=match) as caught:
        dither.attach(model, plan, budget=budget, steps=2)
    smallest = caught.value.smallest
    assert smallest is not None
    assert smallest > budget
    dither.attach(model, plan, budget=smallest + 200, steps=2)  # nothing was left attached


def test_what_training_might_still_save_is_refused_in_the_end() -> None:
    plan = dither.Plan({"4.weight": StraightThrough(Affine(4)), "*": Raw()})
    model = network()
    least = dither.attach(model, plan, budget="1MB", steps=2)
    nbytes = least.measure()
    least.detach()
    run = dither.attach(model, plan, budget=round(0.95 * nbytes), steps=2)
    with pytest.raises(BudgetError, match="nothing in it can be made coarser"):
        run.finish()


@pytest.mark.parametrize("bits", [4, 3])
def test_a_plan_of_fixed_bits_is_made_coarser_to_fit(bits: int) -> None:
    plan = dither.Plan({"*weight": LSQ(bits), "*": Affine(8)})
    free = trained("1MB", steps=60, plan=plan)
    size = free.finish()
    budget = round(0.8 * size)
    run = trained(budget, steps=60, plan=plan)
    assert 0.9 * budget <= run.finish() <= budget  # it is not made finer, which would clip
    assert all(float(h["lambda"]) <= 300 for h in run.history)
    assert free.controller is not None
    assert free.controller.weight >= 0.003 - 1e-9, "lambda does not fall out of reach"


def test_weights_midway_between_two_codes_do_not_leave_bytes_unused() -> None:
    """A little coarser, and most codes change at once: single tensors fill what is left."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(8)])
    run = dither.attach(net, {"*": LSQ(bits=None, step=0.125)}, budget="1MB", steps=1)
    run.step()
    with torch.no_grad():
        for name, surrogate in run.surrogates.items():
            step = surrogate.get_parameter("log_step").exp().bfloat16().float()
            place = torch.randint(-1, 2, (64, 64)) * 1.0
            is_midway = torch.rand(64, 64) < 0.25
            place = torch.where(is_midway, place * (0.5 + 1e-5), place)
            run.parameter(name).copy_(place * step)
    assert run.controller is not None
    size = run.measure()
    for surrogate in run.surrogates.values():
        surrogate.trim = 0.02
    jump = size - run.measure()
    assert jump > 0.03 * size
    run.controller.nbytes = budget = size - jump // 3
    assert 0.985 * budget <= run.finish() <= budget


@pytest.mark.parametrize("steps", [5, 20, 60])
def test_the_file_is_measured_seldom_and_not_after_the_last_step(steps: int) -> None:
    run = trained(2200, steps=steps)
    count = len(run.history)
    assert count <= 1 + steps // 10
    assert run.controller is not None
    before = run.controller.state_dict()
    for _ in range(25):
        run.step()
    assert len(run.history) == count
    assert run.controller.state_dict() == before


def test_lambda_stays_within_bounds() -> None:
    controller = Controller(1000)
    for _ in range(3000):
        controller.update(10_000, 1.0)
    assert controller.weight < 1000
    for _ in range(3000):
        controller.update(10, 1.0)
    for _ in range(12):
        controller.update(10_000, 1.0)
    assert controller.weight > 0.3


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
