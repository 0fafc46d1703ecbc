"""GPTQ: round one input after the other and let the rest make up for the error."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dither.core import Encoded, SpecError, Stats
from dither.encoders.grid import code_range, grid_steps, in_steps, on_grid

_BLOCK = 64


@dataclass(frozen=True, eq=False)
class GPTQ:
    """Frantar et al. 2022 (arXiv 2210.17323) on a uniform, entropy-coded grid.

    The weight is viewed as ``(outputs, inputs)``: first axis against all others. Inputs are
    rounded in order; the error of each is spread over those that follow so that the output error
    ``tr(E H E')`` is least, with ``H`` the inputs' second moments, ``Stats.gram``. They may be
    measured, or be what is known of any layer's inputs: see :mod:`dither.search.priors`.

    Attributes:
        step: the step, or one for each output (1-D).
        damping: added to the diagonal of ``H``, as a share of its mean.

    >>> weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    >>> gram = 0.9 * torch.eye(64) + 0.1  # inputs with a mean
    >>> def loss(encoded):
    ...     error = encoded.decode() - weight
    ...     return float((error @ gram * error).sum())
    >>> nearest, fed = (GPTQ(0.5).encode(weight, s) for s in (None, Stats(gram=gram)))
    >>> loss(fed) < loss(nearest)
    True
    """

    step: float | Tensor
    damping: float = 0.0

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        """Codes in ``Affine(bits=None)``; rounded to nearest where ``stats`` holds no Gram matrix.

        Args:
            weight: floating point, finite; with a Gram matrix, at least one axis.
            stats: ``gram``, ``(inputs, inputs)``, positive definite once damped; a smaller one
                holds for each group of as many consecutive inputs.

        Raises:
            SpecError: the step or the Gram matrix does not fit, or a weight is not finite.
        """
        steps = grid_steps(self.step)
        scaled = in_steps(weight, steps)
        if not weight.numel():
            return on_grid(weight, steps, scaled, 0, 0)
        if stats is None or stats.gram is None:
            rounded = scaled.round_()
        else:
            gram = _square(stats.gram, weight)
            inputs = scaled.reshape(len(scaled), -1).T.contiguous()
            spread = _feedback(gram, gram._version, self.damping)  # noqa: SLF001
            for group in inputs.split(len(gram)):
                if len(group) < len(gram):  # of a part of the inputs, not a part of the spread
                    spread = feedback(gram[: len(group), : len(group)], self.damping)
                feed_errors(group, spread)
            rounded = inputs.T.reshape(weight.shape)
        low, high = code_range(weight, *(float(end) for end in torch.aminmax(rounded)))
        return on_grid(weight, steps, rounded.sub_(low), low, high)


def _square(gram: Tensor, weight: Tensor) -> Tensor:
    """The Gram matrix, refused where it is none or the weight has no inputs."""
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
        raise SpecError(f"a Gram matrix is (inputs, inputs), not of shape {tuple(gram.shape)}")
    if weight.ndim == 0:
        raise SpecError("a single number has no inputs; encode it without a Gram matrix")
    return gram


@lru_cache(maxsize=4)
def _feedback(gram: Tensor, version: int, damping: float) -> Tensor:
    """As :func:`feedback`, kept for the next weight: layers share prior Gram matrices.

    A tensor is its own key; ``version`` rises whenever it is written to.
    """
    del version
    return feedback(gram, damping)


def feedback(gram: Tensor, damping: float = 0.0) -> Tensor:
    """How the error of each input is spread over those behind it.

    Args:
        gram: second moments of the inputs, ``(inputs, inputs)``.
        damping: share of the mean of its diagonal to add to the diagonal.

    Returns:
        ``(inputs, inputs)``, strictly upper triangular: row ``i`` is added, times the error of
        input ``i``, to the inputs behind it.

    Raises:
        SpecError: the matrix is not positive definite.
    """
    moments = gram.to(torch.float64).flip(0, 1)
    moments.diagonal().add_(damping * moments.diagonal().mean())
    factor, fault = torch.linalg.cholesky_ex(moments)
    if int(fault) != 0:
        raise SpecError("the Gram matrix is not positive definite; raise the damping")
    # With H = U U', U upper: the inverse of the Cholesky factor that GPTQ takes from H's inverse.
    upper = factor.flip(0, 1)
    del moments, factor  # wide layers: each copy takes megabytes
    inverse = torch.eye(len(upper), dtype=torch.float64)
    torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)
    inverse /= inverse.diagonal().clone()[:, None]
    return inverse.triu_(1).float()


def feed_errors(inputs: Tensor, spread: Tensor) -> Tensor:
    """Round each row of ``inputs`` in order, passing its error on to the rows behind it.

    Args:
        inputs: ``(inputs, outputs)``, in steps; is overwritten.
        spread: from :func:`feedback`.

    Returns:
        The rounded values, in the same memory.
    """
    for start in range(0, len(inputs), _BLOCK):
        block = inputs[start : start + _BLOCK]
        within = spread[start : start + _BLOCK, start : start + _BLOCK]
        errors = torch.empty_like(block)
        for i in range(len(block)):
            value = block[i].clone()
            torch.round(value, out=block[i])
            torch.sub(block[i], value, out=errors[i])
            block[i + 1 :].addr_(within[i, i + 1 :], errors[i])
        behind = inputs[start + _BLOCK :]
        behind.addmm_(spread[start : start + _BLOCK, start + _BLOCK :].T, errors)
    return inputs
