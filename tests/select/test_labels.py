"""Choosers of labels: unbiased whatever is asked for, by enumeration and by sampling."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dither.core import SpecError
from dither.select import SMDAMA, Labels, ModelPicker, UniformLabels

CANDIDATES = 4


def stream(
    seed: int, length: int, classes: int = 3, worst: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs ``(length, candidates, classes)``, of later candidates better ones, and labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, length)
    sharpness = np.linspace(worst, worst + 1.8, CANDIDATES)[:, None]
    scores = generator.standard_normal((length, CANDIDATES, classes))
    scores += sharpness * np.eye(classes)[labels][:, None]
    powers = np.exp(2 * scores)
    return powers / powers.sum(-1, keepdims=True), labels


CHOOSERS: dict[str, Callable[[int], Labels]] = {
    "uniform": lambda seed: UniformLabels(CANDIDATES, 0.3, seed),
    "smd-ama": lambda seed: SMDAMA(CANDIDATES, 40, 0.6, seed),
    "picker": lambda seed: ModelPicker(CANDIDATES, seed=seed),
}


def run(chooser: Labels, outputs: np.ndarray, labels: np.ndarray) -> Labels:
    for said, label in zip(outputs, labels, strict=True):
        if chooser.wants(said):
            chooser.tell(int(label))
    return chooser


def differing(right: np.ndarray) -> np.ndarray:
    """Differences to the first candidate: what is the same for all does not count."""
    found: np.ndarray = right - right[:1]
    return found


class Tree:
    """All that may be asked of a stream, by how likely it is; every step goes through the state."""

    def __init__(self, name: str, outputs: np.ndarray, labels: np.ndarray) -> None:
        self.name, self.outputs, self.labels = name, outputs, labels
        self.likelihood = 0.0
        self.accuracy = np.zeros(CANDIDATES)
        self.descent, self.gradients = np.zeros(CANDIDATES), np.zeros(CANDIDATES)
        self.walk(CHOOSERS[name](0).state(), 1.0, np.zeros(CANDIDATES))

    def walk(self, state: dict[str, Any], likelihood: float, gradients: np.ndarray) -> None:
        step = int(state["steps"])
        if step == len(self.labels):
            chooser = self.at(state)
            self.likelihood += likelihood
            self.accuracy += likelihood * chooser.accuracy()
            if isinstance(chooser, SMDAMA):
                self.descent += likelihood * chooser._descent
                self.gradients += likelihood * gradients
            return
        said, label = self.outputs[step], int(self.labels[step])
        for asked in (True, False):
            chooser = self.at(state)
            chance = chooser.probability(said)
            if isinstance(chooser, SMDAMA) and asked:
                gradients = gradients + chooser.gradient(said, label)
            if (chance if asked else 1 - chance) > 0:
                vars(chooser)["coin"] = lambda asked=asked: -1.0 if asked else 2.0
                assert chooser.wants(said) == asked
                if asked:
                    chooser.tell(label)
                self.walk(
                    json.loads(json.dumps(chooser.state())),
                    likelihood * (chance if asked else 1 - chance),
                    gradients,
                )

    def at(self, state: dict[str, Any]) -> Labels:
        chooser = CHOOSERS[self.name](0)
        chooser.resume(state)
        return chooser


@pytest.mark.parametrize("name", CHOOSERS)
@pytest.mark.parametrize("seed", range(2))
def test_estimates_are_unbiased_over_all_that_may_be_asked(name: str, seed: int) -> None:
    outputs, labels = stream(seed, 7)
    tree = Tree(name, outputs, labels)
    right = (outputs.argmax(2) == labels[:, None]).mean(0)
    assert tree.likelihood == pytest.approx(1, abs=1e-12)
    if name == "picker":  # it never asks where all agree
        assert differing(tree.accuracy) == pytest.approx(differing(right), abs=1e-12)
    else:
        assert tree.accuracy == pytest.approx(right, abs=1e-12)
    assert tree.descent == pytest.approx(tree.gradients, abs=1e-12)


@pytest.mark.parametrize("name", CHOOSERS)
def test_estimates_are_unbiased_over_draws(name: str) -> None:
    outputs, labels = stream(5, 40)
    found = np.array([run(CHOOSERS[name](s), outputs, labels).accuracy() for s in range(200)])
    right = (outputs.argmax(2) == labels[:, None]).mean(0)
    found, right = differing(found.T).T[:, 1:], differing(right)[1:]
    error = found.std(0) / math.sqrt(len(found))
    assert (np.abs(found.mean(0) - right) < 3.5 * error).all()


def test_mu_of_zero_asks_for_everything_and_descends_plainly() -> None:
    outputs, labels = stream(0, 60)
    chooser = SMDAMA(CANDIDATES, 60, mu=0.0)
    theta, total = np.full(CANDIDATES, 1 / CANDIDATES), np.zeros(CANDIDATES)
    for said, label in zip(outputs, labels, strict=True):
        assert chooser.probability(said) == 1
        assert chooser.wants(said)
        chooser.tell(int(label))
        total += theta
        signed = 2 * said[:, label] - 1
        theta = theta * np.exp(chooser.eta * 0.5 * (1 - theta @ signed) * signed)
        theta /= theta.sum()
        assert chooser.theta == pytest.approx(theta, abs=1e-12)
    assert chooser.weights == pytest.approx(total / 60, abs=1e-12)
    assert chooser.mixture(outputs[0]) == pytest.approx(total / 60 @ outputs[0], abs=1e-12)


def test_of_two_classes_the_chance_is_the_papers() -> None:
    votes = np.random.default_rng(0).uniform(-1, 1, (50, CANDIDATES))
    chooser = SMDAMA(CANDIDATES, 50, mu=0.4)
    for vote in votes:
        mixed = float(chooser.theta @ vote)
        explored = (chooser.steps + 1) ** -0.4
        plus = (1 + mixed) / 2
        outputs = np.stack([(1 - vote) / 2, (1 + vote) / 2], axis=1)
        expected = explored + (1 - explored) * 4 * plus * (1 - plus)
        assert chooser.probability(outputs) == pytest.approx(expected, abs=1e-12)
        assert chooser.gradient(outputs, 1) == pytest.approx(-(1 - mixed) / 2 * vote, abs=1e-12)
        if chooser.wants(outputs):
            chooser.tell(1)


@pytest.mark.parametrize("mu", [0.0, 0.3, 0.6])
def test_the_mixture_keeps_the_bound(mu: float) -> None:
    length = 600
    outputs, labels = stream(2, length)
    signed = 2 * outputs[np.arange(length), :, labels] - 1
    fine = np.random.default_rng(0).dirichlet(np.full(CANDIDATES, 0.3), 4000)
    least = np.square(1 - fine @ signed.T).mean(1).min() / 4
    risks = []
    for seed in range(5):
        chooser = SMDAMA(CANDIDATES, length, mu, seed)
        run(chooser, outputs, labels)
        risks.append(np.square(1 - signed @ chooser.weights).mean() / 4 - least)
    bound = math.sqrt(2 * math.log(CANDIDATES) / ((1 + mu) * length ** (1 - mu)))
    assert np.mean(risks) < bound


def test_a_larger_mu_asks_for_fewer_labels() -> None:
    outputs, labels = stream(1, 400, worst=3.0)  # they agree, so that the margin asks for little
    asked = [run(SMDAMA(CANDIDATES, 400, mu), outputs, labels).asked for mu in (0.0, 0.2, 0.5, 0.9)]
    assert asked == sorted(asked, reverse=True)
    assert asked[0] == 400 > asked[-1]


def test_the_picker_asks_where_candidates_differ_alone() -> None:
    outputs, labels = stream(3, 300)
    chooser = ModelPicker(CANDIDATES)
    for said, label in zip(outputs, labels, strict=True):
        agree = len(set(said.argmax(1).tolist())) == 1
        asks = chooser.wants(said)
        assert not (asks and agree)
        if asks:
            chooser.tell(int(label))
    assert chooser.answer().best == CANDIDATES - 1
    assert 0 < chooser.asked < 300


@pytest.mark.parametrize("name", CHOOSERS)
def test_a_choice_goes_on_from_its_state_as_if_nothing_had_happened(name: str) -> None:
    outputs, labels = stream(4, 40)
    whole = run(CHOOSERS[name](7), outputs, labels)
    half = run(CHOOSERS[name](7), outputs[:20], labels[:20])
    again = CHOOSERS[name](7)
    again.resume(json.loads(json.dumps(half.state())))
    run(again, outputs[20:], labels[20:])
    assert again.state() == whole.state()
    assert again.answer() == whole.answer()


def test_an_answer_without_labels_knows_nothing() -> None:
    answer = ModelPicker(3).answer()
    assert set(answer.deviations) == {math.inf}
    assert answer.chance == 1 / 3


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: UniformLabels(0), "0 candidates"),
        (lambda: UniformLabels(2, 0.0), "rate of 0"),
        (lambda: SMDAMA(2, 0), "horizon 0"),
        (lambda: SMDAMA(2, 9, 1.0), "0 <= mu < 1"),
        (lambda: UniformLabels(2).tell(0), "no label was asked for"),
        (lambda: UniformLabels(2).wants(np.ones((3, 2))), r"\(2, classes\)"),
        (lambda: waiting().wants(np.ones((2, 3))), "comes first"),
        (lambda: waiting().state(), "awaited"),
        (lambda: waiting().tell(3), "label 3 of 3 classes"),
        (lambda: UniformLabels(2).resume(ModelPicker(2).state()), "state of ModelPicker"),
        (lambda: UniformLabels(2).resume(UniformLabels(3).state()), "with 2 candidates"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: Callable[[], object], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        wrong()


def waiting() -> Labels:
    chooser = UniformLabels(2)
    assert chooser.wants(np.ones((2, 3)))
    return chooser
