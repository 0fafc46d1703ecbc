"""GPTQ: round one input after the other and let the rest make up for the error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dither.coding import code_lengths
from dither.core import STACKED, Encoded, SpecError, Stats
from dither.encoders.coded_grid import (
    BySettings,
    code_range,
    grid_steps,
    in_steps,
    on_grid,
    products_of,
    refitted_by,
)
from dither.encoders.fixed_grid import best_of, encoded_at, ends, places_of
from dither.encoders.outputs import (
    cholesky,
    gram_groups,
    matrix_of,
    pieces,
    prepared,
    retargeted,
    tensor_of,
)
from dither.encoders.sequential_mse import RANGES, params_by
from dither.formats import Affine
from dither.formats.grid_rounding import require_floating
from dither.formats.settings import check_choice, check_kind

_BLOCK = 64
_PASSES = 2
_MOST_SYMBOLS = 1 << 12
_MATRIX = 2


@dataclass(frozen=True, eq=False)
class GPTQ(BySettings):
    """Frantar et al. 2022 (arXiv 2210.17323) on a uniform grid, entropy coded or bounded.

    The weight is viewed as ``(outputs, inputs)``: the axis ``Stats.outputs`` (the first) against
    all others. Inputs are rounded in order; the error of each is spread over those that follow so
    that the output error ``tr(E H E')`` is least, with ``H`` the inputs' second moments,
    ``Stats.gram``. They may be measured, or be what is known of any layer's inputs: see
    :mod:`dither.search.priors`. With ``Stats.cross`` the aim is the output of the original inputs.

    With a ``strength``, each value takes that of its two neighbours on the grid for which error
    plus lambda times code length is least. The error counts as what the inputs behind cannot make
    up for, and lengths are those of the codes that the pass before chose, with one table.

    With a bounded ``format`` instead of a step, ranges are found first, in any granularity, and
    codes stay within them; an output for which nearest codes leave less error keeps those.

    Attributes:
        step: the step, or one for each output (1-D); None with a ``format``.
        damping: added to the diagonal of ``H``, as a share of its mean.
        strength: lambda in squared steps (times the mean of what the inputs behind cannot make up
            for) for each coded bit; 0 rounds to nearest, 0.1155 is the slope of a fine grid.
        format: a bounded Affine; None with a step.
        ranges: of ``format``: ``"mse"``, ``"minmax"`` or ``"output"``, as for
            :class:`~dither.AdaRound`.
        ordered: with ``format``, inputs of the greatest second moment are rounded first ("act
            order" in the authors' code), when most others are left to make up for them.
        refit: with a step, store the steps of least error for the codes that were found, which
            costs no bytes; it matters where most codes are 0.

    Raises:
        SpecError: settings out of range, or that do not go together.

    >>> weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    >>> gram = 0.9 * torch.eye(64) + 0.1  # inputs with a mean
    >>> def loss(encoded):
    ...     error = encoded.decode() - weight
    ...     return float((error @ gram * error).sum())
    >>> nearest, fed = (GPTQ(0.5).encode(weight, s) for s in (None, Stats(gram=gram)))
    >>> loss(fed) < loss(nearest)
    True
    """

    step: float | Tensor | None = None
    damping: float = 0.0
    strength: float = 0.0
    format: Affine | None = None
    ranges: str = "mse"
    ordered: bool = False
    refit: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that make no sense together."""
        if (self.step is None) == (self.format is None):
            raise SpecError(
                f"GPTQ(step={self.step!r}, format={self.format!r}): give a step, for an unbounded "
                "grid, or a bounded Affine"
            )
        if not math.isfinite(self.strength) or self.strength < 0:
            raise SpecError(f"GPTQ(strength={self.strength!r}): give a finite number, 0 or more")
        if self.format is None:
            if self.ordered or self.ranges != "mse":
                raise SpecError("GPTQ: 'ranges' and 'ordered' belong to a bounded format")
            return
        check_kind("GPTQ", self.format, (Affine,))
        check_choice("GPTQ", "ranges", self.ranges, RANGES)
        if self.format.bits is None or self.strength or self.refit:
            raise SpecError(
                f"GPTQ(format={self.format!r}, strength={self.strength!r}, refit={self.refit!r}): "
                "give bits=1..16, and neither of the others; for an entropy-coded grid give a step"
            )

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        """Codes in ``format``, or ``Affine(bits=None)``; nearest ones without a Gram matrix.

        Args:
            weight: floating point, finite; with a Gram matrix, at least one axis.
            stats: ``gram``, ``(inputs, inputs)``, or of a group of inputs or outputs as
                :class:`~dither.core.Stats` says; ``cross``, ``outputs``.

        Raises:
            SpecError: the step or the Gram matrix does not fit, or a weight is not finite.
        """
        weight, stats = prepared(weight, stats)
        if self.format is not None:
            return self._bounded(self.format, weight, stats)
        assert self.step is not None  # noqa: S101 - one of the two is given
        steps = grid_steps(self.step)
        if stats is not None and stats.outputs and len(steps) > 1 and stats.gram is not None:
            raise SpecError("a step for each row needs outputs in the first axis; give one step")
        if stats is not None and stats.cross is not None and weight.numel():
            aim = retargeted(weight, stats, self.damping)
        else:
            aim = weight
        scaled = in_steps(aim, steps)
        if not weight.numel():
            return on_grid(weight, steps, scaled, 0, 0)
        if stats is None or stats.gram is None:
            rounded = scaled.round_()
        else:
            matrix = matrix_of(scaled, stats.outputs)
            rounded = tensor_of(self._fed(matrix, stats.gram), weight.shape, stats.outputs)
        low, high = code_range(weight, *(float(end) for end in torch.aminmax(rounded)))
        if self.refit and weight.ndim:
            steps = _refit(steps, aim, rounded, stats or Stats())
        return on_grid(weight, steps, rounded.sub_(low), low, high)

    def _bounded(self, fmt: Affine, weight: Tensor, stats: Stats | None) -> Encoded:
        """Codes within ranges that are found first."""
        weight = require_floating(weight, fmt.name)
        held = params_by(self.ranges, fmt, weight, stats)
        nearest = fmt.assign(weight, held)
        if stats is None or stats.gram is None or not weight.numel():
            return nearest
        aim = weight if stats.cross is None else retargeted(weight, stats, self.damping)
        places, scales = (
            matrix_of(part, stats.outputs) for part in places_of(fmt, aim.float(), held)
        )
        codes = torch.empty_like(places)
        for rows, columns, moments in gram_groups(places, stats.gram):
            size = len(moments)
            order = torch.arange(size, device=moments.device)
            if self.ordered:
                order = moments.diagonal().argsort(descending=True, stable=True)
            spread = feedback(moments[order][:, order], self.damping)
            part, distance = (p[rows, columns][:, order].T.contiguous() for p in (places, scales))
            within = codes[rows, columns]
            within[:, order] = feed_within(part, distance, spread, ends(fmt)).T
            codes[rows, columns] = within
        found = encoded_at(
            fmt, tensor_of(codes, tuple(weight.shape), stats.outputs), weight.dtype, held
        )
        return best_of(fmt, found, nearest, held, aim, stats)

    def _fed(self, matrix: Tensor, gram: Tensor) -> Tensor:
        """Rounded values ``(outputs, inputs)`` of the values in steps, perhaps in their memory."""
        rounded = self._pass(matrix, gram, None)
        for _ in range(_PASSES if self.strength and bool(rounded.isfinite().all()) else 0):
            low, high = (float(end) for end in torch.aminmax(rounded))
            if high - low >= _MOST_SYMBOLS:  # so fine that no length differs from the next
                break
            # One code more at either end, which has not occurred yet.
            counts = torch.histc(rounded, int(high - low) + 3, low - 1.5, high + 1.5)
            lengths = torch.from_numpy(code_lengths(counts.numpy().astype(np.float64))).float()
            rounded = self._pass(matrix, gram, Rate(lengths, int(low) - 1, self.strength))
        return rounded

    def _pass(self, matrix: Tensor, gram: Tensor, rate: Rate | None) -> Tensor:
        rounded = torch.empty_like(matrix) if self.strength else matrix
        for rows, columns, moments in gram_groups(matrix, gram):
            if moments is gram:
                spread, variances = _factors(gram, gram._version, self.damping)  # noqa: SLF001
            else:
                spread, variances = factors(moments, self.damping)
            source, target = matrix[rows, columns], rounded[rows, columns]
            for piece in pieces(*source.shape):
                part = source[piece].T.contiguous()
                feed_errors(part, spread, rate, variances)
                target[piece] = part.T
        return rounded


def _refit(steps: Tensor, aim: Tensor, rounded: Tensor, stats: Stats) -> Tensor:
    """Steps of least error, a piece of a large weight after the other where rows stand alone."""
    outputs, gram = stats.outputs, stats.gram
    is_apart = outputs in (0, STACKED) and (gram is None or gram.ndim == _MATRIX)
    size = len(aim), aim[:1].numel()
    products = []
    for piece in pieces(*size) if is_apart else [slice(None)]:
        own = steps[piece] if len(steps) > 1 else steps
        aims = matrix_of(in_steps(aim[piece], own), outputs)
        products.append(products_of(aims, matrix_of(rounded[piece], outputs), gram))
    both, own = (torch.cat(found) for found in zip(*products, strict=True))
    return refitted_by(steps, both, own)


@dataclass(frozen=True, eq=False)
class Rate:
    """What codes cost.

    Attributes:
        lengths: bits of the codes ``lowest, lowest + 1, ...``; codes beyond cost as the ends.
        lowest: the first of them, in steps.
        strength: lambda, as for :class:`GPTQ`.
    """

    lengths: Tensor
    lowest: int
    strength: float

    def choose(self, values: Tensor, weight: float) -> Tensor:
        """That neighbour of each value for which weighted error plus lambda bits is least."""
        below = values.floor()
        share = values - below
        index = (below - self.lowest).long()
        last = len(self.lengths) - 1
        down, up = (self.lengths[(index + i).clamp_(0, last)] for i in (0, 1))
        # share^2 w + lambda down > (1 - share)^2 w + lambda up
        return below + ((2 * share - 1) * weight > self.strength * (up - down))


@lru_cache(maxsize=4)
def _factors(gram: Tensor, version: int, damping: float) -> tuple[Tensor, Tensor]:
    """As :func:`factors`, kept for the next weight: layers share prior Gram matrices.

    A tensor is its own key; ``version`` rises whenever it is written to.
    """
    del version
    return factors(gram, damping)


def feedback(gram: Tensor, damping: float = 0.0) -> Tensor:
    """How the error of each input is spread over those behind it: the first of :func:`factors`."""
    return factors(gram, damping)[0]


def factors(gram: Tensor, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    """How errors are spread, and what they cost then.

    Args:
        gram: second moments of the inputs, ``(inputs, inputs)``.
        damping: share of the mean of its diagonal to add to the diagonal.

    Returns:
        ``(inputs, inputs)``, strictly upper triangular: row ``i`` is added, times the error of
        input ``i``, to the inputs behind it. And ``(inputs,)``, mean 1: what a unit of squared
        error of each input costs when those behind make up for it as well as they can.

    Raises:
        SpecError: the matrix is not one of second moments.
    """
    moments = gram.to(torch.float64).flip(0, 1)
    moments.diagonal().add_(damping * moments.diagonal().mean())
    factor, _ = cholesky(moments)
    # With H = U U', U upper: the inverse of the Cholesky factor that GPTQ takes from H's inverse.
    upper = factor.flip(0, 1)
    del moments, factor  # wide layers: each copy takes megabytes
    variances = upper.diagonal().square()
    inverse = torch.eye(len(upper), dtype=torch.float64)
    torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)
    inverse /= inverse.diagonal().clone()[:, None]
    return inverse.triu_(1).float(), (variances / variances.mean()).float()


def feed_errors(
    inputs: Tensor, spread: Tensor, rate: Rate | None = None, variances: Tensor | None = None
) -> Tensor:
    """Round each row of ``inputs`` in order, passing its error on to the rows behind it.

    Args:
        inputs: ``(inputs, outputs)``, in steps; is overwritten.
        spread: from :func:`factors`.
        rate: what codes cost; None rounds to nearest.
        variances: from :func:`factors`; read with ``rate`` only.

    Returns:
        The rounded values, in the same memory.
    """
    costs = [1.0] * len(inputs) if variances is None else variances.tolist()
    for start in range(0, len(inputs), _BLOCK):
        block = inputs[start : start + _BLOCK]
        within = spread[start : start + _BLOCK, start : start + _BLOCK]
        errors, found = torch.empty_like(block), torch.empty_like(block)
        # Views of all rows at once: one by one they take longer than the numbers in them.
        rows = zip(block, found, errors, within, strict=True)
        for i, (value, rounded, error, shares) in enumerate(rows):
            if rate is None:
                torch.round(value, out=rounded)
            else:
                rounded.copy_(rate.choose(value, costs[start + i]))
            torch.sub(rounded, value, out=error)
            block.narrow(0, i + 1, len(block) - i - 1).addr_(shares[i + 1 :], error)
        block.copy_(found)
        behind = inputs[start + _BLOCK :]
        behind.addmm_(spread[start : start + _BLOCK, start + _BLOCK :].T, errors)
    return inputs


def feed_within(
    places: Tensor, scales: Tensor, spread: Tensor, limits: tuple[float, float]
) -> Tensor:
    """As :func:`feed_errors`, on bounded grids of any steps.

    Args:
        places: real-valued codes, ``(inputs, outputs)``; is overwritten.
        scales: steps, likewise.
        spread: from :func:`factors`.
        limits: the least and the greatest code.

    Returns:
        The codes, in the memory of ``places``.
    """
    for start in range(0, len(places), _BLOCK):
        part = slice(start, start + _BLOCK)
        block, steps, within = places[part], scales[part], spread[part, part]
        errors = torch.empty_like(block)
        for i in range(len(block)):
            value = block[i].clone()
            block[i] = value.round().clamp_(*limits)
            errors[i] = (block[i] - value) * steps[i]
            block[i + 1 :] += within[i, i + 1 :, None] * errors[i] / steps[i + 1 :]
        behind = slice(start + _BLOCK, None)
        places[behind] += spread[part, behind].T @ errors / scales[behind]
    return places
