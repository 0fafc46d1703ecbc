"""Steps of a token table's rows, by how often they are read: counts, and what is known before."""

from __future__ import annotations

import torch
from torch import Tensor

FREQUENT = 1 / 16
"""Rows of a token table, as a share, that are about equally frequent (Mandelbrot's shift)."""

_NOTCHES = 4
_STRENGTHS = [2.0**k for k in range(2, 25)]


def prior_frequencies(rows: int) -> Tensor:
    """Shares of tokens by their numbers, ``(rows,)`` float64.

    Tokenizers number tokens by falling frequency, about as Zipf and Mandelbrot say.
    """
    shares = 1 / (torch.arange(rows, dtype=torch.float64) / rows + FREQUENT)
    return shares / shares.sum()


def frequencies(counts: Tensor) -> Tensor:
    """Shares of tokens after a sample was seen, ``(rows,)`` float64.

    The mean of a Dirichlet posterior: ``(count + a * prior) / (n + a)``. How many tokens ``a`` the
    prior counts as is chosen so that each token of the sample is likeliest given all others
    (empirical Bayes): a sample that is like the prior leaves it strong.

    Args:
        counts: how often each row was read, ``(rows,)``.

    >>> found = frequencies(torch.tensor([0, 0, 90, 10]))
    >>> bool(found[2] > 0.8) and bool(found[0] > found[1] > 0)
    True
    """
    prior, seen = prior_frequencies(len(counts)), counts.double().cpu()
    total, read = float(seen.sum()), seen > 0
    if total <= 1:
        return prior

    def likelihood(strength: float) -> float:
        others = (seen[read] - 1 + strength * prior[read]) / (total - 1 + strength)
        return float((seen[read] * others.log()).sum())

    best = max(_STRENGTHS, key=likelihood)
    return (seen + best * prior) / (total + best)


def steps_of(shares: Tensor, exponent: float) -> Tensor:
    """Relative steps of rows, ``share ** -exponent``, geometric mean 1, float32."""
    return notched(-exponent * shares.double().log2())


def notched(octaves: Tensor) -> Tensor:
    """Steps by their octaves, geometric mean 1, float32.

    They are cut to notches: a few distinct steps cost almost nothing in the file.
    """
    notches = (octaves * _NOTCHES).round() / _NOTCHES
    return torch.exp2(notches - notches.mean()).float()
