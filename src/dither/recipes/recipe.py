"""A published system as data, and what attaches it to a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.optim import SGD, Optimizer

from dither.train.attach import attach
from dither.train.noise import Noise
from dither.train.penalties import Penalty
from dither.train.plan import Plan
from dither.train.run import Run
from dither.train.schedules import Schedule


@dataclass(frozen=True)
class Recipe:
    """What a published system does to one model.

    Attributes:
        plan: what is done to which weight.
        penalties: the terms of :meth:`Run.penalty`, which is to be added to the loss.
        schedules: called after every step.
        steps: optimizer steps that it was made for, if it depends on them.
        trains_weights: otherwise the model's parameters are frozen, and only what surrogates learn
            is trained: by the run itself, with Adam, unless an optimizer is given.
    """

    plan: Plan
    penalties: tuple[Penalty, ...] = ()
    schedules: tuple[Schedule, ...] = ()
    steps: int | None = None
    trains_weights: bool = True

    def attach(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer | None = None,
        steps: int | None = None,
        noise: Noise | int = 0,
    ) -> Run:
        """Attach it, as :func:`dither.attach` does.

        Args:
            model: the one that it was made for.
            optimizer: of the weights; what surrogates learn joins it.
            steps: in all, if known and the recipe does not say.
            noise: a seed, or more: see :class:`~dither.train.Noise`.
        """
        run = attach(
            model,
            self.plan,
            steps=self.steps if steps is None else steps,
            penalties=self.penalties,
            schedules=self.schedules,
            noise=noise,
        )
        if not self.trains_weights:
            learned = {id(parameter) for parameter in run.extras.parameters()}
            for parameter in model.parameters():
                if id(parameter) not in learned:
                    parameter.requires_grad = False
            optimizer = optimizer or SGD(run.extras.parameters(), lr=0.0)  # it cannot serve them
        if optimizer is not None:
            run.join(optimizer)
        return run
