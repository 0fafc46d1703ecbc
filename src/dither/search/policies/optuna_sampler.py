"""Points from Optuna's samplers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dither.core import DitherError, SpecError
from dither.search.joint_space import Layout, Point
from dither.search.policies.policy import Learner

SAMPLERS = ("tpe", "cma-es")


@dataclass(frozen=True)
class Optuna:
    """Akiba et al. 2019 (arXiv 1907.10902): ``pip install "dither[search]"``.

    Attributes:
        sampler: ``"tpe"``, tree-structured Parzen estimators (Bergstra et al. 2011), which take the
            numbers together; or ``"cma-es"`` (Hansen 2016), from the middle of the space.
        batch: points asked for at once.

    Raises:
        SpecError: there is no such sampler.
    """

    sampler: str = "tpe"
    batch: int = 4

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        if self.sampler not in SAMPLERS:
            raise SpecError(f"sampler={self.sampler!r}: give one of {', '.join(SAMPLERS)}")

    def begin(self, layout: Layout, seed: int) -> Learner:
        """Begin a search.

        Raises:
            DitherError: Optuna is not installed.
        """
        return _Study(self.sampler, layout.size, seed)


class _Study:
    def __init__(self, sampler: str, size: int, seed: int) -> None:
        try:
            import optuna
        except ImportError as error:
            raise DitherError(
                'this policy is Optuna\'s; run: pip install "dither[search]"'
            ) from error
        before = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns that some settings may change
                self._study = optuna.create_study(
                    direction="maximize",
                    sampler=optuna.samplers.CmaEsSampler(seed=seed)
                    if sampler == "cma-es"
                    else optuna.samplers.TPESampler(
                        seed=seed, multivariate=True, constant_liar=True
                    ),
                )
        finally:
            optuna.logging.set_verbosity(before)
        self._failed = optuna.trial.TrialState.FAIL
        self._numbers = {
            f"x{place:05}": optuna.distributions.FloatDistribution(0.0, 1.0)
            for place in range(size)
        }
        self._open: list[Any] = []

    def ask(self, count: int) -> list[Point]:
        self._open = [self._study.ask(self._numbers) for _ in range(count)]
        return [tuple(trial.params[name] for name in self._numbers) for trial in self._open]

    def tell(self, points: Sequence[Point], rewards: Sequence[float]) -> None:
        for trial, reward in zip(self._open, rewards, strict=True):
            if math.isnan(reward):
                self._study.tell(trial, state=self._failed)
            else:
                self._study.tell(trial, reward)
