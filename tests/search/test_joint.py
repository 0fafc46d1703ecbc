"""Joint search: seeds repeat, whatever the processes and interruptions; no file is too large."""

import json
import math
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dither
from dither.core import BudgetError, DitherError, SpecError
from dither.rewrite import remove_channels
from dither.search import (
    AJPQ,
    POLICIES,
    Aim,
    Candidate,
    Evolution,
    Joint,
    Layout,
    Optuna,
    Policy,
    RandomPoints,
    Space,
    joint,
)
from dither.search.joint import prepared
from dither.search.policies.actor_critic import ActorCritic, Learning

INPUTS = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
SIZE = 2_400
SMALL = Space(lowest=1, highest=6, groups=2)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 16, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
    ).eval()


WANTED: Tensor = network()(INPUTS).detach()


def near(model: nn.Module) -> float:
    """Less is worse: how near the outputs are to the original's."""
    return -float((model(INPUTS) - WANTED).square().mean())


def drawn(model: nn.Module) -> float:
    """A score that draws."""
    return near(model) + 1e-3 * float(torch.randn(()))


def dies(model: nn.Module, below: float) -> float:
    """Takes the process with it where a model is worse than that."""
    found = near(model)
    if found < below:
        os.kill(os.getpid(), signal.SIGKILL)
    return found


def search(policy: str | Policy = "evolution", evaluations: int = 9, **more: object) -> Joint:
    aim = more.pop("aim", Aim(near, space=SMALL))
    return joint(network(), SIZE, aim, policy=policy, evaluations=evaluations, **more)  # type: ignore[arg-type]


def rows(found: Joint) -> list[tuple[float, int, str]]:
    return [(row.reward, row.nbytes, row.error) for row in found.history]


FEW: list[Policy] = [
    AJPQ(warm_up=2, learning=Learning(hidden=8, batch=8), batch=2),
    Evolution(parents=3, first=2, batch=2),
    Evolution(parents=3, first=2, from_allocator=True, batch=2),
    RandomPoints(batch=2),
    Optuna("tpe", batch=2),
    Optuna("cma-es", batch=2),
]


def needs(policy: Policy) -> None:
    if isinstance(policy, Optuna):
        pytest.importorskip("optuna")
        if policy.sampler == "cma-es":
            pytest.importorskip("cmaes")


@pytest.mark.parametrize("policy", FEW, ids=repr)
def test_a_seed_gives_one_answer_within_the_budget_and_never_below_the_allocator(
    policy: Policy,
) -> None:
    needs(policy)
    found, again, other = (search(policy, 7, seed=seed) for seed in (3, 3, 4))
    assert rows(found) == rows(again)
    assert found.archive.nbytes == again.archive.nbytes == found.best.nbytes
    assert rows(found)[1:] != rows(other)[1:]
    assert all(0.985 * SIZE - 64 <= row.nbytes <= SIZE for row in found.history)
    assert len({row.reward for row in found.history}) > 3
    assert found.history[0].nbytes == dither.compress(network(), SIZE).nbytes
    assert found.best.reward == max(row.reward for row in found.history)
    assert found.curve() == sorted(found.curve())
    assert eval(repr(policy), vars(dither.search)) == policy
    assert len(json.dumps(found.to_json())) > 100


@pytest.mark.parametrize("policy", ["ajpq", "evolution"])
def test_the_archive_is_exactly_what_was_evaluated(policy: str) -> None:
    found = search(policy, 3)
    fresh = network()
    with torch.no_grad():
        for value in fresh.state_dict().values():
            value.zero_()
    dither.load_into(fresh, found.archive)
    with torch.no_grad():
        assert near(fresh.eval()) == found.best.reward


@pytest.mark.parametrize("stop", [1, 4])
def test_an_interrupted_search_ends_as_if_it_had_not_been(stop: int, tmp_path: Path) -> None:
    policy, calls = FEW[0], list[int]()

    def counting(model: nn.Module, limit: float = math.inf) -> float:
        calls.append(1)
        if len(calls) > limit:
            raise KeyboardInterrupt
        return near(model)

    def until(limit: float) -> Callable[[nn.Module], float]:
        return lambda model: counting(model, limit)

    journal = tmp_path / "search.journal"
    with pytest.raises(KeyboardInterrupt):
        search(policy, 6, aim=Aim(until(stop), space=SMALL), journal=journal)
    calls.clear()
    resumed = search(policy, 6, aim=Aim(until(math.inf), space=SMALL), journal=journal)
    assert len(calls) == 6 - stop
    calls.clear()
    longer = search(policy, 9, aim=Aim(until(math.inf), space=SMALL), journal=journal)
    assert len(calls) == 3
    whole = search(policy, 9)
    assert rows(longer) == rows(whole)
    assert rows(resumed) == rows(whole)[:6]


def test_a_journal_of_another_search_is_not_used(tmp_path: Path) -> None:
    journal = tmp_path / "search.journal"
    search(evaluations=4, journal=journal)
    with pytest.warns(UserWarning, match="another job"):
        other = search(evaluations=4, seed=1, journal=journal)
    assert rows(other) == rows(search(evaluations=4, seed=1))


def test_any_number_of_processes_gives_the_same_answer(tmp_path: Path) -> None:
    aim = Aim(drawn, space=SMALL)
    alone = search(FEW[0], 6, aim=aim)
    assert rows(search(FEW[0], 6, aim=aim, processes=2, journal=tmp_path / "j")) == rows(alone)
    assert rows(search(FEW[0], 6, aim=aim, journal=tmp_path / "j")) == rows(alone)


def test_a_process_that_dies_is_one_failure() -> None:
    pair = RandomPoints(batch=2)
    plain = search(pair, 3)
    better, worse = sorted((row.reward for row in plain.history[1:]), reverse=True)
    aim = Aim(partial(dies, below=(better + worse) / 2), space=SMALL)
    found = search(pair, 3, aim=aim, processes=2)
    for row, before in zip(found.history, plain.history, strict=True):
        if before.reward == worse:
            assert "ended without a result" in row.error
        else:
            assert row == before


def test_what_cannot_be_sent_to_processes_is_said() -> None:
    with pytest.raises(SpecError, match="processes=1"):
        search(aim=Aim(lambda model: 0.0, space=SMALL), processes=2)


@pytest.mark.parametrize("policy", FEW, ids=repr)
def test_a_failing_evaluation_is_one_line_and_not_the_end(policy: Policy) -> None:
    needs(policy)
    calls = list[int]()

    def sometimes(model: nn.Module) -> float:
        calls.append(1)
        if len(calls) % 3 == 0:
            raise RuntimeError("out of\nmemory")
        return math.nan if len(calls) % 5 == 0 else near(model)

    found = search(policy, 7, aim=Aim(sometimes, space=SMALL))
    errors = {row.error for row in found.history}
    assert errors == {"", "RuntimeError: out of", "it is not a number (NaN)"}
    assert len(found.history) == 7
    assert not found.best.error
    assert "failed: RuntimeError" in str(found.history[2])


def test_a_search_without_any_score_says_why() -> None:
    def never(model: nn.Module) -> float:
        raise ValueError("no data")

    with pytest.raises(SpecError, match="none of 3 files has a score: ValueError: no data"):
        search(evaluations=3, aim=Aim(never))


def test_costs_are_taken_from_scores_and_see_what_is_pruned() -> None:
    def cost(candidate: Candidate) -> float:
        assert candidate.archive.nbytes <= SIZE
        before = candidate.bit_operations()
        smaller = candidate.without_pruned()
        assert smaller(INPUTS).shape == WANTED.shape
        return 1e-6 * before

    aim = Aim(near, cost, replace(SMALL, sparsity=0.9), data=[INPUTS])
    found = search("random", 4, aim=aim)
    plain = search("random", 4, aim=Aim(near, None, replace(SMALL, sparsity=0.9), data=[INPUTS]))
    assert all(
        a.reward < b.reward for a, b in zip(found.history[1:], plain.history[1:], strict=True)
    )


def point(layout: Layout, sparsity: float, widths: Sequence[float]) -> tuple[float, ...]:
    return (sparsity, *widths) * len(layout.kernels)


@pytest.mark.parametrize("size", [750, 1_100, 1_500, 2_400, 5_000])
def test_files_fill_budgets_from_the_least_to_the_finest(size: int) -> None:
    judge, _ = prepared(network(), size, Aim(near, space=SMALL))
    for numbers in ((0.0, 0.0), (0.5, 0.5), (1.0, 0.2)):
        archive, widths = judge.archive(point(judge.files.layout, 0.0, numbers))
        assert size * 0.985 - 64 <= archive.nbytes <= size
        assert all(width > 0 for own in widths.values() for width in own)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75, 1.0])
def test_kernels_of_no_bits_leave_the_file_and_the_model(sparsity: float) -> None:
    model = network()
    judge, _ = prepared(model, SIZE, Aim(near, space=replace(SMALL, sparsity=0.5)))
    archive, widths = judge.archive(point(judge.files.layout, sparsity, (0.5, 0.5)))
    gone = [sum(width == 0 for width in own) for own in widths.values()]
    share = max(0.0, sparsity - 0.5)
    assert gone == [int(share * 12), int(share * 16), 0]
    dither.load_into(model, archive)
    for layer, follower, count in ((0, 1, gone[0]), (3, 3, gone[1])):
        weight, other = model[layer].weight, model[follower].bias  # type: ignore[index]
        zero = (weight.flatten(1) == 0).all(1)
        assert int(zero.sum()) == count
        assert bool((other[zero] == 0).all())
    before = model(INPUTS)
    removed = remove_channels(model)
    assert [removed.get(name, 0) for name in ("0", "3")] == gone[:2]
    torch.testing.assert_close(model(INPUTS), before)


def test_the_least_important_kernels_go_and_the_others_share_widths_by_importance() -> None:
    model = network()
    judge, _ = prepared(model, SIZE, Aim(near, space=SMALL))
    _, widths = judge.archive(point(judge.files.layout, 1.0, (1.0, 0.0)))
    for kernels in judge.files.layout.kernels[:2]:
        own = [widths[kernels.name][kernel] for kernel in kernels.order]
        assert own == sorted(own, reverse=True)
        assert len(set(own)) == 3
        norms = model.get_parameter(kernels.name).abs().flatten(1).sum(1).tolist()
        ranked = [norms[kernel] for kernel in kernels.order]
        assert ranked == sorted(norms, reverse=True)


def test_features_tell_sizes_and_multiplications() -> None:
    judge, _ = prepared(network(), SIZE, Aim(near, data=[INPUTS]))
    assert [k.macs for k in judge.files.layout.kernels] == [12 * 27 * 64, 16 * 108 * 64, 640]
    assert [k.features[-2] for k in judge.files.layout.kernels] == pytest.approx(
        [324 / 2692, 1728 / 2692, 640 / 2692]
    )
    assert all(0 <= number <= 1 for k in judge.files.layout.kernels for number in k.features)


def test_equal_widths_of_a_layer_cost_no_more_than_one_step() -> None:
    judge, _ = prepared(network(), SIZE, Aim(near, space=SMALL))
    archive, _ = judge.archive(judge.files.layout.uniform)
    assert all(archive.encoded(f"{n}.weight").params["scale"].numel() == 1 for n in (0, 3))
    mixed, _ = judge.archive(point(judge.files.layout, 0.0, (0.8, 0.2)))
    assert mixed.encoded("0.weight").params["scale"].numel() == 12


class Tied(nn.Module):
    """A table that is its own head, and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(80, 16)
        self.middle = nn.Linear(16, 16)
        self.head = nn.Linear(16, 80, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.head(self.middle(self.embed(tokens)).relu())
        return scores


def test_tied_tables_are_one_weight_and_are_never_pruned() -> None:
    model = Tied()
    tokens = torch.arange(80)[None]
    wanted = model(tokens).detach()

    def score(model: nn.Module) -> float:
        return -float((model(tokens) - wanted).square().mean())

    space = Space(sparsity=0.9)
    found = joint(model, "8x", Aim(score, space=space, data=[tokens]), evaluations=6, seed=1)
    assert dict(found.archive.aliases) == {"head.weight": "embed.weight"}
    judge, _ = prepared(model, "8x", Aim(score, space=space))
    layout = judge.files.layout
    assert [(k.name, k.can_prune) for k in layout.kernels] == [
        ("embed.weight", False),
        ("middle.weight", False),
    ]


@dataclass(frozen=True)
class Given:
    """Points by hand."""

    number: float
    batch: int = 2

    def begin(self, layout: Layout, seed: int) -> "Given":
        return self

    def ask(self, count: int) -> list[tuple[float, ...]]:
        return [(self.number,) * 9] * count

    def tell(self, points: object, rewards: object) -> None: ...


def test_any_policy_will_do_and_a_point_beyond_the_space_is_a_failure() -> None:
    assert len({row.reward for row in search(Given(0.5), 5).history}) == 2
    assert {row.error for row in search(Given(1.5), 5).history[1:]} == {
        "SpecError: a point has 9 numbers of 0 to 1; this one has 9, of which 9 are beyond"
    }


def test_what_makes_no_sense_is_refused() -> None:
    for settings in ({"lowest": 0}, {"highest": 99}, {"groups": 0}, {"sparsity": 1}, {"norm": 3}):
        with pytest.raises(SpecError):
            Space(**settings)
    for make in (
        lambda: AJPQ(warm_up=0),
        lambda: Evolution(rate=0),
        lambda: Optuna("grid"),
        lambda: search("greedy"),
        lambda: search(evaluations=0),
        lambda: joint({}, 100, near),  # type: ignore[arg-type]
        lambda: joint(nn.Sequential(nn.BatchNorm1d(4)), 2000, near),
    ):
        with pytest.raises(SpecError):
            make()
    with pytest.raises(BudgetError):
        joint(network(), 100, near)


def test_a_policy_without_its_package_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(DitherError, match=r"dither\[search\]"):
        search("tpe")


def test_every_named_policy_has_settings_that_can_be_written_down() -> None:
    for policy in POLICIES.values():
        assert eval(repr(policy), vars(dither.search)) == policy
        assert policy.batch >= 1


def taught(episodes: int, steps: int) -> tuple[float, float]:
    """What an actor does in two states, after rewards for 0.2 in one and 0.8 in the other."""
    learner = ActorCritic(1, Learning(hidden=16, batch=32), seed=1)
    for episode in range(episodes):
        noise = None if episode < 20 else 0.3
        low, high = learner.act((0.0,), noise), learner.act((1.0,), noise)
        learner.remember([((0.0,), low), ((1.0,), high)], -((low - 0.2) ** 2) - (high - 0.8) ** 2)
        np.random.random(episode)  # noqa: NPY002 - as somebody's score may
        learner.learn(steps if episode >= 20 else 0, -0.1, 0.1)
    return learner.act((0.0,), 0.0), learner.act((1.0,), 0.0)


def test_an_actor_learns_what_is_rewarded() -> None:
    low, high = taught(60, 25)
    assert low < 0.4
    assert high > 0.6


def test_what_an_actor_learns_does_not_depend_on_what_others_draw() -> None:
    np.random.seed(0)  # noqa: NPY002
    first = taught(24, 5)
    assert taught(24, 5) == first
