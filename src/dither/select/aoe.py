"""Automated online experiments: a model of the feedback, and what it says of each candidate.

Z. Dai, P. Chandar, G. Fazelnia, B. Carterette, M. Lalmas-Roelleke, "Model Selection for Production
System via Automated Online Experiments", NeurIPS 2020, arXiv 2105.13420.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dither.core import SpecError
from dither.select.answer import Answer, answer_of, draw
from dither.select.surrogate import Fitted, expected_improvement, fit
from dither.select.trials import Trial, Trials, some

ACQUISITIONS = ("ei", "ucb", "thompson")
_FITTED = 400  # of the observations, evenly: fitting takes their cube, many times over
_DEVIATIONS = 2.0  # that "ucb" adds
_INDUCING = 128  # pairs, at random


class AOE(Trials):
    """Which candidate to deploy next, by a Gaussian process of the *immediate feedback*.

    In context *x* candidate *i* takes action *a_i(x)*, and the feedback is *m(x, a)*; its metric is
    the mean over *T* contexts, which are known, as what a candidate would do in them is::

        v_i = 1/T sum_t m(x_t, a_i(x_t))

    With a Gaussian process on *m* all *v* are jointly Gaussian. *W* has *1 / T* where a
    candidate meets a pair of context and action, *K* is the kernel of all pairs, *K_n* its rows at
    those observed, and *s* the variance of what the kernel does not explain::

        E v   = mean + W K_n^T (K_nn + s I)^-1 (y - mean)
        Cov v = W K W^T - W K_n^T (K_nn + s I)^-1 K_n W^T

    so what one candidate's trial says is known of all that act alike. The next candidate is that of
    the largest expected improvement over the best mean (``"ei"``), of mean and two deviations
    (``"ucb"``), or of a sample (``"thompson"``); the answer is the largest mean.

    Differences to the paper: actions are certain, as those of a classifier are; the process is
    sparse by 128 inducing pairs, with a rest of each pair's own (FITC, Snelson, Ghahramani 2006),
    where the paper's is variational; the likelihood is Gaussian also where feedback is 0 or 1; and
    where the same action in the same context always brings the same feedback, as with labels, what
    the kernel does not explain belongs to the pair and is no noise (``repeatable``), so that a pair
    seen once is known.

    Args:
        features: of each context and action, ``(contexts, actions, features)``; for instance
            :func:`class_features`.
        actions: what each candidate does, whole numbers ``(candidates, contexts)``.
        seed: of what is drawn at random.
        acquisition: ``"ei"``, ``"ucb"`` or ``"thompson"``.
        repeatable: see above; False where feedback is noisy, as that of people.

    Raises:
        SpecError: arrays that do not fit each other.
        DitherError: scikit-learn is not installed (when it is first told something).
    """

    def __init__(
        self,
        features: np.ndarray,
        actions: np.ndarray,
        seed: int = 0,
        *,
        acquisition: str = "thompson",
        repeatable: bool = True,
    ) -> None:
        _check(features, actions, acquisition)
        super().__init__(len(actions), seed)
        self.acquisition, self.repeatable = acquisition, repeatable
        contexts, kinds = len(features), features.shape[1]
        met, places = np.unique(np.arange(contexts) * kinds + actions, return_inverse=True)
        self._places: np.ndarray = places.reshape(actions.shape)
        """``(candidates, contexts)``: which pair each candidate meets."""
        self._weights = np.zeros((self.candidates, len(met)))
        np.put_along_axis(self._weights, self._places, 1 / contexts, axis=1)
        pairs = features.reshape(contexts * kinds, -1)[met].astype(np.float64)
        spread = pairs.std(0)
        self._pairs = (pairs - pairs.mean(0)) / np.where(spread > 0, spread, 1.0)
        self._models: dict[int, _Model] = {}
        self._belief: tuple[int, np.ndarray, np.ndarray] | None = None
        digest = hashlib.sha256(self._places.astype("<i8").tobytes())
        digest.update(self._pairs.astype("<f8").tobytes())
        self._digest = digest.hexdigest()

    def tell(self, candidate: int, feedback: Iterable[float], contexts: Iterable[int] = ()) -> None:
        values, numbers = list(feedback), list(contexts)
        last = self._places.shape[1] - 1
        if len(numbers) != len(values):
            raise SpecError(
                f"{len(values)} numbers of feedback for {len(numbers)} contexts: "
                "give the number of the context for each"
            )
        if not all(0 <= number <= last for number in numbers):
            raise SpecError(f"contexts {some(numbers)}: they are numbers from 0 to {last}")
        super().tell(candidate, values, numbers)

    def ask(self) -> int:
        if not self.trials:
            return int(self.generator().integers(self.candidates))
        means, covariance = self.belief()
        if self.acquisition == "thompson":
            return int(draw(means, covariance, self.generator(), 1)[0].argmax())
        deviations = np.sqrt(np.maximum(np.diag(covariance), 0.0))
        if self.acquisition == "ucb":
            return int((means + _DEVIATIONS * deviations).argmax())
        return int(expected_improvement(means, deviations, float(means.max())).argmax())

    def answer(self) -> Answer:
        if not self.trials:
            return answer_of(np.zeros(self.candidates), np.full(self.candidates, math.inf), 0)
        return answer_of(*self.belief(), len(self.trials))

    def state(self) -> dict[str, Any]:
        return {**super().state(), "data": self._digest}

    def resume(self, state: Mapping[str, Any]) -> None:
        if state.get("data", self._digest) != self._digest:
            raise SpecError("this is the state of a choice with other features or actions")
        self._belief = None
        super().resume(state)

    def belief(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean ``(candidates,)`` and covariance of the metrics, given all trials; one at least."""
        if self._belief is not None and self._belief[0] == len(self.trials):
            return self._belief[1:]
        seen, values, counts = self._observed(self.trials)
        model = self._model()
        mean, known = float(values.mean()), model.smooth[seen]
        cross = known @ model.candidates.T + model.own[seen, None] * self._weights[:, seen].T
        inner = known @ known.T
        inner[np.diag_indices_from(inner)] += model.own[seen] + model.noise / counts
        root = np.linalg.cholesky(inner)
        half = np.linalg.solve(root, cross)
        means = mean + half.T @ np.linalg.solve(root, values - mean)
        self._belief = len(self.trials), means, model.prior - half.T @ half
        return self._belief[1:]

    def _observed(self, trials: list[Trial]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs that were seen, the mean feedback of each, and how often."""
        places = np.concatenate([self._places[one.candidate, list(one.contexts)] for one in trials])
        feedback = np.concatenate([one.feedback for one in trials])
        seen, which, counts = np.unique(places, return_inverse=True, return_counts=True)
        return seen, np.bincount(which, feedback) / counts, counts

    def _model(self) -> _Model:
        """Fitted to the first 1, 2, 4, 8, ... trials.

        It depends on the trials alone, so that a choice that was resumed goes on alike.
        """
        count = 1 << (len(self.trials).bit_length() - 1)
        if count not in self._models:
            seen, values, _ = self._observed(self.trials[:count])
            chosen = np.linspace(0, len(seen) - 1, min(len(seen), _FITTED)).astype(int)
            scale = float(values.mean())
            outputs = values[chosen] - scale
            fitted = fit(self._pairs[seen[chosen]], outputs, floor=(0.1 * scale) ** 2)
            self._models = {count: self._spread(fitted)}
        return self._models[count]

    def _spread(self, fitted: Fitted) -> _Model:
        """What a kernel says of all pairs and candidates, by inducing pairs."""
        drawn = np.random.default_rng(0).permutation(len(self._pairs))[:_INDUCING]
        inducing = self._pairs[np.sort(drawn)]
        inner = fitted.kernel(inducing)
        inner[np.diag_indices_from(inner)] += 1e-6 * inner[0, 0]
        root = np.linalg.cholesky(inner)
        smooth = np.linalg.solve(root, fitted.kernel(inducing, self._pairs)).T
        own = np.maximum(fitted.kernel.diag(self._pairs) - np.square(smooth).sum(1), 0.0)
        own += fitted.noise * (1.0 if self.repeatable else 0.0)
        noise = fitted.noise * (1e-6 if self.repeatable else 1.0)
        candidates = self._weights @ smooth
        prior = candidates @ candidates.T + (self._weights * own) @ self._weights.T
        return _Model(smooth, own, noise, candidates, prior)


@dataclass(frozen=True)
class _Model:
    """A fitted process at all pairs.

    Attributes:
        smooth: ``(pairs, inducing)``; products of its rows are covariances.
        own: variance of each pair that it shares with no other.
        noise: variance of one observation of a pair.
        candidates: the metrics' share of the smooth part, ``(candidates, inducing)``.
        prior: covariance of the metrics before any trial.
    """

    smooth: np.ndarray
    own: np.ndarray
    noise: float
    candidates: np.ndarray
    prior: np.ndarray


def class_features(logits: np.ndarray) -> np.ndarray:
    """Features of images and classes, by what the original model says: no labels are needed.

    Args:
        logits: of the original model, ``(images, classes)``.

    Returns:
        ``(images, classes, 2)``: the logarithm of the class's odds against the best other one, and
        of the best class's against the second.
    """
    first = logits.argmax(1)
    ordered = np.sort(logits, axis=1)
    lead = ordered[:, -1] - ordered[:, -2]
    odds = logits - ordered[:, -1:]
    odds[np.arange(len(logits)), first] = lead
    return np.stack([odds, np.broadcast_to(lead[:, None], odds.shape)], axis=-1)


def _check(features: np.ndarray, actions: np.ndarray, acquisition: str) -> None:
    if acquisition not in ACQUISITIONS:
        raise SpecError(f"acquisitions are {', '.join(ACQUISITIONS)}, not {acquisition!r}")
    if features.ndim != 3 or actions.ndim != 2 or features.shape[0] != actions.shape[1]:
        raise SpecError(
            f"features {features.shape} and actions {actions.shape}: give "
            "(contexts, actions, features) and (candidates, contexts)"
        )
    if (
        actions.dtype.kind not in "iu"
        or not 0 <= actions.min() <= actions.max() < features.shape[1]
    ):
        raise SpecError(
            f"actions are whole numbers from 0 to {features.shape[1] - 1}, of which the features "
            f"tell; these are {actions.dtype}, {actions.min()} to {actions.max()}"
        )
