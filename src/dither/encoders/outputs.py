"""A weight as a matrix of outputs and inputs, with the moments of the inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dither.core import STACKED, SpecError, Stats, on_cpu


def prepared(weight: Tensor, stats: Stats | None) -> tuple[Tensor, Stats | None]:
    """The door of encoders that read moments: on the CPU, and see :func:`with_silent_groups`."""
    weight, stats = on_cpu(weight, stats)
    return weight, None if stats is None else with_silent_groups(stats)


def with_silent_groups(stats: Stats) -> Stats:
    """The same, with groups of inputs that say nothing taken for inputs without a common direction.

    No vector was seen, all were 0, or some were not finite: then every error counts alike (an
    identity, of the mean scale of the other groups), and the weight is its own aim. What says
    something is not copied; moments of a wrong shape are left to whom they do not fit.
    """
    gram, cross = stats.gram, stats.cross
    if gram is None or gram.ndim < 2 or gram.shape[-1] != gram.shape[-2]:
        return stats
    scales = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    says = (scales != 0) & gram.isfinite().all(-1).all(-1)
    if cross is not None and cross.shape == gram.shape:
        says &= cross.isfinite().all(-1).all(-1)
    if bool(says.all()):
        return stats
    usual = float(scales[says].mean()) if bool(says.any()) else 1.0
    eye = usual * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    filled = [
        None if moments is None else torch.where(says[..., None, None], moments, eye)
        for moments in (gram, cross)
    ]
    return replace(stats, gram=filled[0], cross=filled[1])


def matrix_of(weight: Tensor, outputs: int = 0) -> Tensor:
    """The weight as ``(outputs, inputs)``.

    Args:
        weight: at least one axis.
        outputs: the axis that counts outputs; -2 of a stack, whose matrices come one below the
            other.

    Raises:
        SpecError: there is no such axis.
    """
    if weight.ndim == 0:
        raise SpecError("a single number has no inputs; encode it without a Gram matrix")
    if outputs == STACKED and weight.ndim > 2:
        return weight.flatten(0, -2)
    if not 0 <= outputs < weight.ndim:
        raise SpecError(f"outputs={outputs} is no axis of a weight of shape {tuple(weight.shape)}")
    moved = weight.movedim(outputs, 0)
    return moved.reshape(len(moved), -1)


def tensor_of(matrix: Tensor, shape: tuple[int, ...], outputs: int = 0) -> Tensor:
    """The inverse of :func:`matrix_of`."""
    if outputs == STACKED:
        return matrix.reshape(shape)
    moved = [shape[outputs], *shape[:outputs], *shape[outputs + 1 :]]
    return matrix.reshape(moved).movedim(0, outputs).contiguous()


_ALIGNED = 64
PIECE = 1 << 24
"""Values of a large weight that are worked on at a time: what that takes counts little then."""


def pieces(rows: int, columns: int) -> Iterator[slice]:
    """Rows of a matrix in pieces of :data:`PIECE` values; all at once if it has no more.

    >>> list(pieces(100, 7)), len(list(pieces(1 << 14, 1 << 12)))
    ([slice(0, 100, None)], 4)
    """
    count = max(PIECE // max(columns, 1) // _ALIGNED, 1) * _ALIGNED
    for start in range(0, rows, count):
        yield slice(start, min(start + count, rows))


ROUNDING = 2.0**-22
"""Share of the mean moment, for each input, that sums in float32 may be off by."""


def cholesky(moments: Tensor) -> tuple[Tensor, float]:
    """The lower factor of second moments, which need not be of full rank, and what was added.

    Inputs that are constant, few or copies of each other span few directions. What should be 0 in
    all others is what rounding left, on either side: as much (:data:`ROUNDING`) is added to the
    diagonal where there is no factor without. Moments of 0 say nothing and count as an identity.

    Args:
        moments: ``(inputs, inputs)``, float64.

    Returns:
        ``(inputs, inputs)``, and the number added to the diagonal.

    Raises:
        SpecError: they are no second moments.
    """
    if not bool(moments.any()):
        return torch.eye(len(moments), dtype=moments.dtype), 1.0
    mean = float(moments.diagonal().mean())
    least = ROUNDING * len(moments) * mean
    for floor in (0.0, least, 32 * least) if mean > 0 else ():
        raised = moments + floor * torch.eye(len(moments)) if floor else moments
        factor, fault = torch.linalg.cholesky_ex(raised)
        if int(fault) == 0:
            return factor, floor
    raise SpecError(
        "the Gram matrix is not one of second moments, which are finite and have no negative "
        f"eigenvalue (its diagonal has a mean of {mean:g}); give X' X / n of the input vectors X"
    )


def gram_groups(matrix: Tensor, gram: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """The parts of a weight that errors are fed within, and the moments of their inputs.

    Args:
        matrix: ``(outputs, inputs)``.
        gram: ``(n, n)`` for each ``n`` consecutive inputs, or ``(groups, n, n)``: of groups of
            outputs where ``n`` is no less than the inputs, else one for each ``n`` inputs.

    Yields:
        Rows, columns, and ``(inputs, inputs)``: ``gram`` itself where it needs no cutting.

    Raises:
        SpecError: it is no such matrix, or does not fit.
    """
    if gram.ndim not in (2, 3) or gram.shape[-1] != gram.shape[-2] or not gram.numel():
        raise SpecError(
            "a Gram matrix is (inputs, inputs), or (groups, inputs, inputs), not of shape "
            f"{tuple(gram.shape)}"
        )
    size, (outputs, inputs) = gram.shape[-1], matrix.shape
    if gram.ndim == 3 and size >= inputs:
        if outputs % len(gram):
            raise SpecError(f"{outputs} outputs are not {len(gram)} equal groups")
        each = outputs // len(gram)
        for group, moments in enumerate(gram):
            rows = slice(group * each, (group + 1) * each)
            yield rows, slice(None), moments[:inputs, :inputs]
        return
    if gram.ndim == 3 and len(gram) != -(-inputs // size):
        raise SpecError(f"{len(gram)} Gram matrices of {size} inputs do not make {inputs} inputs")
    for group, start in enumerate(range(0, inputs, size)):
        width = min(size, inputs - start)
        moments = gram if gram.ndim == 2 else gram[group]
        whole = moments if width == size else moments[:width, :width]
        yield slice(None), slice(start, start + width), whole


def output_errors(matrix: Tensor, gram: Tensor) -> Tensor:
    """Mean squared output error of each row, ``(outputs,)``: the diagonal of ``E H E'``.

    Args:
        matrix: errors of a weight, ``(outputs, inputs)``.
        gram: as for :func:`gram_groups`.
    """
    total = torch.zeros(len(matrix), dtype=torch.float64, device=matrix.device)
    for rows, columns, moments in gram_groups(matrix, gram):
        part = matrix[rows, columns].double()
        total[rows] += (part @ moments.double() * part).sum(1)
    return total


def retargeted(weight: Tensor, stats: Stats, damping: float = 0.0) -> Tensor:
    """The weight that does best with the inputs there are what this one does with the original.

    ``W C H^-1``, with ``C`` the moments of the original inputs with the actual ones and ``H`` the
    latter's own: then ``|W x - V x'|^2`` is ``|(W C H^-1 - V) x'|^2`` and what no weight changes.

    Args:
        weight: of any shape.
        stats: with ``gram`` and ``cross``.
        damping: as for GPTQ; it also draws the result towards the weight.

    Raises:
        SpecError: moments that do not fit, or are no second moments.
    """
    stats = with_silent_groups(stats)
    if stats.gram is None or stats.cross is None or stats.gram.shape != stats.cross.shape:
        raise SpecError("cross moments come with a Gram matrix of the same shape")
    matrix = matrix_of(weight.detach(), stats.outputs).double()
    found = torch.empty_like(matrix)
    for (rows, columns, moments), (*_, cross) in zip(
        gram_groups(matrix, stats.gram), gram_groups(matrix, stats.cross), strict=True
    ):
        damped, crossed = moments.double().clone(), cross.double().clone()
        extra = damping * damped.diagonal().mean()
        damped.diagonal().add_(extra)
        crossed.diagonal().add_(extra)
        factor, floor = cholesky(damped)
        crossed.diagonal().add_(floor)
        found[rows, columns] = torch.cholesky_solve((matrix[rows, columns] @ crossed).T, factor).T
    return tensor_of(found, tuple(weight.shape), stats.outputs).to(weight.dtype)
