"""Labels: samples come one after another, all candidates have spoken, and what is right costs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from dither.core import SpecError
from dither.select.answer import Answer, answer_of


class Labels(ABC):
    """Chooses which labels to ask for.

    For each sample of a stream, :meth:`wants` is given what the candidates say, and draws whether
    to ask for the label; if so, :meth:`tell` is to come next. A loss that is asked for with the
    probability *p* counts *1 / p* times, so that its expectation is that of asking always: whatever
    is asked, estimates are unbiased.

    Args:
        candidates: how many there are.
        seed: of the draws.

    Raises:
        SpecError: there are no candidates.
    """

    def __init__(self, candidates: int, seed: int = 0) -> None:
        if candidates < 1:
            raise SpecError(f"there are {candidates} candidates to choose from; give 1 or more")
        self.candidates, self.seed = candidates, seed
        self.steps = 0
        """Samples that were seen."""
        self.asked = 0
        """Labels that were asked for."""
        self._waiting: tuple[np.ndarray, float] | None = None
        self._sums = np.zeros(candidates)
        self._products = np.zeros((candidates, candidates))

    @abstractmethod
    def probability(self, outputs: np.ndarray) -> float:
        """With which a label is asked for; depends on what was seen before and this sample."""

    @abstractmethod
    def learn(self, outputs: np.ndarray, label: int, probability: float) -> None:
        """Take in a label that was asked for with this probability."""

    def wants(self, outputs: np.ndarray) -> bool:
        """Whether to ask for the label of the next sample.

        Args:
            outputs: probabilities of classes, ``(candidates, classes)``.

        Raises:
            SpecError: they are of another shape, or a label is still awaited.
        """
        if outputs.ndim != 2 or len(outputs) != self.candidates:
            raise SpecError(
                f"outputs of shape {outputs.shape}: give probabilities of classes, "
                f"({self.candidates}, classes)"
            )
        if self._waiting is not None:
            raise SpecError("the label that was asked for comes first: tell() it")
        chance = self.probability(outputs)
        self.steps += 1
        if self.coin() >= chance:
            return False
        self._waiting = outputs, chance
        return True

    def tell(self, label: int) -> None:
        """The label that :meth:`wants` asked for.

        Raises:
            SpecError: none was asked for, or there is no such class.
        """
        if self._waiting is None:
            raise SpecError("no label was asked for: wants() comes first")
        outputs, chance = self._waiting
        if not 0 <= label < outputs.shape[1]:
            raise SpecError(f"label {label} of {outputs.shape[1]} classes, counted from 0")
        self._waiting = None
        self.asked += 1
        right = (outputs.argmax(1) == label) / chance
        self._sums += right
        self._products += np.outer(right, right)
        self.learn(outputs, label, chance)

    def coin(self) -> float:
        """Uniform in [0, 1), of this step."""
        return float(np.random.default_rng((self.seed, self.steps)).random())

    def accuracy(self) -> np.ndarray:
        """Unbiased estimates of the share of samples that each candidate is right on."""
        return np.asarray(self._sums / max(self.steps, 1))

    def best(self) -> int:
        """Of the largest estimated accuracy."""
        return int(self._sums.argmax())

    def answer(self) -> Answer:
        """What is known of the accuracies so far."""
        if self.asked < 2:
            unknown = np.full(self.candidates, math.inf)
            return answer_of(self.accuracy(), unknown, self.asked, self.best())
        # Labels that were not asked for count as zeros, as they do in the estimate.
        means = self.accuracy()
        spread = self._products / self.steps - np.outer(means, means)
        return answer_of(means, spread / self.steps, self.asked, self.best())

    def state(self) -> dict[str, Any]:
        """What :meth:`resume` takes, as JSON.

        Raises:
            SpecError: a label is still awaited.
        """
        if self._waiting is not None:
            raise SpecError("a label is awaited: tell() it before the state is kept")
        counts = {"chooser": type(self).__name__, "steps": self.steps, "asked": self.asked}
        return counts | {"sums": self._sums.tolist(), "products": self._products.tolist()}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on where another with the same settings stopped.

        Raises:
            SpecError: it was of another kind, or had other candidates.
        """
        if state.get("chooser") != type(self).__name__ or len(state["sums"]) != self.candidates:
            raise SpecError(
                f"this is the state of {state.get('chooser')}, not of {type(self).__name__} with "
                f"{self.candidates} candidates"
            )
        self._waiting = None
        self.steps, self.asked = int(state["steps"]), int(state["asked"])
        self._sums, self._products = np.array(state["sums"]), np.array(state["products"])


class UniformLabels(Labels):
    """Asks for each label with the same probability.

    Args:
        candidates: how many there are.
        rate: the probability, over 0 and at most 1.
        seed: of the draws.

    Raises:
        SpecError: a rate that is no probability.
    """

    def __init__(self, candidates: int, rate: float = 1.0, seed: int = 0) -> None:
        super().__init__(candidates, seed)
        if not 0 < rate <= 1:
            raise SpecError(f"a rate of {rate}: give a probability over 0 and at most 1")
        self.rate = rate

    def probability(self, outputs: np.ndarray) -> float:
        return self.rate

    def learn(self, outputs: np.ndarray, label: int, probability: float) -> None:
        """Nothing but the accuracies, which all choosers learn."""
