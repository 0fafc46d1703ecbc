"""Online active model selection: labels where candidates that may be best differ.

M. R. Karimi, N. M. Gürel, B. Karlaš, J. Rausch, C. Zhang, A. Krause, "Online Active Model Selection
for Pre-trained Classifiers", AISTATS 2021.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dither.select.labels import Labels


class ModelPicker(Labels):
    """Asks for labels where likely candidates differ, and never where all agree.

    With weights *w* that are exponential in the estimated losses, and *v* the largest variance over
    classes *c* of whether a candidate that is drawn from *w* says *c*::

        q_t = max(v_t, eta_t) where candidates differ, else 0;   eta_t = sqrt(log M / (2 t))
        w_t+1,j  proportional to  exp(-eta_t L_j),   L_j = sum of [f_j wrong] / q over labels asked

    The answer is the candidate of the least *L*. Where all agree nothing is asked, so its estimates
    of accuracies are those on samples on which candidates differ: their differences are unbiased,
    their level is not known.

    Args:
        candidates: how many there are, *M*.
        scale: of the probability of asking, to ask more or less often.
        seed: of the draws.
    """

    def __init__(self, candidates: int, scale: float = 1.0, seed: int = 0) -> None:
        super().__init__(candidates, seed)
        self.scale = scale
        self._losses = np.zeros(candidates)

    def probability(self, outputs: np.ndarray) -> float:
        classes = outputs.argmax(1)
        if (classes == classes[0]).all():
            return 0.0
        rate = self._rate(self.steps + 1)
        weights = np.exp(-rate * (self._losses - self._losses.min()))
        share = np.bincount(classes, weights / weights.sum())
        return min(1.0, self.scale * max(float((share * (1 - share)).max()), rate))

    def learn(self, outputs: np.ndarray, label: int, probability: float) -> None:
        self._losses += (outputs.argmax(1) != label) / probability

    def best(self) -> int:
        return int(self._losses.argmin())

    def _rate(self, step: int) -> float:
        return math.sqrt(math.log(max(self.candidates, 2)) / (2 * step))

    def state(self) -> dict[str, Any]:
        return {**super().state(), "losses": self._losses.tolist()}

    def resume(self, state: Mapping[str, Any]) -> None:
        super().resume(state)
        self._losses = np.array(state["losses"])
