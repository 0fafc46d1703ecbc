"""What loops forget: it is said once, while it can still be mended."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from dither.model import SHADOWS
from dither.train.surrogate import Surrogate

_PATIENCE = 10
_FAR = 1.0
"""Octaves: steps this much coarser than trained ones cost accuracy."""


class Habits:
    """Of a loop that trains an attached model.

    Args:
        model: as it was attached.

    Attributes:
        is_penalised: whether the penalty was asked for.
    """

    def __init__(self, model: nn.Module) -> None:
        self.is_penalised = False
        self._model = model
        self._first = self._versions()

    def expect_penalty(self, done: int) -> None:
        """Warn in time where the penalty is in no loss."""
        if done == _PATIENCE and not self.is_penalised:
            warnings.warn(
                f"{done} steps are done, and run.penalty() was never called: add it to the loss, "
                "or nothing but finish() steers the size",
                stacklevel=3,
            )

    def expect_steps(self, done: int) -> None:
        """Warn where weights were trained, and no step was told."""
        found = self._versions()
        if done == 0 and any(found.get(key, v) != v for key, v in self._first.items()):
            warnings.warn(
                "weights changed since attach(), and run.step() was never called: call it after "
                "every optimizer.step(), or schedules, noise and the budget stand still",
                stacklevel=3,
            )

    def expect_arrival(
        self, surrogates: Mapping[str, Surrogate], done: int, steps: int | None
    ) -> None:
        """Warn where the file is much coarser than what was trained."""
        trim = max((surrogate.trim for surrogate in surrogates.values()), default=0.0)
        if done and trim > _FAR:
            warnings.warn(
                f"finish() made steps {trim:.1f} octaves coarser than trained ones to fit the "
                f"budget, after {done:,} of {steps or done:,} steps: what is evaluated is not what "
                "was trained. Train longer, or ask for more bytes",
                stacklevel=3,
            )

    def _versions(self) -> dict[int, int]:
        """How often each weight was changed."""
        named = self._model.named_parameters()
        return {id(p): p._version for name, p in named if SHADOWS not in name.split(".")}
