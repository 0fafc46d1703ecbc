"""What callbacks do with a run: penalties as gradients, learned steps kept from optimizers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import dither
from dither import LSQ
from dither.core import SpecError
from dither.integrations.loop import add_penalty, begin, withhold_extras
from tests.integrations.distributed import train


def attached() -> dither.Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    return dither.attach(model, budget="1500", steps=10)


@pytest.mark.parametrize("batches", [1, 3])
def test_a_penalty_is_added_once_for_a_step(batches: int) -> None:
    """The gradient is that of the mean loss plus the penalty, however many batches there are."""
    inputs = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    run = attached()
    (run.model.train()(inputs).square().mean() + run.penalty()).backward()
    wanted = [p.grad for p in run.model.parameters()]
    run = attached()
    for part in inputs.chunk(batches):
        (run.model.train()(part).square().mean() / batches).backward()
    bare = [None if p.grad is None else p.grad.clone() for p in run.model.parameters()]
    add_penalty(run)
    found = [p.grad for p in run.model.parameters()]
    for a, b in zip(wanted, found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.allclose(a, b, atol=1e-6)
    pairs = zip(found, bare, strict=True)
    moved = [a is not None and (b is None or not torch.equal(a, b)) for a, b in pairs]
    assert sum(moved) >= 4  # both weights and both steps


def test_learned_steps_are_in_no_optimizer_that_would_decay_them() -> None:
    run = attached()
    own = run.extras.parameters()
    withhold_extras(run)
    assert not any(p.requires_grad for p in own)
    optimizer = torch.optim.AdamW(run.model.parameters(), weight_decay=0.5)
    before = [p.detach().clone() for p in own]
    begin(run, 10, own, [optimizer])
    assert all(p.requires_grad for p in own)
    assert not {id(p) for g in optimizer.param_groups for p in g["params"]} & {id(p) for p in own}
    run.model(torch.ones(2, 32)).square().mean().backward()
    add_penalty(run)
    optimizer.step()
    run.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, own, strict=True))


def test_an_optimizer_that_attach_was_given_keeps_them() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16)
    optimizer = torch.optim.AdamW(model.parameters())
    run = dither.attach(model, {"weight": LSQ(4)}, optimizer=optimizer)
    withheld = run.extras.parameters()
    withhold_extras(run)
    begin(run, 10, withheld, [optimizer])
    assert run.steps == 10
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in withheld} <= held
    assert run.extras.state_dict() is None


def test_scales_of_losses_are_taken_off_what_no_scaler_sees() -> None:
    run = attached()
    run.controller = None  # no penalty
    run.model.train()(torch.ones(2, 32)).square().mean().backward()
    before = [p.grad.clone() for p in run.extras.parameters() if p.grad is not None]
    add_penalty(run, 4.0)
    after = [p.grad for p in run.extras.parameters() if p.grad is not None]
    assert before
    assert all(torch.equal(a, b / 4) for a, b in zip(after, before, strict=True))


def test_other_steps_than_those_of_the_budget_are_refused() -> None:
    run = attached()
    with pytest.raises(SpecError, match="steps=11"):
        begin(run, 11, [], [])
    assert set(run.metrics()) == {"predicted_nbytes", "lambda"}


def test_two_processes_learn_the_same_steps_as_one(tmp_path: Path) -> None:
    """DDP does not see what is withheld; its gradients are averaged all the same."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integrations.distributed", str(rank), str(tmp_path)],
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    train(slice(0, 8), tmp_path / "one.pt")
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "0", "1"))
    assert first["file"] == second["file"]
    assert first["history"] == second["history"]
    for a, b, whole in zip(first["extras"], second["extras"], one["extras"], strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, whole, atol=2e-3)
    for name, value in one["state"].items():
        # Sums in another order may move a few codes by one.
        assert (first["state"][name] - value).abs().mean() <= 0.02 * value.abs().mean() + 1e-6, name
