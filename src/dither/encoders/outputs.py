"""A weight as a matrix of outputs and inputs, with the moments of the inputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dither.core import SpecError, Stats


def matrix_of(weight: Tensor, outputs: int = 0) -> Tensor:
    """The weight as ``(outputs, inputs)``.

    Args:
        weight: at least one axis.
        outputs: the axis that counts outputs.

    Raises:
        SpecError: there is no such axis.
    """
    if weight.ndim == 0:
        raise SpecError("a single number has no inputs; encode it without a Gram matrix")
    if not 0 <= outputs < weight.ndim:
        raise SpecError(f"outputs={outputs} is no axis of a weight of shape {tuple(weight.shape)}")
    moved = weight.movedim(outputs, 0)
    return moved.reshape(len(moved), -1)


def tensor_of(matrix: Tensor, shape: tuple[int, ...], outputs: int = 0) -> Tensor:
    """The inverse of :func:`matrix_of`."""
    moved = [shape[outputs], *shape[:outputs], *shape[outputs + 1 :]]
    return matrix.reshape(moved).movedim(0, outputs).contiguous()


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
        SpecError: moments that do not fit, or are not positive definite.
    """
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
        factor, fault = torch.linalg.cholesky_ex(damped)
        if int(fault) != 0:
            raise SpecError("the Gram matrix is not positive definite; raise the damping")
        found[rows, columns] = torch.cholesky_solve((matrix[rows, columns] @ crossed).T, factor).T
    return tensor_of(found, tuple(weight.shape), stats.outputs).to(weight.dtype)
