"""Active model aggregation by stochastic mirror descent.

R. Ganti, "Active Model Aggregation via Stochastic Mirror Descent", Allerton 2015, arXiv 1503.08363.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dither.core import SpecError
from dither.select.labels import Labels


class SMDAMA(Labels):
    """Learns how to mix the candidates, and asks for labels where the mixture is uncertain.

    The mixture of candidates *f_j* has weights *theta* in the simplex. Of two classes, with *f* in
    [-1, 1] and labels of -1 and 1, the algorithm is the paper's::

        p_t = e_t + (1 - e_t) (1 - f_theta(x_t)^2),   e_t = t^-mu
        Q_t ~ Bernoulli(p_t)
        g_t,j = Q_t / p_t  L'(y_t f_theta(x_t))  y_t f_j(x_t)
        theta_t+1,j  proportional to  theta_t,j exp(-eta g_t,j)

    and the mixture is that of the mean of all *theta*. The excess risk over the best mixture is
    O(sqrt(log M / T^(1 - mu))): ``mu = 0`` asks for every label, a larger one for fewer, at a
    price. Of more classes *f* becomes twice the probability of the right class less one, and the
    margin *|f_theta|* that of the two likeliest classes, which is the same where there are two. The
    loss is *L(z) = (1 - z)^2 / 4*, *eta* the bound's, sqrt(2 (1 + mu) log M / T^(1 + mu)).

    Args:
        candidates: how many there are, *M*.
        horizon: samples that will come, *T*.
        mu: 0 or more and below 1.
        seed: of the draws.

    Raises:
        SpecError: settings out of range.
    """

    def __init__(self, candidates: int, horizon: int, mu: float = 0.5, seed: int = 0) -> None:
        super().__init__(candidates, seed)
        if horizon < 1 or not 0 <= mu < 1:
            raise SpecError(f"horizon {horizon}, mu {mu}: give 1 or more, and 0 <= mu < 1")
        self.mu = mu
        self.eta = math.sqrt(2 * (1 + mu) * math.log(max(candidates, 2)) / horizon ** (1 + mu))
        self.theta = np.full(candidates, 1 / candidates)
        """The weights now; :attr:`weights` is their mean."""
        self._descent = np.zeros(candidates)
        self._total = np.zeros(candidates)

    @property
    def weights(self) -> np.ndarray:
        """Of the mixture: the mean of *theta* over all steps, ``(candidates,)``."""
        return np.asarray(self._total / self.steps if self.steps else self.theta)

    def mixture(self, outputs: np.ndarray) -> np.ndarray:
        """What the mixture says.

        Args:
            outputs: probabilities, ``(candidates, ..., classes)``.
        """
        return np.tensordot(self.weights, outputs, 1)

    def probability(self, outputs: np.ndarray) -> float:
        explored = (self.steps + 1) ** -self.mu
        second, first = np.sort(self.theta @ outputs)[-2:]
        return float(explored + (1 - explored) * (1 - min(1.0, first - second) ** 2))

    def wants(self, outputs: np.ndarray) -> bool:
        found = super().wants(outputs)
        self._total += self.theta
        return found

    def learn(self, outputs: np.ndarray, label: int, probability: float) -> None:
        self._descent += self.gradient(outputs, label) / probability
        theta = np.exp(-self.eta * (self._descent - self._descent.min()))
        self.theta = theta / theta.sum()

    def gradient(self, outputs: np.ndarray, label: int) -> np.ndarray:
        """Of the loss in *theta*, ``(candidates,)``, where the label is known."""
        signed = 2 * outputs[:, label] - 1
        slope = -(1 - self.theta @ signed) / 2
        return np.asarray(slope * signed)

    def state(self) -> dict[str, Any]:
        own = {"descent": self._descent.tolist(), "total": self._total.tolist()}
        return {**super().state(), **own, "theta": self.theta.tolist()}

    def resume(self, state: Mapping[str, Any]) -> None:
        super().resume(state)
        self._descent, self._total = np.array(state["descent"]), np.array(state["total"])
        self.theta = np.array(state["theta"])
