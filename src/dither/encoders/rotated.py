"""Rounding in a rotated basis: tables whose columns have something in common."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dither.core import MAX_ALPHABET, Encoded, SpecError, Stats, on_cpu
from dither.encoders.coded_grid import BySettings, grid_steps, in_steps
from dither.encoders.gptq import GPTQ
from dither.encoders.importance import importance_of
from dither.encoders.outputs import pieces
from dither.formats import Factors
from dither.formats.factors import MOST_RANK
from dither.formats.grid_rounding import require_floating
from dither.formats.grouping import rows_of

_FINEST = 2.0**-18

_TRUST = 1.0
"""Squared codes that the axes as they were count as."""


@dataclass(frozen=True, eq=False)
class Rotated(BySettings):
    """Nearest codes along principal axes (transform coding: Huang, Schultheiss 1963).

    Columns of a table are correlated. Seen along the eigenvectors of their second moments, rows
    have few large coordinates and many small ones, which an entropy coder with a table for each
    kind of column stores in fewer bytes at the same step and so the same squared error. The
    eigenvectors are stored too, so it pays where rows are many times as many as columns. Axes along
    which all codes are 0 are left out. What is stored are not the axes themselves, but for the
    codes that were found the directions and lengths of least error.

    Where the type of the tensor is too coarse for the steps, or rows are no more than columns, the
    encoding is that of :class:`GPTQ` without error feedback: nearest codes on a plain grid.

    Attributes:
        step: the step, or one for each row (1-D).
        basis: orthonormal, ``(columns, axes)``; None for that of the tensor, see
            :func:`principal_axes`.
        precision: the grid of the stored basis; None for a rule, see :func:`basis_step`.

    >>> generator = torch.Generator().manual_seed(0)
    >>> table = torch.randn(4000, 4, generator=generator) @ torch.randn(4, 24, generator=generator)
    >>> table += 0.01 * torch.randn(4000, 24, generator=generator)
    >>> rotated = Rotated(0.5).encode(table)
    >>> rotated.codes["left"].values.shape
    torch.Size([4000, 4])
    >>> float((rotated.decode() - table).var()) < 0.5**2 / 12
    True
    """

    step: float | Tensor
    basis: Tensor | None = None
    precision: float | None = None

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        """Codes in ``Factors``, or ``Affine(bits=None)`` where that does not do.

        Args:
            weight: floating point, finite; viewed as ``(shape[0], rest)``.
            stats: ``importance`` or ``counts``, which the basis then leans to.

        Raises:
            SpecError: the step or the basis does not fit, or a weight is not finite.
        """
        weight, stats = on_cpu(weight, stats)
        steps = grid_steps(self.step)
        weight = require_floating(weight, Factors.name)
        found = self._rotated(weight, steps, stats)
        return GPTQ(self.step).encode(weight) if found is None else found

    def _rotated(self, weight: Tensor, steps: Tensor, stats: Stats | None) -> Encoded | None:
        rows, columns = rows_of(tuple(weight.shape))
        matrix = in_steps(weight, steps).reshape(rows, columns)
        if not 0 < columns < rows or columns > MOST_RANK or not bool(matrix.isfinite().all()):
            return None
        basis = self.basis
        if basis is None:
            basis = principal_axes(matrix, _worth(weight, stats))
        elif basis.ndim != 2 or len(basis) != columns or basis.shape[1] > columns:
            raise SpecError(
                f"a basis of shape {tuple(basis.shape)} does not fit rows of {columns} columns; "
                f"give ({columns}, up to {columns})"
            )
        basis = basis.to(matrix.device, torch.float32)
        codes = (matrix @ basis).round_()
        if float(codes.abs().max()) >= MAX_ALPHABET // 4:
            return None
        used = codes.any(0)
        codes = codes[:, used]
        axes, fine = stored_axes(codes, matrix, basis[:, used].T, self.precision)
        right = (axes / fine).round()
        scale = grid_steps(steps.float() * fine)
        grid = Factors(axis=0 if len(scale) > 1 else None, scale_dtype=scale.dtype)
        shape = tuple(weight.shape)
        try:
            found = grid.encoded(codes.int(), right.int(), shape, weight.dtype, scale)
            if grid.comes_back(found):
                return found
            return grid.assign(weight, {"right": right, "scale": scale})
        except SpecError:
            return None


def stored_axes(
    codes: Tensor, matrix: Tensor, axes: Tensor, precision: float | None = None
) -> tuple[Tensor, float]:
    """The axes that a file holds for some codes, and the grid on which it does.

    Args:
        codes: ``(rows, rank)``.
        matrix: what they stand for, ``(rows, columns)`` in steps.
        axes: as they were, ``(rank, columns)``.
        precision: the grid, if it is given.

    Returns:
        The axes of least error, ``(rank, columns)`` on the grid; and its step.
    """
    found = _least_squares(codes, matrix, axes)
    error = float((codes @ found).sub_(matrix).square_().mean())
    fine = precision or basis_step(codes, error)
    return (found / fine).round_() * fine, fine


def _least_squares(codes: Tensor, matrix: Tensor, axes: Tensor) -> Tensor:
    """The axes, ``(rank, columns)``, for which codes have the least error.

    Where most codes of an axis are 0, the others stand for values that are less than a step on
    average; and a code tells something of other coordinates too. Axes with few codes keep near to
    what they were.
    """
    moments = (codes.T @ codes).double()
    moments.diagonal().add_(_TRUST)
    aims = (codes.T @ matrix).double() + _TRUST * axes.double()
    found: Tensor = torch.linalg.solve(moments, aims).float()
    return found


def principal_axes(matrix: Tensor, worth: Tensor | None = None) -> Tensor:
    """Eigenvectors of the second moments of rows, the largest first.

    Args:
        matrix: ``(rows, columns)``, finite.
        worth: what each row counts, ``(rows,)``.

    Returns:
        ``(columns, columns)`` float32, orthonormal columns.
    """
    largest = matrix.abs().max()
    scale = torch.where(largest > 0, largest, 1.0)
    moments = torch.zeros([matrix.shape[1]] * 2, dtype=torch.float64, device=matrix.device)
    for piece in pieces(*matrix.shape):
        unit = (matrix[piece] / scale).double()
        moments += (unit if worth is None else unit * worth.double()[piece, None]).T @ unit
    _, axes = torch.linalg.eigh(moments)
    sorted_axes: Tensor = axes.flip(1).float()
    return sorted_axes


def basis_step(codes: Tensor, error: float) -> float:
    """The grid on which axes are stored: a power of two.

    On a grid of step ``d``, rows of ``rank`` codes and mean squared length ``t`` get a squared
    error of ``t * d**2 / 12`` more in each column. Beside an ``error`` that is there already, that
    costs ``t * d**2 / 24 / error`` nats for each value of the table; each halving of ``d`` costs
    one bit for each entry of the axes. Both together are least at
    ``d**2 = 12 * rank * error / (rows * t)``.

    Args:
        codes: ``(rows, rank)``.
        error: mean squared error of a value in steps, 1/12 on a fine grid.

    >>> basis_step(torch.ones(30_000, 400), 1 / 12)
    0.0078125
    """
    total = float(codes.square().sum(dtype=torch.float64))
    if not total or not error > 0:
        return _FINEST if total else 1.0
    best = min(math.sqrt(12 * codes.shape[1] * error / total), 0.5 / math.sqrt(codes.shape[1]))
    return 2.0 ** round(math.log2(max(best, _FINEST)))


def _worth(weight: Tensor, stats: Stats | None) -> Tensor | None:
    """What rows count beyond their steps; None where all count alike."""
    if stats is None:
        return None
    rows = len(weight)
    importance = importance_of(stats, weight)
    if importance is not None:
        return importance.reshape(rows, -1).double().mean(1)
    if stats.counts is None:
        return None
    if tuple(stats.counts.shape) != (rows,):
        raise SpecError(
            f"counts of shape {tuple(stats.counts.shape)} do not fit a table of {rows} rows"
        )
    return stats.counts.to(weight.device).double() + 1
