"""Where training to a budget begins: sizes, what data measure, how fast steps are learned."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dither
from dither import LSQ, Fine, SpecError
from dither.search.size import fills
from dither.train import default_plan
from dither.train.lsq import LearnedStep


class Words(nn.Module):
    """Tokens to logits over the same table, which no module but this one reads twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 32)
        self.mix = nn.Linear(32, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = self.mix(self.embedding(tokens))
        return functional.linear(mixed, self.embedding.weight)


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.Flatten(),
        nn.Linear(384, 10),
    )  # fmt: skip


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    scales = torch.logspace(-1, 1, 3).reshape(1, 3, 1, 1)
    return [scales * torch.randn(16, 3, 8, 8, generator=generator) for _ in range(3)]


def tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.rand(3, 16, 24, generator=generator) ** 4  # few words are most of a text
    return list((64 * drawn).long())


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Tensor]]]] = {
    "images": (convolutions, images),
    "words": (Words, tokens),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", ["6x", "10x", "16x"])
@pytest.mark.parametrize("with_data", [False, True])
def test_training_begins_at_the_budget(kind: str, size: str, with_data: bool) -> None:
    build, batches = KINDS[kind]
    model = build().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = dither.attach(model, budget=size, data=batches() if with_data else None, steps=10)
    assert run.controller is not None
    (first,) = run.history
    assert fills(int(first["nbytes"]), run.controller.nbytes)
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("size", [1300, 1800])
def test_more_bytes_than_there_is_to_gain_make_no_endless_steps(size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    steps = {"0.weight": 0.02, "2.weight": 0.02}
    plan = {name: LSQ(bits=None, step=step) for name, step in steps.items()}
    run = dither.attach(model, plan, budget=10 * size, steps=10)
    for name, found in steps_of(run).items():
        assert float(found.exp()) >= 0.45 * steps[name]


def test_a_start_above_the_budget_is_begun_at() -> None:
    budget = dither.Budget(3000, start=6000)
    run = dither.attach(convolutions(), budget=budget, steps=10)
    assert fills(int(run.history[0]["nbytes"]), 6000)


def steps_of(run: dither.Run) -> dict[str, Tensor]:
    found = {n: s for n, s in run.surrogates.items() if isinstance(s, LearnedStep)}
    return {name: surrogate.log_step.detach() for name, surrogate in found.items()}


def test_data_say_where_bytes_go() -> None:
    """What an input hardly moves gets a coarser step than without data, relatively."""
    batches = [b * torch.tensor([1.0] * 24 + [0.0] * 24) for b in torch.randn(4, 32, 48).unbind()]

    class Two(nn.Module):
        """The second layer's output hardly counts."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(48, 48), nn.Linear(48, 48)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x), 1e-3 * self.b(x)], 1)

    plainly = steps_of(dither.attach(Two(), budget="8x", steps=10))
    measured = steps_of(dither.attach(Two(), budget="8x", steps=10, data=batches))
    moved = {name: float((measured[name] - plainly[name]).mean()) for name in plainly}
    assert moved["b.weight"] > moved["a.weight"] + 0.3


def test_rows_that_are_read_often_have_finer_steps() -> None:
    torch.manual_seed(0)
    drawn = torch.rand(2, 16, 64) ** 4  # few words are most of a text
    data = list((2048 * drawn).long())
    parts = {"embedding": nn.Embedding(2048, 8), "linear": nn.Linear(8, 8)}
    model = nn.Sequential(OrderedDict(parts))
    run = dither.attach(model, budget="8x", data=data, steps=10)
    table = run.surrogates["embedding.weight"]
    assert isinstance(table, LearnedStep)
    assert table.classes is not None
    rows = table.log_step.detach()[table.classes]
    assert rows[:64].mean() < rows[-512:].mean() - 0.1


def test_owners_are_those_of_a_plan() -> None:
    plan = {"*": LSQ(4)}
    one = dither.attach(Words(), plan, owners={"embedding.weight": ""})
    other = dither.attach(Words(), dither.Plan(plan, owners={"embedding.weight": ""}))
    assert one.plan == other.plan
    batch = tokens()[0]
    assert torch.equal(one.model(batch), other.model(batch))


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"plan": {"*": LSQ(4)}, "data": [torch.ones(2, 3, 8, 8)]}, SpecError, "give budget="),
        ({"budget": "8x", "steps": 5, "date": []}, TypeError, "unexpected keyword.*'date'"),
        ({"budget": "8x", "steps": 5, "owners": {"0.weight": "no"}}, SpecError, "no"),
    ],
)
def test_what_does_not_go_together_is_refused(
    given: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = convolutions()
    with pytest.raises(error, match=match):
        dither.attach(model, **given)
    dither.attach(model, budget="8x", steps=5)  # and is as it was


@pytest.mark.parametrize(("steps", "rate"), [(100, 1e-2), (2500, 4e-3), (10**6, 1e-3)])
def test_steps_are_learned_as_fast_as_there_is_time(steps: int, rate: float) -> None:
    plan = default_plan(convolutions(), steps=steps)
    rules = set(plan.rules.values())
    assert rules == {LSQ(bits=None, lr=rate), Fine()}
    run = dither.attach(convolutions(), budget="8x", steps=steps)
    assert run.plan == plan
    assert {group["lr"] for group in run.extras.groups()} == {rate}
