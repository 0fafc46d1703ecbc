"""What loops forget is said, once; what a run shows of itself."""

import warnings

import pytest
import torch
from torch import nn

import dither
from dither import LSQ
from dither.train import DiffQ, Method


def attached(
    plan: dict[str, Method] | None = None, steps: int = 40, budget: int | None = 3000
) -> dither.Run:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    return dither.attach(net, plan, budget=budget, steps=steps)


def go_on(
    run: dither.Run,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    penalty: bool = True,
    tell: bool = True,
) -> None:
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        loss = run.model(inputs).square().mean()
        (loss + run.penalty() if penalty else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if tell:
            run.step()


def weights(run: dither.Run) -> list[nn.Parameter]:
    own = {id(p) for p in run.extras.parameters()}
    return [p for p in run.model.parameters() if id(p) not in own]


@pytest.mark.parametrize("plan", [None, {"*.weight": DiffQ()}])
def test_a_penalty_that_is_in_no_loss_is_missed_once(plan: dict[str, Method] | None) -> None:
    run = attached(plan)
    optimizer = torch.optim.Adam(weights(run))
    run.join(optimizer)
    with pytest.warns(UserWarning, match=r"run.penalty\(\) was never called") as told:
        go_on(run, optimizer, 15, penalty=False)
    assert len(told) == 1


def test_steps_that_are_not_told_are_missed() -> None:
    run = attached()
    optimizer = torch.optim.Adam(weights(run))
    run.join(optimizer)
    go_on(run, optimizer, 2, tell=False)
    with pytest.warns(UserWarning, match=r"run.step\(\) was never called"):
        run.finish()


def test_a_run_that_is_finished_at_once_forgot_nothing() -> None:
    assert attached().finish() <= 3000


def test_a_file_far_coarser_than_what_was_trained_is_told() -> None:
    run = attached(steps=400)
    optimizer = torch.optim.Adam(weights(run), 1e-4)
    run.join(optimizer)
    go_on(run, optimizer, 11)
    assert run.controller is not None
    run.controller.nbytes = 1500
    with pytest.warns(UserWarning, match=r"octaves coarser .* after 11 of 400 steps"):
        run.finish()


@pytest.mark.parametrize("budget", [None, 3000])
def test_what_is_in_no_optimizer_is_missed_with_a_budget_too(budget: int | None) -> None:
    """The run moves steps itself, towards the budget: that trains them no more than before."""
    run = attached({"*.weight": LSQ(bits=None)}, budget=budget)
    optimizer = torch.optim.Adam(weights(run), 1e-3)
    before = [p._version for p in run.extras.parameters()]
    with pytest.warns(UserWarning, match="is in no optimizer"):
        go_on(run, optimizer, 25)
    moved = [p._version for p in run.extras.parameters()] != before
    assert moved == (budget is not None)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_that_decays_what_is_learned_is_told(
    kind: type[torch.optim.Optimizer],
) -> None:
    run = attached()
    optimizer = kind(run.model.parameters(), lr=1e-3, weight_decay=0.1)  # type: ignore[call-arg]
    with pytest.warns(UserWarning, match=f"{kind.__name__} decays what surrogates learn") as told:
        go_on(run, optimizer, 3)
    assert len(told) == 1


@pytest.mark.parametrize("way", ["joined", "own group", "given", "no decay"])
def test_an_optimizer_that_does_not_is_not(way: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.1)
    given = optimizer if way == "given" else None
    run = dither.attach(net, budget=3000, steps=40, optimizer=given)
    if way == "joined":
        optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.1)
        run.join(optimizer)
    elif way == "own group":
        groups = [{"params": weights(run), "weight_decay": 0.1}, *run.extras.groups()]
        optimizer = torch.optim.AdamW(groups)
    elif way == "no decay":
        optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go_on(run, optimizer, 25)


def test_a_run_shows_where_it_stands() -> None:
    run = attached()
    optimizer = torch.optim.Adam(weights(run))
    run.join(optimizer)
    go_on(run, optimizer, 11)
    shown, told = repr(run), run.metrics()
    assert set(told) == {"predicted_nbytes", "lambda"}
    assert "step 11 of 40" in shown
    assert f"about {told['predicted_nbytes']:,.0f} bytes for 3,000" in shown
    run.finish()
    assert "finished" in repr(run)
    plain = attached({"*.weight": LSQ(4)}, budget=None)
    assert "bytes" not in repr(plain)
    assert set(plain.metrics()) == {"predicted_nbytes"}
