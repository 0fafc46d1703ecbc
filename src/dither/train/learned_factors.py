"""A weight that is the product of two learned integer matrices, one of them sparse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dither.core import Encoded, SpecError, Stats
from dither.encoders.sparse_factors import SparseFactors
from dither.formats import Factors
from dither.formats.grouping import rows_of
from dither.train.method import Method
from dither.train.surrogate import Surrogate, straight_through

_EXACT = 1 << 24
"""Integers below this are exact in float32, and so are their sums."""


@dataclass(frozen=True)
class LearnedFactors(Method):
    """End-to-end fine-tuning of quantized sparse factors (Kuzmin et al. 2022, arXiv 2207.11048).

    Begins with what :class:`~dither.SparseFactors` finds for the weight. Then both factors learn,
    straight through their rounding; which entries of the right one are 0, and the scale, stay. The
    weight itself is not trained, and has no gradient: DDP must not wait for it, see
    :class:`~dither.LearnedCodebook`.

    Attributes:
        rank: of the product.
        density: share of the right factor that is kept.
        left_bits: of the left factor.
        right_bits: of the right one.
        lr: learning rate of both, in steps of their grids, for Adam.

    >>> weight = torch.ones(4, 4)
    >>> surrogate = LearnedFactors(rank=1, density=1.0).begin(weight)
    >>> bool((surrogate.encode(weight).decode() == weight).all())
    True
    """

    name: ClassVar[str] = "learned_factors"

    rank: int = 16
    density: float = 0.5
    left_bits: int = 8
    right_bits: int = 4
    lr: float = 0.02

    def __post_init__(self) -> None:
        self.encoder  # noqa: B018 - refuses what the encoder refuses

    @property
    def encoder(self) -> SparseFactors:
        """What training begins with."""
        return SparseFactors(self.rank, self.density, self.left_bits, self.right_bits)

    def begin(self, weight: Tensor) -> LearnedProduct:
        return LearnedProduct(self, weight)


class LearnedProduct(Surrogate):
    """One weight as a product.

    Attributes:
        left: ``(rows * rank,)`` in steps.
        right: ``(rank * columns,)`` in steps.
        mask: bool ``(rank, columns)``, where the right factor is not 0.
        scale: float32 ``(1,)``, of the product.
    """

    def __init__(self, spec: LearnedFactors, weight: Tensor) -> None:
        super().__init__()
        if not weight.ndim or not weight.numel():
            raise SpecError("a scalar or an empty tensor is no product; use LSQ or Affine")
        self.spec, self.lr = spec, spec.lr
        rows, columns = rows_of(tuple(weight.shape))
        rank = min(spec.rank, rows, columns)
        left, right = torch.zeros(rows, rank), torch.zeros(rank, columns)
        self.scale = torch.ones(1, device=weight.device)
        if (held := spec.encoder.integers(weight)) is not None:
            used = len(held.right)
            left[:, :used], right[:used] = held.left.float(), held.right.float()
            self.scale.fill_(held.scale)
        self.mask = (right != 0).to(weight.device)
        self._sides = (rows, rank, columns)
        self.left = nn.Parameter(left.flatten().to(weight.device))
        self.right = nn.Parameter(right.flatten().to(weight.device))

    def integers(self) -> tuple[Tensor, Tensor]:
        """Both factors on their grids, float32, differentiable."""
        rows, rank, columns = self._sides
        return (
            _rounded(self.left, self.spec.left_bits).reshape(rows, rank),
            _rounded(self.right, self.spec.right_bits).reshape(rank, columns) * self.mask,
        )

    def noisy(self, weight: Tensor) -> Tensor:
        left, right = self.integers()
        most = self._sides[1] << (self.spec.left_bits + self.spec.right_bits - 2)
        if most >= _EXACT:
            left, right = left.double(), right.double()
        return ((left @ right).float() * self.scale).reshape(weight.shape)

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        with torch.no_grad():
            left, right = (part.to(torch.int32) for part in self.integers())
        used = left.any(0) & right.any(1)
        if not bool(used.any()):
            used[:1] = True
        left, right = left[:, used], right[used]
        grid, scale = Factors(), self.scale.clone()
        encoded = grid.encoded(left, right, tuple(weight.shape), weight.dtype, scale)
        if grid.comes_back(encoded):
            return encoded
        return grid.assign(encoded.decode(), {"right": right, "scale": scale})

    def aside(self) -> dict[str, Any]:
        return {"mask": self.mask, "scale": self.scale}

    def load_aside(self, state: Mapping[str, Any]) -> None:
        self.mask, self.scale = state["mask"], state["scale"]


def _rounded(values: Tensor, bits: int) -> Tensor:
    """Nearest integers within a symmetric grid, straight through."""
    top = 2 ** (bits - 1) - 1
    return straight_through(values.round().clamp(-top, top), values)
