"""A format whose parameters are chosen now and then, and the values weights have under it."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from dither.core import Encoded, Format, SpecError
from dither.encoders import KMeans, Ranges
from dither.encoders.lloyd import lloyd_vectors
from dither.formats import Affine, Codebook, Product
from dither.formats.grid_rounding import SURE, Grid
from dither.formats.grouping import rows_of
from dither.train.surrogate import plain

_CHUNK = 1 << 16
"""Weights rounded at once: their temporary copies stay in the cache."""

_CLIPPED = 0.5 + 2.0**-10
"""Weights this many steps from the nearest value lie beyond the ends of a grid."""

_HALF = 2.0**15
"""Half the number of 16-bit integers."""

_SELDOM = 500
"""Steps between two runs of k-means by default; the paper has one each epoch."""

_AGAIN = 3
"""Iterations of k-means that start from the centroids in use."""


def default_refresh(fmt: Format, ranges: str) -> int:
    """Steps after which parameters are chosen anew: always, unless that is slow."""
    return _SELDOM if isinstance(fmt, Product | Codebook) or ranges == "mse" else 1


_Values = tuple[Tensor, Tensor | None]


class Fitted:
    """A format with parameters that are chosen anew now and then.

    Attributes:
        format: the format.
        ranges: ``"minmax"``, or for a bounded Affine ``"mse"``.
        params: what the format's ``assign`` takes, or None before the first :meth:`refresh`.
        indices: the centroid of each block of a Product, int64 ``(blocks,)``, frozen until the
            next refresh; else None.
        step: when they were chosen.
    """

    def __init__(self, fmt: Format, ranges: str) -> None:
        self.format = fmt
        self.ranges = ranges
        self.params: dict[str, Tensor] | None = None
        self.indices: Tensor | None = None
        self.step = -1

    def refresh(self, weight: Tensor, step: int = 0) -> None:
        """Choose parameters for this weight; k-means goes on from where it was."""
        fmt, weight = self.format, plain(weight).float()
        self.step = step
        if isinstance(fmt, Product):
            encoded = self._centroids(fmt, weight)
            self.params = fmt.params_of(encoded)
            self.indices = encoded.codes["indices"].values.reshape(-1).to(torch.int64)
        elif isinstance(fmt, Codebook):
            self.params = fmt.params_of(KMeans(fmt).lloyd(weight))
        elif self.ranges == "mse" and isinstance(fmt, Affine):
            self.params = Ranges(fmt).params(weight)
        else:
            self.params = fmt.fit(weight)

    def encode(self, weight: Tensor) -> Encoded:
        """Nearest codes; with the centroids in use where there are some, or else fresh ranges."""
        fmt = self.format
        if isinstance(fmt, Product | Codebook):
            return KMeans(fmt).lloyd(weight) if self.params is None else self.assign(weight)
        if self.ranges == "mse" and isinstance(fmt, Affine):
            return fmt.assign(weight, Ranges(fmt).params(weight))
        return fmt.encode(weight)

    def assign(self, weight: Tensor) -> Encoded:
        """Nearest codes with the parameters in use."""
        return self.format.assign(weight, self._held(weight))

    def values(self, weight: Tensor, out: Tensor, noise: Tensor | None = None) -> Tensor | None:
        """Fill ``out`` with the decoded weight, both float32 and contiguous.

        Args:
            weight: any shape.
            out: of the same shape.
            noise: 16 random bits for each weight, int16, to round at random on an Affine.

        Returns:
            Flat positions of weights beyond the ends of the grid, int64, or None.
        """
        held, fmt = self._held(weight), self.format
        if isinstance(fmt, Affine):
            return _round_all(fmt, held, weight, out, noise)
        if isinstance(fmt, Product) and self.indices is not None:
            rows, across = fmt.grid(tuple(weight.shape))
            found = self.decoded(weight)[self.indices].view(rows, across * fmt.block)
            out.view(rows, -1).copy_(found[:, : out.numel() // max(rows, 1)])
        else:
            out.copy_(fmt.assign(weight, held).decode())
        return None

    def rows(self, rows: Tensor, index: Tensor, shape: tuple[int, ...]) -> _Values:
        """Decoded rows of a matrix.

        Args:
            rows: ``weight[index]``, float32.
            index: of any shape.
            shape: of the whole.

        Returns:
            Values like ``rows``, and which of them lie beyond the ends: flat positions, or None.
        """
        if self.indices is not None:
            blocks = self.indices.view(shape[0], -1)[index]
            table = decoded_table(self.format, self._held(rows))
            return table[blocks].flatten(-2)[..., : shape[1]], None
        at = index.reshape(-1, 1) * shape[1] + torch.arange(shape[1], device=index.device)
        fmt = cast(Affine, self.format)
        grid = fmt.line(self.shared_at(rows, at.view(-1), shape))
        values, clipped = round_some(grid, rows.reshape(-1))
        beyond = None if clipped is None else clipped.nonzero().squeeze(1)
        return values.view(rows.shape), beyond

    @property
    def knows_rows(self) -> bool:
        """Whether :meth:`rows` can be asked."""
        fitted = self.params is not None
        return fitted and (self.indices is not None or isinstance(self.format, Affine))

    @property
    def points(self) -> int:
        """Centroids in use."""
        return len((self.params or {}).get("centroids", ()))

    def decoded(self, weight: Tensor) -> Tensor:
        """The centroids of a Product as they decode, ``(centroids, block)``."""
        return decoded_table(self.format, self._held(weight))

    def shared_at(self, weight: Tensor, at: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Parameters of an Affine for the weights at flat positions, int64, of a shape."""
        fmt, held = self.format, self._held(weight)
        if not isinstance(fmt, Affine):
            raise SpecError(f"{fmt!r} has no parameters for single weights")
        grouping, (_, columns) = fmt.grouping(shape), rows_of(shape)
        if grouping.count == 1:
            return held
        if grouping.axis is not None:
            index = at // prod(shape[grouping.axis + 1 :]) % shape[grouping.axis]
        else:
            group = fmt.group or 1
            index = at // columns * grouping.groups_per_row + at % columns // group
        return {name: value[index] for name, value in held.items()}

    def state(self) -> dict[str, Any]:
        """Everything, for resuming."""
        return {"params": self.params, "indices": self.indices, "step": self.step}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.params, self.indices, self.step = state["params"], state["indices"], state["step"]

    def _held(self, weight: Tensor) -> dict[str, Tensor]:
        if self.params is None:
            self.refresh(weight, self.step)
        return self.params or {}

    def _centroids(self, fmt: Product, weight: Tensor) -> Encoded:
        blocks = fmt.blocks(weight).float()
        if self.params is None or len(blocks) <= 4 * fmt.points:
            return KMeans(fmt).lloyd(weight)
        unit = 2.0 ** -blocks.abs().max().clamp(min=1e-37).log2().ceil().item()
        generator = torch.Generator(weight.device).manual_seed(0)
        table = self.params["centroids"] * unit
        table = lloyd_vectors(blocks * unit, table, _AGAIN, None, generator) / unit
        return fmt.assign(weight, {"centroids": table})


def decoded_table(fmt: Format, held: Mapping[str, Tensor]) -> Tensor:
    """Centroids as they decode, ``(centroids, block)`` float32, after rounding to their type."""
    none = held["centroids"].new_empty(0, held["centroids"].shape[1])
    return fmt.params_of(fmt.assign(none, held))["centroids"]


def round_some(grid: Grid, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Decoded values of weights, exactly as files hold them, and which lie beyond the ends.

    Args:
        grid: with parameters that broadcast to the weights.
        weight: float32.

    Returns:
        Values, and a boolean mask or None.
    """
    codes = grid.position(weight).round_().clamp_(grid.lowest, grid.highest)
    values = _values(grid, codes)
    error = (values - weight).abs_()
    where = (error > grid.scale.abs() * (SURE * grid.stride)).nonzero(as_tuple=True)
    if not where[0].numel():
        return values, None
    chosen, rest = _grid_at(grid, where, weight.shape), weight[where]
    codes = chosen.nearest(rest, torch.float32)
    values[where] = found = chosen.values(codes)
    # Half a step beyond the first or the last code there is no clipping yet.
    far = (found - rest).abs_() > chosen.scale.abs() * (_CLIPPED * grid.stride)
    far &= (codes == grid.lowest) | (codes == grid.highest)
    if not bool(far.any()):
        return values, None
    clipped = torch.zeros_like(weight, dtype=torch.bool)
    clipped[where] = far
    return values, clipped


def _grid_at(grid: Grid, where: tuple[Tensor, ...], shape: torch.Size) -> Grid:
    """The same grid for some of the weights of a box, as vectors."""

    def pick(part: Tensor) -> Tensor:
        return part.expand(shape)[where]

    zero = pick(grid.zero) if isinstance(grid.zero, Tensor) else grid.zero
    offset = None if grid.offset is None else pick(grid.offset)
    return Grid(pick(grid.scale), zero, offset, grid.stride, grid.lowest, grid.highest)


def _values(grid: Grid, codes: Tensor) -> Tensor:
    """``grid.values`` of codes in float32, which holds them exactly; overwrites them."""
    if grid.stride != 1:
        codes.mul_(grid.stride)
    codes.sub_(grid.zero).mul_(grid.scale)
    return codes if grid.offset is None else codes.add_(grid.offset)


def _round_all(
    fmt: Affine, held: Mapping[str, Tensor], weight: Tensor, out: Tensor, noise: Tensor | None
) -> Tensor | None:
    """Fill ``out`` box by box; positions of clipped weights, which are looked for only if any."""
    if not _round_boxes(fmt, held, (weight, out, noise), None):
        return None
    marks = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    _round_boxes(fmt, held, (weight, out, noise), marks)
    return marks.view(-1).nonzero().squeeze(1)


def _round_boxes(
    fmt: Affine,
    held: Mapping[str, Tensor],
    tensors: tuple[Tensor, Tensor, Tensor | None],
    marks: Tensor | None,
) -> bool:
    weight, out, noise = tensors
    some = [weight, out, weight if noise is None else noise, out if marks is None else marks]
    names, is_clipped = list(held), False
    grouping = fmt.grouping(tuple(weight.shape))
    for (box, target, bits, mark), parts in grouping.walk(
        some, [held[name] for name in names], _CHUNK
    ):
        grid = fmt.line(dict(zip(names, parts, strict=True)))
        if noise is None:
            values, clipped = round_some(grid, box)
        else:
            values, clipped = _round_randomly(grid, box, bits)
        target.copy_(values)
        if clipped is not None:
            is_clipped = True
            if marks is not None:
                mark.copy_(clipped)
    return is_clipped


def _round_randomly(grid: Grid, weight: Tensor, bits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Up or down with probabilities that leave the mean where it was."""
    place = grid.position(weight)
    codes = bits.to(torch.float32).add_(_HALF + 0.5).mul_(1 / (2 * _HALF)).add_(place).floor_()
    values = _values(grid, codes.clamp_(grid.lowest, grid.highest))
    far = (place < grid.lowest - 0.5) | (place > grid.highest + 0.5)
    return values, far if bool(far.any()) else None


def uniform(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """``count`` integers of 16 random bits, int16: as cheap as randomness gets."""
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    words.random_(-(1 << 63), None, generator=generator)
    return words.view(torch.int16)[:count]
