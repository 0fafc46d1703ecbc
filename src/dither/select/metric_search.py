"""Bayesian optimization on the metric: a model of the scores, and of nothing beneath them."""

from __future__ import annotations

import math

import numpy as np

from dither.core import SpecError
from dither.select.answer import Answer, answer_of
from dither.select.surrogate import expected_improvement, fit
from dither.select.trials import Trials


class MetricSearch(Trials):
    """Expected improvement over a Gaussian process on candidates' features (Jones et al. 1998).

    The mean feedback of a trial is a noisy value of the metric, a Matérn-5/2 process of what is
    known of each candidate: its size, the method that made it. Nothing is learned from single
    samples, so a score for a whole file will do: ``tell(candidate, [score])``.

    Args:
        features: ``(candidates, features)``: numbers that similar candidates have in common.
        seed: of the first candidate.

    Raises:
        SpecError: features that are no finite matrix.
        DitherError: scikit-learn is not installed (with the second trial).
    """

    def __init__(self, features: np.ndarray, seed: int = 0) -> None:
        if features.ndim != 2 or not np.isfinite(features).all():
            raise SpecError(
                f"features of shape {features.shape}: give finite numbers, (candidates, features)"
            )
        super().__init__(len(features), seed)
        spread = features.std(0)
        self._features = (features - features.mean(0)) / np.where(spread > 0, spread, 1.0)

    def ask(self) -> int:
        """The candidate of the largest expected improvement; of single scores each comes once."""
        if not self.trials:
            return int(self.generator().integers(self.candidates))
        means, covariance = self.belief()
        deviations = np.sqrt(np.maximum(np.diag(covariance), 0.0))
        tried = {trial.candidate for trial in self.trials}
        best = float(means[list(tried)].max())
        gains = expected_improvement(means, deviations, best)
        if all(len(trial.feedback) == 1 for trial in self.trials) and len(tried) < self.candidates:
            gains[list(tried)] = -math.inf  # a score of a whole file does not change
        return int(gains.argmax())

    def answer(self) -> Answer:
        """What is believed of all; the best is one of those that were tried."""
        if not self.trials:
            return answer_of(np.zeros(self.candidates), np.full(self.candidates, math.inf), 0)
        means, covariance = self.belief()
        tried = np.unique([trial.candidate for trial in self.trials])
        best = int(tried[means[tried].argmax()])
        return answer_of(means, covariance, len(self.trials), best)

    def belief(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean ``(candidates,)`` and covariance of the metrics, given all trials; one at least."""
        numbers = np.array([trial.candidate for trial in self.trials])
        scores = np.array([np.mean(trial.feedback) for trial in self.trials])
        mean = float(scores.mean())
        known = self._features[numbers]
        fitted = fit(known, scores - mean, 2.5, floor=(0.01 * mean) ** 2 if len(scores) < 3 else 0)
        inner = fitted.kernel(known)
        inner[np.diag_indices_from(inner)] += fitted.noise
        root = np.linalg.cholesky(inner)
        half = np.linalg.solve(root, fitted.kernel(known, self._features))
        means = mean + half.T @ np.linalg.solve(root, scores - mean)
        return means, fitted.kernel(self._features) - half.T @ half
