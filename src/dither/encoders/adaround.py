"""AdaRound: learn for each weight whether to round it up or down."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dither.core import Encoded, SpecError, Stats
from dither.encoders.fixed_grid import best_of, encoded_at, ends, places_of
from dither.encoders.outputs import gram_groups, matrix_of, prepared, retargeted, tensor_of
from dither.encoders.sequential_mse import RANGES, params_by
from dither.formats import Affine
from dither.formats.grid_rounding import require_floating
from dither.formats.settings import check_choice, check_count, check_kind, check_number

AROUND = ("target", "weight")

STRETCH = (1.2, -0.1)
"""The rectified sigmoid ``clip(1.2 sigmoid(v) - 0.1, 0, 1)`` reaches 0 and 1 (Louizos 2018)."""

REGULARIZER = 2.0
"""Times the mean squared step and the mean second moment of an input.

The paper's 0.01 has the unit of the output's square, so that it does too little for large outputs;
in layers of a ResNet-20 on a 3-bit grid it amounts to 1.2 to 2.8 in this unit.
"""
BETA = (20.0, 2.0)
WARM_UP = 0.2
PATH = 10.0
"""Adam's rate times iterations: 1e-3 for the paper's 10,000, and as far in fewer, larger steps."""


@dataclass(frozen=True)
class AdaRound:
    """Nagel et al. 2020 (arXiv 2004.10568): round up or down for the least output error.

    Each weight is ``step * (floor(w / step) + h)`` with ``h`` a rectified sigmoid of a variable,
    first at the fraction. Adam minimises the output error ``tr(E H E')``, ``H`` the
    inputs' second moments, plus ``lambda * sum(1 - |2 h - 1|**beta)`` that drives ``h`` to 0 or 1;
    ``beta`` falls from 20 to 2 along a cosine, after a fifth of the iterations without it. Steps
    are fixed before: those of least squared error, or, on an unbounded grid, the given ``step``.

    The error is exact and over all samples at once, from ``Stats.gram``; the paper draws 32 of
    1,024 samples for each iteration, and may include the activation function, which moments
    cannot. With ``Stats.cross`` the aim is the output of the original inputs, the paper's
    asymmetric reconstruction; ``around`` says between which codes is chosen then.

    Attributes:
        format: an Affine of any granularity; with one bit, asymmetric or endpoint.
        step: for ``Affine(bits=None)`` only.
        iterations: of Adam; 10,000 in the paper, at a rate of 1e-3; of fewer the rate is larger.
        damping: added to the diagonal of ``H`` for ``Stats.cross``, as a share of its mean.
        ranges: ``"mse"`` or ``"minmax"``, by the weights as in :class:`~dither.encoders.Ranges`;
            ``"output"``, as in :class:`~dither.SequentialMSE`, where ``stats`` has a Gram matrix.
        around: with ``Stats.cross``, the codes to choose from are the two next to ``"weight"``
            itself, as in the paper, where ``h`` starts at the weight's own fraction, or next to
            ``"target"``, the weight that does best with the inputs there are. The error is the
            same; on unseen data the former is smaller (`benchmarks.rounding_aims`).

    An output for which nearest codes leave less error keeps those.

    Raises:
        SpecError: settings out of range, no step where one is needed.

    >>> weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    >>> gram = torch.full((16, 16), 0.9) + 0.1 * torch.eye(16)  # inputs with a mean
    >>> def loss(encoded):
    ...     error = encoded.decode() - weight
    ...     return float((error @ gram * error).sum())
    >>> encoder = AdaRound(Affine(2, axis=0), iterations=300)
    >>> loss(encoder.encode(weight, Stats(gram=gram))) < 0.5 * loss(encoder.encode(weight))
    True
    """

    format: Affine
    step: float | None = None
    iterations: int = 10_000
    damping: float = 0.01
    ranges: str = "mse"
    around: str = "weight"

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        check_kind("AdaRound", self.format, (Affine,))
        check_count("AdaRound", "iterations", self.iterations, 1, 1 << 30)
        check_choice("AdaRound", "ranges", self.ranges, RANGES)
        check_choice("AdaRound", "around", self.around, AROUND)
        if (self.format.bits is None) != (self.step is not None):
            raise SpecError(
                f"AdaRound({self.format!r}, step={self.step!r}): a step belongs to bits=None, and "
                "only there; other grids have the steps of least squared error"
            )
        if self.step is not None:
            check_number("AdaRound", "step", self.step)
        if self.format.bits == 1 and self.format.grid == "symmetric":
            raise SpecError("AdaRound needs neighbours to choose from; give 2 bits or more")

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        """Learned codes; nearest ones where ``stats`` holds no Gram matrix.

        Raises:
            SpecError: a weight is not finite, or moments do not fit.
        """
        weight, stats = prepared(weight, stats)
        weight = require_floating(weight, self.format.name)
        held = self._held(weight, stats)
        if stats is None or stats.gram is None or not weight.numel() or not weight.ndim:
            return self.format.assign(weight, held)
        nearest = self.format.assign(weight, held)  # refuses what cannot be encoded
        aim = weight
        if stats.cross is not None:
            aim = retargeted(weight, stats, self.damping)
        places, scales = places_of(self.format, aim.float(), held)
        start = places
        if self.around == "weight" and aim is not weight:
            start, _ = places_of(self.format, weight.float(), held)
        lowest, highest = ends(self.format)
        below = start.floor().clamp_(lowest, highest - 1)
        up = self._learn((start - below).clamp_(0, 1), places - below, scales, stats)
        found = encoded_at(self.format, below + up, weight.dtype, held)
        return best_of(self.format, found, nearest, held, aim, stats)

    def _held(self, weight: Tensor, stats: Stats | None) -> dict[str, Tensor]:
        if self.step is None:
            return params_by(self.ranges, self.format, weight, stats)
        count = self.format.grouping(tuple(weight.shape)).count
        return {"scale": torch.full((count,), float(self.step), dtype=torch.float64)}

    def _learn(self, shares: Tensor, fractions: Tensor, scales: Tensor, stats: Stats) -> Tensor:
        """1 where to round up, 0 where down.

        Args:
            shares: ``h`` at the start, the fractions within 0 and 1.
            fractions: the aim in steps above the lower code.
            scales: the steps.
            stats: with ``gram``.
        """
        start, target, step = (
            matrix_of(part, stats.outputs).float() for part in (shares, fractions, scales)
        )
        assert stats.gram is not None  # noqa: S101 - the caller asked
        groups = [(r, c, m.float()) for r, c, m in gram_groups(start, stats.gram)]
        width, low = STRETCH
        pressure = REGULARIZER * float(step.square().mean()) * _mean_moment(stats.gram)
        variable = torch.logit((start - low) / width).requires_grad_()
        adam = torch.optim.Adam([variable], lr=PATH / max(self.iterations, 100))
        warm = WARM_UP * self.iterations
        for iteration in range(self.iterations):
            sigmoid = variable.detach().sigmoid()
            raw = width * sigmoid + low
            chosen = raw.clamp(0, 1)
            error = (chosen - target) * step
            slope = torch.empty_like(error)
            for rows, columns, moments in groups:
                slope[rows, columns] = 2 * error[rows, columns] @ moments
            slope *= step
            if iteration >= warm:
                progress = (iteration - warm) / max(self.iterations - warm, 1)
                beta = BETA[1] + (BETA[0] - BETA[1]) * (1 + math.cos(math.pi * progress)) / 2
                centred = 2 * chosen - 1
                pull = centred.abs().pow(beta - 1).mul_(centred.sign())
                slope -= pressure * 2 * beta * pull
            inside = (raw > 0) & (raw < 1)
            variable.grad = slope * inside * (width * sigmoid * (1 - sigmoid))
            adam.step()
        up = (width * variable.detach().sigmoid() + low >= 0.5).float()
        return tensor_of(up, tuple(shares.shape), stats.outputs)


def _mean_moment(gram: Tensor) -> float:
    """The mean second moment of an input."""
    return float(gram.diagonal(dim1=-2, dim2=-1).mean())
