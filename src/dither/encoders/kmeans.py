"""k-means for codebooks: exact in one dimension, chunked products for blocks of weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dither.core import Encoded, SpecError, Stats, on_cpu
from dither.encoders.importance import importance_of, weighted_error
from dither.encoders.lloyd import SortedValues, lloyd_scalar, lloyd_vectors, spread_start
from dither.formats import Codebook, Product
from dither.formats.matching import distance_terms, nearest_by_terms, point_terms
from dither.formats.settings import check_choice, check_count, check_kind

if TYPE_CHECKING:
    from types import ModuleType

STARTS = ("quantile", "kmeans++")
BACKENDS = ("auto", "torch", "faiss")

SAMPLE = 1 << 20
"""Weights that a scalar codebook is fitted to, at most: evenly spaced in memory."""


@dataclass(frozen=True)
class KMeans:
    """Lloyd's k-means (1982) for a :class:`Codebook` or a :class:`Product`.

    Squared errors are weighted by ``stats.importance``, weight by weight. A codebook with buckets
    keeps the scales that its format chooses and minimises the error of the weights, not of the
    scaled weights. A cluster without weights takes over half of the costliest one. The result is
    rounded to the format's types, its codes are the nearest, and it is never worse than the start.
    A codebook for more than 2**20 weights is fitted to about that many of them.

    Attributes:
        format: a Codebook or a Product.
        iterations: of Lloyd's algorithm, 0 or more.
        start: ``"quantile"`` (for a codebook the better result of two starts: quantiles, and
            points as dense as the cube root of the density; for a product real blocks spread over
            the order of their lengths) or ``"kmeans++"`` (Arthur and Vassilvitskii 2007).
        seed: of the random choices; the same seed gives the same result on the same machine.
        backend: ``"torch"``, ``"faiss"`` (blocks on CPU with equal importance within a block
            only), or ``"auto"``: faiss where it is installed and can do it.

    Raises:
        SpecError: settings out of range; a backend that is not installed or cannot do it.

    >>> weight = torch.tensor([0.0, 0.1, 0.9, 1.0, 5.0])
    >>> KMeans(Codebook(3, dtype=torch.float32)).encode(weight).decode()
    tensor([0.0500, 0.0500, 0.9500, 0.9500, 5.0000])
    """

    format: Codebook | Product
    iterations: int = 15
    start: str = "quantile"
    seed: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        check_kind("KMeans", self.format, (Codebook, Product))
        check_count("KMeans", "iterations", self.iterations, 0, 1 << 20)
        check_count("KMeans", "seed", self.seed, 0, (1 << 31) - 2)
        check_choice("KMeans", "start", self.start, STARTS)
        check_choice("KMeans", "backend", self.backend, BACKENDS)

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        """Centroids and nearest codes.

        Raises:
            SpecError: weights that are not finite, importance that does not fit.
        """
        return self.lloyd(*on_cpu(weight, stats))

    def lloyd(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        """As :meth:`encode`, computed where the weight is: for training, in between its steps."""
        importance = importance_of(stats, weight)
        weight = weight.detach()
        first = self.format.encode(weight)
        if not weight.numel():
            return first
        if isinstance(self.format, Codebook):
            found = self._scalar(self.format, weight, importance, first)
        else:
            found = self._vectors(self.format, weight, importance, first)
        errors = [weighted_error(weight, e.decode(), importance) for e in (found, first)]
        return found if errors[0] <= errors[1] else first

    def _generator(self, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(self.seed)

    def _scalar(
        self, fmt: Codebook, weight: Tensor, importance: Tensor | None, first: Encoded
    ) -> Encoded:
        scales = {name: first.params[name] for name in ("scale", "offset") if name in first.params}
        stride = (weight.numel() // SAMPLE) | 1  # odd: no common period with rows
        values = fmt.scaled(weight, scales, stride)
        cost = None if importance is None else importance.reshape(-1)[::stride].to(torch.float64)
        if fmt.bucket is not None:  # an error of one scaled unit costs its bucket's scale squared
            at = torch.arange(0, weight.numel(), stride, device=weight.device) // fmt.bucket
            each = scales["scale"].to(torch.float64).square()[at]
            cost = each if cost is None else cost * each
        if cost is not None and not bool((cost > 0).any()):  # all buckets are constant
            return first
        ordered = SortedValues.of(values, cost)
        if bool((ordered.values.diff() > 0).sum() < fmt.points):  # a point for each value
            return fmt.assign(
                weight, {"points": ordered.values.unique() + ordered.middle, **scales}
            )
        if self.start == "kmeans++":
            chooser = self._generator(weight.device)
            starts = [spread_start(values.unsqueeze(1), fmt.points, cost, chooser).squeeze(1)]
        else:  # iterations are cheap once the values are in order: take the better of two starts
            starts = [
                start + ordered.middle
                for start in (ordered.quantiles(fmt.points), ordered.companded(fmt.points))
            ]
        found = [lloyd_scalar(ordered, start, self.iterations) for start in starts]
        points = min(found, key=lambda result: result[1])[0]
        return fmt.assign(weight, {"points": points, **scales})

    def _vectors(
        self, fmt: Product, weight: Tensor, importance: Tensor | None, first: Encoded
    ) -> Encoded:
        blocks, table = fmt.blocks(weight).to(torch.float32), fmt.params_of(first)["centroids"]
        if len(table) < fmt.points and len(blocks) <= 4 * fmt.points:
            return first  # all distinct blocks are centroids already
        unit = 2.0 ** -blocks.abs().max().clamp(min=1e-37).log2().ceil().item()
        blocks, table = blocks * unit, table * unit  # squares neither overflow nor vanish
        cost = None if importance is None else fmt.blocks(importance)
        if cost is None and weight.numel() != blocks.numel():  # the filling of short blocks is free
            cost = fmt.blocks(torch.ones_like(weight, dtype=torch.float32))
        if self.start == "kmeans++" or len(table) < fmt.points:
            chooser = self._generator(weight.device)
            table = spread_start(
                blocks, fmt.points, None if cost is None else cost.mean(1), chooser
            )
        faiss = self._faiss(blocks, cost)
        if faiss is not None:
            table = _train_faiss(faiss, self, blocks, table, cost)
        else:
            chooser = self._generator(weight.device)
            table = lloyd_vectors(blocks, table, self.iterations, cost, chooser)
        return _finish(fmt, weight, importance, table / unit)

    def _faiss(self, blocks: Tensor, cost: Tensor | None) -> ModuleType | None:
        """The module, where it is wanted, installed and able to do this."""
        if self.backend == "torch":
            return None
        alike = cost is None or bool((cost == cost[:, :1]).all())
        able = alike and blocks.device.type == "cpu" and len(blocks) >= self.format.points
        installed = importlib.util.find_spec("faiss") is not None
        if able and installed:
            import faiss

            return faiss  # type: ignore[no-any-return,unused-ignore]
        if self.backend == "faiss":
            reason = "is not installed: pip install dither[pq]"
            if installed:
                reason = (
                    "takes blocks on the CPU, at least as many as points, with one importance for "
                    "all weights of a block (short last blocks have two)"
                )
            raise SpecError(f"KMeans(backend='faiss'): faiss {reason}; or give backend='torch'")
        return None


def _train_faiss(
    faiss: ModuleType, encoder: KMeans, blocks: Tensor, table: Tensor, cost: Tensor | None
) -> Tensor:
    """Centroids by ``faiss.Kmeans`` from the same start, on all blocks."""
    trainer = faiss.Kmeans(
        blocks.shape[1],
        table.shape[0],
        niter=encoder.iterations,
        seed=encoder.seed + 1,
        min_points_per_centroid=1,
        max_points_per_centroid=10**9,  # it would train on a sample
    )
    weights = None if cost is None else cost[:, 0].contiguous().numpy()
    trainer.train(
        blocks.contiguous().numpy(), weights=weights, init_centroids=table.contiguous().numpy()
    )
    return torch.from_numpy(trainer.centroids).reshape(table.shape)


def _finish(fmt: Product, weight: Tensor, importance: Tensor | None, table: Tensor) -> Encoded:
    """The centroids in their stored type, nearest codes, and no centroid that is not used."""
    encoded = fmt.assign(weight, {"centroids": table})
    if importance is not None:
        encoded = _weighted_codes(fmt, weight, importance, encoded)
    indices = encoded.codes["indices"].values
    used, compact = indices.to(torch.int64).unique(return_inverse=True)
    held: Mapping[str, Tensor] = fmt.params_of(encoded)
    if len(used) == len(held["centroids"]):
        return encoded
    fewer = fmt.assign(weight, {**held, "centroids": held["centroids"][used]})
    return fmt.with_indices(fewer, compact)


def _weighted_codes(fmt: Product, weight: Tensor, importance: Tensor, encoded: Encoded) -> Encoded:
    """The same centroids with the codes of least weighted error."""
    blocks, cost = fmt.blocks(weight).to(torch.float32), fmt.blocks(importance)
    table = fmt.params_of(encoded)["centroids"]
    unit = 2.0 ** -max(blocks.abs().max(), table.abs().max()).clamp(min=1e-37).log2().ceil().item()
    terms = distance_terms(table * unit, importance=True)
    found = nearest_by_terms(point_terms(blocks * unit, cost / cost.max()), terms)
    return fmt.with_indices(encoded, found)
