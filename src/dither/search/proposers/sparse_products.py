"""Products of a quantized matrix and a sparse quantized one, where they take fewer bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dither.archive import code
from dither.core import Encoded, SpecError
from dither.encoders.sparse_factors import SparseFactors
from dither.formats.grouping import rows_of
from dither.search.knowledge import Choice, Knowledge
from dither.search.predict import GRID_INDEX_NBYTES, can_quantize, what_counts

_DECIBELS = (6.0, 12.0, 20.0, 30.0)
"""Signal to noise of the low ranks that are tried, and of their grids."""

_DENSITIES = (1.0, 0.25)
_LEAST, _MOST = 1 << 12, 1 << 22
"""Values of a matrix that is tried: of larger ones a decomposition takes minutes."""


@dataclass(frozen=True)
class SparseProducts:
    """Tries :class:`~dither.SparseFactors` of a few ranks, densities and bits on each matrix.

    Every choice is made and coded at once, so that its bytes and error are not predictions: some
    seconds for a matrix of half a million weights. Trained matrices are rarely of low rank, and
    grids then take fewer bytes; that is measured, not known before.

    Attributes:
        product: that is stored; None before one is chosen.
    """

    product: SparseFactors | None = None

    def propose(self, known: Knowledge) -> Iterator[Choice]:
        """Products whose bytes and losses were measured."""
        value = known.value.detach()
        if value.ndim <= 1 or not _LEAST <= value.numel() <= _MOST or known.is_stack:
            return
        if known.rows is not None or known.axes is not None or not can_quantize(value):
            return
        energy = float(value.double().square().sum())
        for product in _candidates(value):
            try:
                encoded = product.encode(value)
            except SpecError:
                continue
            error = float((encoded.decode().double() - value.double()).square().sum())
            loss = known.sensitivity * what_counts(known, max(error, 1e-300), energy)
            nbytes = code(encoded).nbytes + 2 * GRID_INDEX_NBYTES
            yield Choice(nbytes, loss, replace(self, product=product))

    def encode(self, known: Knowledge, choice: Choice) -> Encoded:
        """The product again."""
        del choice
        assert self.product is not None  # noqa: S101 - of choices that were proposed
        return self.product.encode(known.value)


def _candidates(value: Tensor) -> Iterator[SparseFactors]:
    """Ranks that leave so much of the energy, on grids as fine as that."""
    rows, columns = rows_of(tuple(value.shape))
    sizes = torch.linalg.svdvals(value.double().reshape(rows, columns)).square()
    left = 1 - sizes.cumsum(0) / sizes.sum().clamp(min=1e-300)
    for decibels in _DECIBELS:
        rank = min(int((left > 10 ** (-decibels / 10)).sum()) + 1, len(sizes))
        bits = min(2 + round(decibels / 6.02), 16)
        for density in _DENSITIES:
            if rank * (rows + density * columns) < value.numel():
                yield SparseFactors(rank, density, bits, bits, sweeps=6)
