"""Products of a quantized matrix and a sparse quantized one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dither.core import Encoded, SpecError, Stats, on_cpu
from dither.encoders.coded_grid import BySettings
from dither.encoders.lloyd import spread_start
from dither.formats import Factors
from dither.formats.factors import MOST_RANK
from dither.formats.grid_rounding import require_floating
from dither.formats.grouping import rows_of
from dither.formats.settings import check_count

_STEPS = 4
"""Projected gradient steps for the sparse factor between two fits of the other one."""

_TRIED = (0.6, 0.7, 0.8, 0.9, 1.0)
"""Grids that are tried, as shares of the one that just holds the largest value."""

_MATRIX = 2


@dataclass(frozen=True, eq=False)
class SparseFactors(BySettings):
    """Quantized sparse weight decomposition (Kuzmin et al. 2022, arXiv 2207.11048, eq. 1).

    ``min || (W - C Z) X ||`` with ``C`` ``(rows, rank)`` and ``Z`` ``(rank, columns)`` on uniform
    grids, and at most a share of ``Z`` not 0. Alternating: gradient steps of length one over the
    Lipschitz constant for ``Z``, of which the largest values are kept, and least squares for ``C``;
    then the same with values on their grids. A sweep that would raise the objective is taken back.
    Without a grid and with all of ``Z`` it is the truncated singular value decomposition, and with
    ``one_hot`` it is Lloyd's algorithm: columns of ``W`` are clustered, ``C`` has the centroids.

    The zeros need no mask: they are codes, and cost what their frequency says. Factors that lie so
    close to others that a file could not tell them apart are replaced by ``Factors()``, which takes
    more bytes.

    Attributes:
        rank: of the product; of smaller matrices as many as rows or columns.
        density: share of ``Z`` that is kept, above 0 to 1.
        left_bits: of ``C``, 2 to 16.
        right_bits: of ``Z``, 2 to 16.
        sweeps: of each kind, at most.
        damping: of a Gram matrix, as a share of its mean diagonal.
        one_hot: one value of 1 in each column of ``Z``, and 0 elsewhere; density, bits of ``Z`` and
            a Gram matrix are not used then.

    >>> generator = torch.Generator().manual_seed(0)
    >>> weight = torch.randn(32, 3, generator=generator) @ torch.randn(3, 40, generator=generator)
    >>> decoded = SparseFactors(3, 1.0, left_bits=10, right_bits=10).encode(weight).decode()
    >>> float((decoded - weight).var() / weight.var()) < 1e-4
    True
    """

    rank: int
    density: float = 0.5
    left_bits: int = 8
    right_bits: int = 4
    sweeps: int = 30
    damping: float = 0.01
    one_hot: bool = False

    def __post_init__(self) -> None:
        check_count("SparseFactors", "rank", self.rank, 1, MOST_RANK)
        for name in ("left_bits", "right_bits"):
            check_count("SparseFactors", name, getattr(self, name), 2, 16)
        check_count("SparseFactors", "sweeps", self.sweeps, 1, 1 << 20)
        if not 0 < self.density <= 1:
            raise SpecError(f"SparseFactors keeps a share above 0 to 1, not {self.density}")

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        """Factors on their grids, in ``Factors``.

        Args:
            weight: floating point, finite; viewed as ``(shape[0], rest)``.
            stats: with one Gram matrix of all columns, the error is that of the layer's output.

        Raises:
            SpecError: a weight is not finite.
        """
        weight, stats = on_cpu(weight, stats)
        grid, held = Factors(), self.integers(weight, stats)
        if held is None:
            return grid.encode(weight)
        scale = torch.tensor([held.scale], dtype=torch.float32)
        encoded = grid.encoded(held.left, held.right, tuple(weight.shape), weight.dtype, scale)
        if grid.comes_back(encoded):
            return encoded
        nearest = grid.assign(weight, {"right": held.right, "scale": scale})
        errors = [
            (e.decode().double() - weight.double()).square().sum() for e in (encoded, nearest)
        ]
        return nearest if errors[1] <= 2 * errors[0] else grid.encode(weight)

    def integers(self, weight: Tensor, stats: Stats | None = None) -> Integers | None:
        """Both factors in steps; None where there is nothing to factor, or no scale for it."""
        matrix, metric = self._problem(*on_cpu(weight, stats))
        found: _Fit | None = None
        for fit in self._sweeps(matrix, metric):
            if fit.is_held and (found is None or fit.objective < found.objective):
                found = fit
        if found is None:
            return None
        held = found.integers(self._unit(weight))
        scale = torch.tensor(held.scale, dtype=torch.float32)
        least = torch.finfo(torch.float32).tiny
        return held if bool(scale.isfinite()) and scale >= least and len(held.right) else None

    def objectives(self, weight: Tensor, stats: Stats | None = None) -> list[tuple[bool, float]]:
        """Whether values were on their grids, and the objective, after each sweep."""
        matrix, metric = self._problem(*on_cpu(weight, stats))
        return [(fit.is_held, fit.objective) for fit in self._sweeps(matrix, metric)]

    def _problem(self, weight: Tensor, stats: Stats | None) -> tuple[Tensor, Tensor | None]:
        """The matrix and the metric of its columns, float64; None where all count alike."""
        weight = require_floating(weight, Factors.name)
        rows, columns = rows_of(tuple(weight.shape))
        matrix = weight.detach().double().reshape(rows, columns)
        if not bool(matrix.isfinite().all()):
            raise SpecError("a weight is NaN or infinite, and has no nearest factors")
        if matrix.numel():
            matrix = matrix / self._unit(weight)
        gram = None if stats is None else stats.gram
        if gram is None or gram.ndim != _MATRIX or len(gram) != columns or self.one_hot:
            return matrix, None
        gram = gram.double() / gram.diagonal().double().mean().clamp(min=1e-300)
        return matrix, gram + self.damping * torch.eye(columns, dtype=torch.float64)

    @staticmethod
    def _unit(weight: Tensor) -> float:
        """The largest magnitude, whose square might be beyond float64; 1 where all is 0."""
        return (float(weight.detach().double().abs().max()) if weight.numel() else 0.0) or 1.0

    def _sweeps(self, matrix: Tensor, metric: Tensor | None) -> Iterator[_Fit]:
        if not bool(matrix.any()):
            return
        fit = self._first(matrix, metric)
        yield fit
        for held in (False, True):
            if held:
                fit = self._held(fit)
                yield fit
            for _ in range(self.sweeps):
                after = self._held(self._swept(fit)) if held else self._swept(fit)
                if after.objective >= fit.objective * (1 - 1e-6):
                    break
                fit = after
                yield fit

    def _first(self, matrix: Tensor, metric: Tensor | None) -> _Fit:
        """The singular value decomposition with its smallest values dropped, or drawn centroids."""
        if self.one_hot:
            generator = torch.Generator().manual_seed(0)
            left = spread_start(matrix.T.contiguous(), self.rank, None, generator).T
            return _Fit(matrix, None, left, _nearest(matrix, left))
        root = None if metric is None else torch.linalg.cholesky(metric)
        seen = matrix if root is None else matrix @ root
        left, sizes, right = torch.linalg.svd(seen, full_matrices=False)
        left, right = left[:, : self.rank], sizes[: self.rank, None] * right[: self.rank]
        if root is not None:
            right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
        return _Fit(matrix, metric, left, _kept(right, self.density))

    def _swept(self, fit: _Fit) -> _Fit:
        """Some gradient steps for the sparse factor, then least squares for the other."""
        left, right = fit.left, fit.right
        if self.one_hot:
            right = _nearest(fit.matrix, left)
            return _Fit(fit.matrix, None, fit.fitted(right), right)
        curvature = torch.linalg.matrix_norm(left, 2).square()
        if fit.metric is not None:
            curvature = curvature * torch.linalg.matrix_norm(fit.metric, 2)
        for _ in range(_STEPS):
            slope = left.T @ fit.weighed(left @ right - fit.matrix)
            right = _kept(right - slope / curvature.clamp(min=1e-300), self.density)
        return _Fit(fit.matrix, fit.metric, fit.fitted(right), right).balanced()

    def _held(self, fit: _Fit) -> _Fit:
        """Both factors on the grids that lose least."""
        best: _Fit | None = None
        lefts = [_rounded(fit.left, self.left_bits, share) for share in _TRIED[2:]]
        rights = [_rounded(fit.right, self.right_bits, share) for share in _TRIED]
        if self.one_hot:
            rights = [(fit.right, 1.0)]
        for left, left_step in lefts:
            for right, right_step in rights:
                made = fit.scaled(left, right, (left_step, right_step))
                if best is None or made.objective < best.objective:
                    best = made
        assert best is not None  # noqa: S101 - there are grids
        return best


@dataclass(frozen=True)
class Integers:
    """Factors in steps.

    Attributes:
        left: ``(rows, rank)`` int32.
        right: ``(rank, columns)`` int32.
        scale: of their product.
    """

    left: Tensor
    right: Tensor
    scale: float


class _Fit:
    """Two factors, and how far their product is from a matrix."""

    def __init__(
        self,
        matrix: Tensor,
        metric: Tensor | None,
        left: Tensor,
        right: Tensor,
        steps: tuple[float, float] | None = None,
    ) -> None:
        self.matrix, self.metric, self.left, self.right = matrix, metric, left, right
        self.steps = steps
        error = matrix - left @ right
        self.objective = float((self.weighed(error) * error).sum())

    @property
    def is_held(self) -> bool:
        """Whether both factors are on grids."""
        return self.steps is not None

    def weighed(self, rows: Tensor) -> Tensor:
        """Rows times the metric."""
        return rows if self.metric is None else rows @ self.metric

    def fitted(self, right: Tensor) -> Tensor:
        """The left factor that loses least, with a right one."""
        weighed = self.weighed(right)
        moments = weighed @ right.T
        ridge = 1e-9 * moments.diagonal().mean().clamp(min=1e-300)
        moments = moments + ridge * torch.eye(len(moments), dtype=moments.dtype)
        solved: Tensor = torch.linalg.solve(moments, weighed @ self.matrix.T)
        return solved.T

    def scaled(self, left: Tensor, right: Tensor, steps: tuple[float, float]) -> _Fit:
        """Factors on grids, and the scale of their product that loses least: the file has one."""
        product = left @ right
        weighed = self.weighed(product)
        own = float((weighed * product).sum())
        scale = float((weighed * self.matrix).sum()) / own if own else 1.0
        scale = scale if scale > 0 else 1.0
        steps = (steps[0] * scale, steps[1])
        return _Fit(self.matrix, self.metric, left * scale, right, steps)

    def balanced(self) -> _Fit:
        """The same product with columns of one length on the left, so that one grid suits all."""
        norms = self.left.norm(dim=0).clamp(min=1e-300)
        left, right = self.left / norms, self.right * norms[:, None]
        return _Fit(self.matrix, self.metric, left, right)

    def integers(self, unit: float) -> Integers:
        """What the file holds of the matrix times ``unit``; components that are 0 go."""
        assert self.steps is not None  # noqa: S101 - asked of held fits
        left = (self.left / self.steps[0]).round().to(torch.int32)
        right = (self.right / self.steps[1]).round().to(torch.int32)
        used = left.any(0) & right.any(1)
        return Integers(left[:, used], right[used], self.steps[0] * self.steps[1] * unit)


def _kept(values: Tensor, density: float) -> Tensor:
    """The largest share of all values; 0 elsewhere."""
    count = max(1, round(density * values.numel()))
    if count >= values.numel():
        return values
    order = values.abs().flatten().argsort(descending=True, stable=True)[:count]
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[order] = True
    return values * mask.reshape(values.shape)


def _nearest(matrix: Tensor, centroids: Tensor) -> Tensor:
    """One-hot columns: which centroid (a column) is nearest to each column of a matrix."""
    distances = centroids.square().sum(0)[:, None] - 2 * (centroids.T @ matrix)
    return one_hot(distances.argmin(0), len(distances)).T.to(matrix.dtype)


def _rounded(values: Tensor, bits: int, share: float) -> tuple[Tensor, float]:
    """Nearest on a symmetric grid that ends at a share of the largest value, and its step."""
    top = 2 ** (bits - 1) - 1
    step = float(values.abs().max()) * share / top or 1.0
    return (values / step).round().clamp(-top, top) * step, step
