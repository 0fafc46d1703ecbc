"""Trials: a candidate is run on some samples, and its feedback comes back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dither.core import SpecError
from dither.select.answer import Answer, answer_of


@dataclass(frozen=True)
class Trial:
    """One experiment.

    Attributes:
        candidate: which was run.
        feedback: one number for each sample, or one for all; more is better.
        contexts: numbers of the samples, where the chooser knows samples apart.
    """

    candidate: int
    feedback: tuple[float, ...]
    contexts: tuple[int, ...] = ()


class Trials(ABC):
    """Chooses which candidate to try next.

    What it does next depends on its settings, its seed and the trials so far, and on nothing else:
    these are all of its state, and a chooser that is made anew and resumed goes on as the first
    would have.

    Args:
        candidates: how many there are, at least one.
        seed: of what is drawn at random.

    Raises:
        SpecError: there are no candidates.
    """

    def __init__(self, candidates: int, seed: int = 0) -> None:
        if candidates < 1:
            raise SpecError(f"there are {candidates} candidates to choose from; give 1 or more")
        self.candidates = candidates
        self.seed = seed
        self.trials: list[Trial] = []
        """All so far, in order."""

    @abstractmethod
    def ask(self) -> int:
        """Which candidate to try next."""

    @abstractmethod
    def answer(self) -> Answer:
        """What is known so far."""

    def tell(self, candidate: int, feedback: Iterable[float], contexts: Iterable[int] = ()) -> None:
        """Add a trial, whether or not it was asked for.

        Raises:
            SpecError: there is no such candidate, or the feedback holds no finite numbers.
        """
        trial = Trial(int(candidate), tuple(map(float, feedback)), tuple(int(c) for c in contexts))
        if not 0 <= trial.candidate < self.candidates:
            raise SpecError(f"candidate {candidate} of {self.candidates}: they are counted from 0")
        if not trial.feedback or not np.isfinite(trial.feedback).all():
            raise SpecError(
                f"feedback {some(trial.feedback)} of candidate {candidate}: give finite numbers"
            )
        self.trials.append(trial)

    def state(self) -> dict[str, Any]:
        """What :meth:`resume` takes, as JSON."""
        trials = [asdict(trial) for trial in self.trials]
        return {"chooser": type(self).__name__, "candidates": self.candidates, "trials": trials}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on where another with the same settings stopped.

        Raises:
            SpecError: it was of another kind, or had other candidates.
        """
        own = {"chooser": type(self).__name__, "candidates": self.candidates}
        if {key: state.get(key) for key in own} != own:
            raise SpecError(
                f"this is the state of {state.get('chooser')} with {state.get('candidates')} "
                f"candidates, not of {own['chooser']} with {self.candidates}"
            )
        self.trials = []
        for trial in state["trials"]:
            self.tell(trial["candidate"], trial["feedback"], trial["contexts"])

    def generator(self) -> np.random.Generator:
        """Random numbers of the next step."""
        return np.random.default_rng((self.seed, len(self.trials)))

    def averages(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean feedback of each candidate, and its variance; infinite where there is none.

        A candidate with one number has the variance of all numbers.
        """
        found: list[list[float]] = [[] for _ in range(self.candidates)]
        for trial in self.trials:
            found[trial.candidate] += trial.feedback
        everything = np.array([value for values in found for value in values] or [0.0])
        spread = float(everything.var())
        means = np.full(self.candidates, float(everything.mean()))
        variances = np.full(self.candidates, math.inf)
        for number, values in enumerate(found):
            if values:
                means[number] = np.mean(values)
                # One prior number of the common variance: three right of three is not certain.
                pooled = (np.var(values) * len(values) + spread) / (len(values) + 1)
                variances[number] = pooled / len(values)
        return means, variances


class UniformTrials(Trials):
    """Every candidate in turn, in a random order that is new each time round."""

    def ask(self) -> int:
        turn, place = divmod(len(self.trials), self.candidates)
        order = np.random.default_rng((self.seed, turn)).permutation(self.candidates)
        return int(order[place])

    def answer(self) -> Answer:
        means, variances = self.averages()
        best = _best(means, np.isfinite(variances))
        return answer_of(means, variances, len(self.trials), best)


class SuccessiveHalving(Trials):
    """Karnin, Koren, Somekh 2013: try all, drop the worse half, give the others twice as much.

    In each of ``ceil(log2(candidates))`` rounds the same share of the trials goes to the candidates
    that are left, one trial each at least.

    Args:
        candidates: how many there are.
        trials: in all.
        seed: of the order within a round.

    Raises:
        SpecError: there are fewer trials than candidates.
    """

    def __init__(self, candidates: int, trials: int, seed: int = 0) -> None:
        super().__init__(candidates, seed)
        if trials < candidates:
            raise SpecError(
                f"successive halving tries each of {candidates} candidates once; "
                f"{trials} trials are too few"
            )
        self.total = trials

    def ask(self) -> int:
        left, waiting = self._left()
        return waiting[0] if waiting else left[0]

    def answer(self) -> Answer:
        means, variances = self.averages()
        left = np.zeros(self.candidates, dtype=bool)
        left[self._left()[0]] = True
        known = np.isfinite(variances)
        best = _best(means, left & known if (left & known).any() else known)
        return answer_of(means, variances, len(self.trials), best)

    def _left(self) -> tuple[list[int], list[int]]:
        """Who is left, and whose turn it is in this round; nobody's at the end."""
        left, done = list(range(self.candidates)), 0
        rounds = max(1, math.ceil(math.log2(self.candidates)))
        for number in range(rounds):
            each = max(1, self.total // (len(left) * rounds))
            order = np.random.default_rng((self.seed, number)).permutation(len(left) * each)
            wanted = [left[place % len(left)] for place in order]
            if len(self.trials) < done + len(wanted):
                return left, wanted[len(self.trials) - done :]
            done += len(wanted)
            means = SuccessiveHalving._means(self.trials[:done], left)
            left = sorted(left, key=means.__getitem__, reverse=True)[: max(1, len(left) // 2)]
        return left, []

    @staticmethod
    def _means(trials: Sequence[Trial], left: Sequence[int]) -> dict[int, float]:
        values: dict[int, list[float]] = {number: [] for number in left}
        for trial in trials:
            if trial.candidate in values:
                values[trial.candidate] += trial.feedback
        return {
            number: float(np.mean(some)) if some else -math.inf for number, some in values.items()
        }


def _best(means: np.ndarray, allowed: np.ndarray) -> int:
    """The largest mean among those; of all, where there are none."""
    return int(np.argmax(np.where(allowed, means, -np.inf))) if allowed.any() else 0


def some(values: Sequence[float]) -> str:
    """The first few, for errors."""
    return str(list(values[:5]))[:-1] + (", ...]" if len(values) > 5 else "]")
