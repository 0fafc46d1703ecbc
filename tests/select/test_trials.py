"""Choosers of trials: whatever they are told, their beliefs are right and their state is whole."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dither.core import DitherError, SpecError
from dither.select import (
    AOE,
    MetricSearch,
    SuccessiveHalving,
    Trials,
    UniformTrials,
    class_features,
)
from dither.select.surrogate import expected_improvement, fit

CANDIDATES, CONTEXTS, CLASSES = 6, 60, 3


class World:
    """Classifiers that are more or less noisy copies of one; which is best is known."""

    def __init__(
        self, seed: int, candidates: int = CANDIDATES, contexts: int = CONTEXTS, noise: float = 2.0
    ) -> None:
        generator = np.random.default_rng(seed)
        self.logits = 2 * generator.standard_normal((contexts, CLASSES))
        self.noise = generator.permutation(np.linspace(0.1, noise, candidates))
        drawn = generator.standard_normal((candidates, contexts, CLASSES))
        self.actions = (self.logits + self.noise[:, None, None] * drawn).argmax(2)
        labels = (self.logits + generator.gumbel(size=self.logits.shape)).argmax(1)
        self.right = (self.actions == labels).astype(float)
        self.metric = self.right.mean(1)
        self.generator = generator

    def aoe(self, seed: int = 0, **settings: object) -> AOE:
        return AOE(class_features(self.logits), self.actions, seed, **settings)  # type: ignore[arg-type]

    def trial(self, chooser: Trials, candidate: int, size: int = 10) -> None:
        contexts = self.generator.integers(0, len(self.logits), size)
        chooser.tell(candidate, self.right[candidate, contexts], contexts)

    def regret(self, chooser: Trials) -> float:
        return float(self.metric.max() - self.metric[chooser.answer().best])


CHOOSERS: dict[str, Callable[[World], Trials]] = {
    "uniform": lambda world: UniformTrials(CANDIDATES, seed=3),
    "halving": lambda world: SuccessiveHalving(CANDIDATES, 40, seed=3),
    "metric": lambda world: MetricSearch(world.noise[:, None], seed=3),
    "ei": lambda world: world.aoe(3, acquisition="ei"),
    "ucb": lambda world: world.aoe(3, acquisition="ucb"),
    "thompson": lambda world: world.aoe(3, acquisition="thompson"),
    "noisy": lambda world: world.aoe(3, repeatable=False),
}


@pytest.mark.parametrize("name", CHOOSERS)
def test_a_choice_goes_on_from_its_state_as_if_nothing_had_happened(name: str) -> None:
    world = World(0)
    first, second = CHOOSERS[name](world), CHOOSERS[name](world)
    before = first.answer()
    assert (before.spent, set(before.deviations)) == (0, {math.inf})
    for _ in range(5):
        world.trial(first, first.ask())
    second.resume(json.loads(json.dumps(first.state())))
    for _ in range(4):
        candidate = first.ask()
        assert second.ask() == candidate
        world.trial(first, candidate)
        trial = first.trials[-1]
        second.tell(trial.candidate, trial.feedback, trial.contexts)
        assert first.answer() == second.answer()
    assert first.answer().spent == 9
    assert 0 <= first.answer().chance <= 1


@given(st.integers(1, 40), st.integers(0, 5))
def test_uniform_trials_take_everyone_in_turn(candidates: int, seed: int) -> None:
    chooser = UniformTrials(candidates, seed)
    for turn in range(2):
        for _ in range(candidates):
            chooser.tell(chooser.ask(), [1.0])
        asked = [trial.candidate for trial in chooser.trials[turn * candidates :]]
        assert sorted(asked) == list(range(candidates))


@settings(max_examples=30)
@given(st.integers(1, 18), st.integers(1, 4), st.randoms())
def test_halving_ends_with_the_best_and_gives_it_the_most(
    candidates: int, times: int, random: object
) -> None:
    chooser = SuccessiveHalving(candidates, times * candidates)
    metric = np.arange(candidates, dtype=float)
    random.shuffle(metric)  # type: ignore[attr-defined]
    for _ in range(times * candidates):
        candidate = chooser.ask()
        chooser.tell(candidate, [metric[candidate]])
    assert chooser.answer().best == metric.argmax()
    counts = np.bincount([trial.candidate for trial in chooser.trials], minlength=candidates)
    assert counts.min() >= 1
    assert counts[metric.argmax()] >= counts.max() - 1  # the trials may end amid a round


@pytest.mark.parametrize("repeatable", [True, False])
def test_the_belief_is_that_of_the_whole_gaussian_process(repeatable: bool) -> None:
    pytest.importorskip("sklearn")
    world = World(1, contexts=40)  # 120 pairs at most: all of them are inducing
    chooser = world.aoe(repeatable=repeatable)
    for candidate in (0, 3, 3, 5):
        world.trial(chooser, candidate)
    means, covariance = chooser.belief()

    features = class_features(world.logits).reshape(-1, 2)
    met = np.unique(np.arange(40) * CLASSES + world.actions)
    pairs = (features[met] - features[met].mean(0)) / features[met].std(0)
    where = np.searchsorted(met, np.arange(40) * CLASSES + world.actions)
    weights = np.stack([np.bincount(row, minlength=len(met)) / 40 for row in where])
    places = np.concatenate([where[t.candidate, list(t.contexts)] for t in chooser.trials])
    values = np.concatenate([t.feedback for t in chooser.trials])
    seen = np.unique(places)
    scale = np.array([values[places == place].mean() for place in seen])
    fitted = fit(pairs[seen], scale - scale.mean(), floor=(0.1 * scale.mean()) ** 2)
    kernel = fitted.kernel(pairs) + (fitted.noise * np.eye(len(met)) if repeatable else 0)
    noise = 0.0 if repeatable else fitted.noise
    inner = kernel[np.ix_(places, places)] + (noise + 1e-6 * fitted.noise) * np.eye(len(places))
    gain = np.linalg.solve(inner, kernel[places] @ weights.T).T
    mean = scale.mean()
    assert means == pytest.approx(mean + gain @ (values - mean), abs=1e-4)
    expected = weights @ kernel @ weights.T - gain @ kernel[places] @ weights.T
    assert covariance == pytest.approx(expected, abs=1e-5)


def test_what_was_seen_of_everything_is_known() -> None:
    pytest.importorskip("sklearn")
    world = World(2)
    chooser = world.aoe()
    for candidate in range(CANDIDATES):
        contexts = np.arange(CONTEXTS)
        chooser.tell(candidate, world.right[candidate], contexts)
    answer = chooser.answer()
    assert answer.means == pytest.approx(world.metric, abs=1e-4)
    assert max(answer.deviations) < 1e-3
    assert world.metric[answer.best] == world.metric.max()


def test_those_who_act_alike_share_what_is_learned() -> None:
    pytest.importorskip("sklearn")
    world = World(3)
    world.actions[1] = world.actions[0]
    chooser = world.aoe()
    world.trial(chooser, 0, 30)
    answer = chooser.answer()
    assert answer.means[0] == answer.means[1]
    assert answer.deviations[0] == answer.deviations[1] < min(answer.deviations[2:])


def test_deviations_cover_the_truth() -> None:
    pytest.importorskip("sklearn")
    inside = []
    for seed in range(12):
        world = World(seed, contexts=200)
        chooser = world.aoe(seed)
        for _ in range(6):
            world.trial(chooser, chooser.ask(), 15)
        answer = chooser.answer()
        inside += (
            np.abs(np.array(answer.means) - world.metric) < 2 * np.array(answer.deviations)
        ).tolist()
    assert 0.85 < np.mean(inside) <= 1.0


def test_a_model_of_the_feedback_needs_fewer_trials_than_one_of_the_scores_or_none() -> None:
    pytest.importorskip("sklearn")
    found: dict[str, list[float]] = {"aoe": [], "metric": [], "uniform": []}
    for seed in range(8):
        world = World(seed, candidates=16, contexts=400, noise=3.0)
        made = {
            "aoe": world.aoe(seed),
            "metric": MetricSearch(np.eye(16), seed),
            "uniform": UniformTrials(16, seed),
        }
        for name, chooser in made.items():
            for _ in range(6):
                world.trial(chooser, chooser.ask(), 20)
            found[name].append(world.regret(chooser))
    assert np.mean(found["aoe"]) < 0.5 * min(np.mean(found["metric"]), np.mean(found["uniform"]))


def test_single_scores_are_not_asked_for_twice() -> None:
    pytest.importorskip("sklearn")
    metric = np.sin(np.arange(9.0))
    chooser = MetricSearch(np.arange(9.0)[:, None])
    for _ in range(9):
        candidate = chooser.ask()
        chooser.tell(candidate, [metric[candidate]])
    assert sorted(trial.candidate for trial in chooser.trials) == list(range(9))
    assert chooser.answer().best == metric.argmax()


def test_the_expected_improvement_is_that_of_samples() -> None:
    means, deviations = np.array([-1.0, 0.0, 0.5]), np.array([0.5, 2.0, 1e-13])
    drawn = means + deviations * np.random.default_rng(0).standard_normal((400_000, 3))
    sampled = np.maximum(drawn - 0.2, 0).mean(0)
    assert expected_improvement(means, deviations, 0.2) == pytest.approx(sampled, abs=5e-3)


def test_without_scikit_learn_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.gaussian_process", None)
    chooser = World(0).aoe()
    chooser.tell(0, [1.0, 0.0], [0, 1])
    with pytest.raises(DitherError, match=r"dither\[select\]"):
        chooser.answer()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda w: UniformTrials(0), "0 candidates"),
        (lambda w: UniformTrials(2).tell(2, [1.0]), "candidate 2 of 2"),
        (lambda w: UniformTrials(2).tell(0, []), "finite numbers"),
        (lambda w: UniformTrials(2).tell(0, [math.nan]), "finite numbers"),
        (lambda w: SuccessiveHalving(4, 3), "3 trials are too few"),
        (lambda w: MetricSearch(np.ones(3)), "finite numbers"),
        (lambda w: UniformTrials(3).resume(UniformTrials(2).state()), "with 2 candidates, not"),
        (lambda w: UniformTrials(3).resume(SuccessiveHalving(3, 9).state()), "SuccessiveHalving"),
        (lambda w: w.aoe(acquisition="pi"), "acquisitions are ei"),
        (lambda w: w.aoe().tell(0, [1.0]), "1 numbers of feedback for 0 contexts"),
        (lambda w: w.aoe().tell(0, [1.0], [CONTEXTS]), f"from 0 to {CONTEXTS - 1}"),
        (lambda w: AOE(np.ones((4, 2, 1)), np.zeros((3, 5), int)), "give"),
        (lambda w: AOE(np.ones((4, 2, 1)), np.full((3, 4), 2)), "from 0 to 1"),
        (lambda w: AOE(np.ones((4, 2, 1)), np.zeros((3, 4))), "float64"),
        (lambda w: w.aoe().resume(World(9).aoe().state()), "other features or actions"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: Callable[[World], object], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        wrong(World(0))


def test_answers_are_data() -> None:
    answer = UniformTrials(2).answer()
    assert replace(answer, best=1) != answer
