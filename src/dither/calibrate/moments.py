"""Moments of input vectors, summed up batch by batch in bounded memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dither.disk import Disk, kept, touched

MOST_INPUTS = 4096
"""Inputs of one Gram matrix, 64 MiB; more are cut into equal blocks."""


SQUARES, CROSSED = "squares", "crossed"
"""Second moments of inputs, and of what they should be with what they are."""

Vectors = Tensor | Sequence[Tensor]
"""Input vectors ``(groups, vectors, inputs)``, or ``(vectors, inputs)`` for each group."""


class Moments:
    """Running first and second moments of one weight's inputs.

    Sums are float32 matrices and float64 vectors; with more than ``most`` inputs, second moments
    are kept of equal blocks of consecutive inputs only; a shorter last block is filled with zeros.

    Args:
        most: inputs of one matrix.
        disk: where second moments are, if not in memory.

    >>> moments = Moments()
    >>> moments.add(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    >>> moments.gram().tolist(), moments.mean().tolist()
    ([[5.0, 7.0], [7.0, 10.0]], [2.0, 3.0])
    """

    def __init__(self, most: int = MOST_INPUTS, disk: Disk | None = None) -> None:
        self._most, self._disk = most, disk
        self._squares: Tensor | None = None
        self._crossed: Tensor | None = None
        self._sums: Tensor | None = None
        self._wanted: Tensor | None = None
        self._counts: Tensor | None = None
        self._is_paired = True
        self.low = torch.inf
        self.high = -torch.inf

    @property
    def samples(self) -> int:
        """Input vectors seen, in the group that saw most."""
        return 0 if self._counts is None else int(self._counts.max())

    def add(
        self,
        vectors: Vectors,
        original: Vectors | None = None,
        kinds: Collection[str] = (SQUARES, CROSSED),
    ) -> None:
        """Count more input vectors.

        Args:
            vectors: ``(groups, vectors, inputs)``, or for each group ``(vectors, inputs)``.
            original: what they should be, of the same shape, for the cross moments. Once they are
                not known, there are no cross moments.
            kinds: of second moments to sum up; for the others see :meth:`join`.
        """
        self._is_paired = self._is_paired and original is not None
        for group, some in enumerate(vectors):
            self._prepare(len(vectors), some.shape[1], some.device)
            assert self._squares is not None  # noqa: S101 - for the type checker
            assert self._sums is not None  # noqa: S101
            assert self._counts is not None  # noqa: S101
            if not len(some):
                continue
            blocks = _cut(some, *self._squares.shape[1:3])
            touched(self._squares)
            if SQUARES in kinds:
                self._squares[group].baddbmm_(blocks.transpose(1, 2), blocks)
            self._sums[group] += some.sum(0, dtype=torch.float64)
            self._counts[group] += len(some)
            self.low = min(self.low, float(some.min()))
            self.high = max(self.high, float(some.max()))
            if original is not None and CROSSED in kinds:
                if self._crossed is None:
                    self._crossed = self._zeros(*self._squares.shape, device=some.device)
                    self._wanted = torch.zeros_like(self._sums)
                assert self._wanted is not None  # noqa: S101
                self._wanted[group] += original[group].sum(0, dtype=torch.float64)
                wanted = _cut(original[group], *self._squares.shape[1:3])
                self._crossed[group].baddbmm_(wanted.transpose(1, 2), blocks)

    def join(self, other: Moments) -> None:
        """Take the cross moments from another, which was given the same vectors."""
        self._crossed, self._wanted = other._crossed, other._wanted
        self._is_paired = other._is_paired

    def gram(self) -> Tensor | None:
        """Mean second moments, ``(inputs, inputs)`` or ``(n, inputs, inputs)``."""
        return self._mean_of(self._squares)

    def joined_gram(self) -> Tensor | None:
        """The same where groups are experts: each leans on all of them, the more the less it saw.

        As many vectors as there are inputs count as much as those of all groups together.
        """
        if self._squares is None or self._counts is None:
            return None
        counts, inputs = self._counts.float(), self._squares.shape[-1]
        all_together = self._squares.sum(0) / counts.sum().clamp(min=1)
        means = (self._squares + inputs * all_together) / (counts + inputs)[:, None, None, None]
        return kept(means.flatten(0, 1), self._squares)

    def cross(self) -> Tensor | None:
        """Mean products of original and actual inputs, as :meth:`gram`."""
        return self._mean_of(self._crossed) if self._is_paired else None

    def mean(self) -> Tensor | None:
        """Mean inputs, ``(inputs,)`` or ``(groups, inputs)``, float32."""
        return self._mean_vector(self._sums)

    def wanted(self) -> Tensor | None:
        """The same of what the inputs should be."""
        return self._mean_vector(self._wanted) if self._is_paired else None

    def _mean_vector(self, sums: Tensor | None) -> Tensor | None:
        if sums is None or self._counts is None:
            return None
        means = (sums / self._counts.clamp(min=1)[:, None]).float()
        return means[0] if len(means) == 1 else means

    def _mean_of(self, sums: Tensor | None) -> Tensor | None:
        if sums is None or self._counts is None:
            return None
        touched(sums)
        means = (sums / self._counts.clamp(min=1).float()[:, None, None, None]).flatten(0, 1)
        return kept(means[0] if len(means) == 1 else means, sums)

    def _prepare(self, groups: int, inputs: int, device: torch.device) -> None:
        if self._squares is not None:
            return
        # One axis cannot tell groups of outputs from groups of inputs: the former stay whole.
        blocks = -(-inputs // self._most) if groups == 1 else 1
        size = -(-inputs // blocks)
        self._squares = self._zeros(groups, blocks, size, size, device=device)
        self._sums = torch.zeros(groups, inputs, dtype=torch.float64, device=device)
        self._counts = torch.zeros(groups, dtype=torch.int64, device=device)

    def _zeros(self, *shape: int, device: torch.device) -> Tensor:
        if self._disk is None:
            return torch.zeros(shape, dtype=torch.float32, device=device)
        return self._disk.zeros(*shape, dtype=torch.float32)


def _cut(vectors: Tensor, blocks: int, size: int) -> Tensor:
    """Vectors ``(vectors, inputs)`` as ``(blocks, vectors, size)``, zeros behind the last."""
    missing = blocks * size - vectors.shape[1]
    filled = functional.pad(vectors, (0, missing)) if missing else vectors
    return filled.reshape(-1, blocks, size).transpose(0, 1)
