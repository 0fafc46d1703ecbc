"""Terms added to the user's loss.

A penalty is any callable ``run -> scalar tensor``. Its weight is a number or a :class:`Ramp`; a
frozen dataclass shows its settings. One that keeps the largest weights small, for example::

    @dataclass(frozen=True)
    class Largest:
        weight: float | Ramp

        def __call__(self, run: Attached) -> Tensor:
            largest = [weight.abs().amax() for _, _, weight in run.weights()]
            return torch.stack(largest).sum() * value_at(self.weight, run.progress)

``run.weights()`` gives name, surrogate and parameter of all that trains with noise. Give it to
:func:`dither.attach` as ``penalties=[Largest(0.1)]`` and add ``run.penalty()`` to the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dither.train.attached import Attached
from dither.train.ramp import Ramp, value_at


class Penalty(Protocol):
    """A scalar that is added to the loss."""

    def __call__(self, run: Attached) -> Tensor:
        """The term, times its weight."""
        ...


@dataclass(frozen=True)
class Size:
    """The estimated coded size of all trained weights, in a unit of one's choice.

    Attributes:
        weight: the factor (lambda), or a ramp.
        unit: bits in a unit: 8 for bytes, ``8 * 2**20`` (the default) for MiB, DiffQ's unit.
    """

    weight: float | Ramp
    unit: float = 8 * 2.0**20

    def __call__(self, run: Attached) -> Tensor:
        return run.soft_bits() * (value_at(self.weight, run.progress) / self.unit)


@dataclass(frozen=True)
class Kurtosis:
    """Weights spread evenly, so that rounding at any width hurts less (KURE).

    ``weight * mean over tensors of (kurtosis - target)**2`` with kurtosis
    ``E[((w - mean) / deviation)**4]`` (Shkolnik et al. 2020, arXiv 2002.07686, and Gupta et al.
    2023, arXiv 2206.10844). Matrices and larger tensors that the plan names are counted, whether
    they train with noise or not; vectors and constant tensors are not.

    Attributes:
        weight: the factor (lambda), or a ramp.
        target: 1.8 is the uniform distribution's, 3 the normal one's.
    """

    weight: float | Ramp
    target: float = 1.8

    def __call__(self, run: Attached) -> Tensor:
        terms = []
        for name in run.surrogates:
            weight = run.parameter(name)
            if weight.ndim < 2 or weight.numel() < 2:
                continue
            centred = weight.float() - weight.float().mean()
            variance = centred.square().mean()
            if float(variance.detach()) > 0:
                kurtosis = centred.pow(4).mean() / variance.square()
                terms.append((kurtosis - self.target).square())
        if not terms:
            return torch.zeros((), device=next(run.model.parameters()).device)
        return torch.stack(terms).mean() * value_at(self.weight, run.progress)
