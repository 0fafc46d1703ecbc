"""What a chooser says, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_DRAWS = 4000


@dataclass(frozen=True)
class Answer:
    """The best candidate so far.

    Attributes:
        best: its number, from 0.
        means: what each candidate's metric is believed to be; more is better.
        deviations: standard deviations of these beliefs; infinite where nothing is known.
        spent: trials that were made, or labels that were asked.
        chance: that the best candidate is the best of all, by these beliefs.
    """

    best: int
    means: tuple[float, ...]
    deviations: tuple[float, ...]
    spent: int
    chance: float


def answer_of(
    means: np.ndarray, covariance: np.ndarray, spent: int, best: int | None = None
) -> Answer:
    """The answer of a joint Gaussian belief.

    Args:
        means: ``(candidates,)``.
        covariance: ``(candidates, candidates)``, or ``(candidates,)`` for independent ones.
        spent: see :class:`Answer`.
        best: by default the one of the largest mean.
    """
    best = int(np.argmax(means)) if best is None else best
    variances = covariance if covariance.ndim == 1 else np.diag(covariance)
    deviations = np.sqrt(np.maximum(variances, 0.0))
    if np.isfinite(deviations).all():
        drawn = draw(means, covariance, np.random.default_rng(0), _DRAWS)
        chance = float((drawn.argmax(1) == best).mean())
    else:
        chance = 1 / len(means)
    return Answer(best, tuple(means.tolist()), tuple(deviations.tolist()), spent, chance)


def draw(
    means: np.ndarray, covariance: np.ndarray, generator: np.random.Generator, count: int
) -> np.ndarray:
    """Samples of a Gaussian belief, ``(count, candidates)``; its covariance may be singular."""
    noise = generator.standard_normal((count, len(means)))
    if covariance.ndim == 1:
        noise = noise * np.sqrt(np.maximum(covariance, 0.0))
    else:
        values, vectors = np.linalg.eigh(covariance)
        noise = noise @ (vectors * np.sqrt(np.maximum(values, 0.0))).T
    return np.asarray(means + noise)
