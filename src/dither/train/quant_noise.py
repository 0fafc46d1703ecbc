"""Quant-Noise: a random part of the weights is quantized at each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dither.core import Format, SpecError
from dither.formats import Affine, Product
from dither.formats.grouping import rows_of
from dither.formats.settings import check_choice, check_count
from dither.train.method import Method
from dither.train.ramp import Ramp, value_at
from dither.train.refreshed_format import Fitted, default_refresh, round_some, uniform
from dither.train.straight_through import Replaced, Replacing, check_quantizer
from dither.train.surrogate import Surrogate

KINDS = ("quantizer", "proxy", "mean")
SELECTIONS = ("blocks", "clusters")

_RARE = 0.25
"""Below this share, chosen blocks are listed rather than marked."""

_TABLE = 16
"""Matrices with so many more rows than columns are embeddings as a rule."""


@dataclass(frozen=True)
class QuantNoise(Method):
    """Training with quantization noise (Fan, Stock et al. 2021, arXiv 2004.07320).

    At each step every block of weights is chosen with probability ``p``. Training reads a chosen
    block as what ``kind`` makes of it, with the gradient passed straight through, and the others as
    they are. Evaluation and file have all of the weight in ``format``. With ``p=0`` training is
    plain, with ``p=1`` quantization-aware. Stored weights never change.

    A block is a run of weights of one row of the tensor viewed as ``(shape[0], rest)``, along the
    inputs of a Linear. A Product has its own block; otherwise, where kernels have more than one
    weight and ``block`` is not 1, a block is one kernel.

    Attributes:
        format: of the file.
        p: the share of noised blocks, 0 to 1, or a ramp. Published: 0.05 to 0.2 for a Product, 0.5
            for int8 and int4.
        block: weights of one block; by default that of a Product, and 1 for other formats.
        kind: ``"quantizer"``: the block's decoded values; ``"proxy"``: zero, which the paper finds
            as good for a Product; ``"mean"``: the mean of the tensor's blocks.
        refresh: steps after which parameters (ranges, centroids and the choice of centroids) are
            chosen anew; by default 1, and 500 where k-means or a search is run.
        rescale: with ``"proxy"``, multiply what is left by ``1 / (1 - p)``.
        selection: ``"blocks"``, or for a Product ``"clusters"``: all blocks of a centroid at once.
        ranges: ``"minmax"``, or for a bounded Affine ``"mse"``: clip for the least squared error.

    >>> from dither.formats import Product
    >>> spec = QuantNoise(Product(8), p=0.1, kind="proxy")
    """

    name: ClassVar[str] = "quant_noise"

    format: Format
    p: float | Ramp = 0.1
    block: int | None = None
    kind: str = "quantizer"
    refresh: int | None = None
    rescale: bool = False
    selection: str = "blocks"
    ranges: str = "minmax"

    def __post_init__(self) -> None:
        check_quantizer("QuantNoise", self.format, self.refresh, self.ranges)
        check_choice("QuantNoise", "kind", self.kind, KINDS)
        check_choice("QuantNoise", "selection", self.selection, SELECTIONS)
        ends = (self.p.start, self.p.end) if isinstance(self.p, Ramp) else (self.p,)
        if not all(0 <= end <= 1 for end in ends):
            raise SpecError(f"QuantNoise chooses a share p of 0 to 1 of the blocks, not {self.p}")
        is_product = isinstance(self.format, Product)
        if self.block is not None:
            check_count("QuantNoise", "block", self.block, 1, 1 << 24)
            if isinstance(self.format, Product) and self.block != self.format.block:
                raise SpecError(
                    f"QuantNoise(block={self.block}) with {self.format!r}: a Product has blocks of "
                    "its own; leave block out"
                )
        if self.selection == "clusters" and not is_product:
            raise SpecError(f"selection='clusters' needs a Product, not {self.format!r}")
        if self.rescale and (self.kind != "proxy" or max(ends) >= 1):
            raise SpecError("rescale=True needs kind='proxy' and a share p below 1")

    def block_of(self, shape: tuple[int, ...]) -> int:
        """Weights of one block of a tensor.

        >>> from dither.formats import Affine, Product
        >>> QuantNoise(Affine(4), block=8).block_of((64, 32, 3, 3))
        9
        """
        if isinstance(self.format, Product):
            return self.format.block
        kernel = prod(shape[2:])
        return kernel if kernel > 1 and (self.block or 1) > 1 else self.block or 1

    def begin(self, weight: Tensor) -> Surrogate:
        return Noised(self, weight)


class Noised(Replacing):
    """One weight, part of which is noised.

    Attributes:
        share: the probability of this step.
    """

    def __init__(self, spec: QuantNoise, weight: Tensor) -> None:
        every = spec.refresh or default_refresh(spec.format, spec.ranges)
        super().__init__(Fitted(spec.format, spec.ranges), every)
        self.spec = spec
        self.share = 0.0
        self._block = spec.block_of(tuple(weight.shape))
        self._rows, self._columns = rows_of(tuple(weight.shape))
        self._across = -(-self._columns // self._block)
        self._needs_fit = spec.kind == "quantizer" or spec.selection == "clusters"
        # Chosen blocks: positions in order, or marks; None for all or none.
        self._chosen: Tensor | None = None
        self._marked: Tensor | None = None
        self._mean: Tensor | None = None

    def draw(self, weight: Tensor, generator: torch.Generator, step: int) -> None:
        self.share = value_at(self.spec.p, self.progress)
        if self.share > 0 and self._needs_fit:
            super().draw(weight, generator, step)
        else:
            self._drawn += 1
        if self.spec.kind == "mean" and (self._mean is None or step % self.refresh == 0):
            self._mean = self._blocks(weight.float()).mean(0)
        self._chosen = self._marked = None
        if 0 < self.share < 1:
            self._chosen = self._draw(generator, weight.device)

    def noisy(self, weight: Tensor) -> Tensor:
        if self.share == 0 or not weight.numel():
            return weight
        values, clipped = self.replacement(weight)
        if self.spec.rescale and self._chosen is not None:
            at = self._positions(self._chosen)
            return _apply(_Rescaled, weight, values, at, 1 / (1 - self.share))
        return _apply(Replaced, weight, values, clipped)

    def fill(self, weight: Tensor, out: Tensor) -> Tensor | None:
        if self.spec.kind != "quantizer":
            self._fill_constant(weight, out)
            return None
        chosen = self._chosen
        if chosen is None:
            return self.fitted.values(weight, out)
        is_listed = chosen.dtype == torch.int64
        if self.share < _RARE and isinstance(self.spec.format, Affine):
            return self._fill_rounded(self.spec.format, weight, out, chosen)
        if is_listed and self.fitted.indices is not None and self._is_whole():
            out.copy_(weight)
            table = self.fitted.decoded(weight)
            self._view(out)[chosen] = table[self.fitted.indices[chosen]]
            return None
        clipped = self.fitted.values(weight, out)
        marks = self._marks(chosen, tuple(weight.shape))
        torch.where(marks, out, weight, out=out)
        return None if clipped is None else clipped[marks.view(-1)[clipped]]

    def reads_rows(self) -> bool:
        return self.share == 0 or self.spec.kind != "quantizer" or self.fitted.knows_rows

    def noisy_rows(self, rows: Tensor, index: Tensor) -> Tensor:
        if self.share == 0 or not rows.numel():
            return rows
        clipped: Tensor | None = None
        if self.spec.kind == "quantizer":
            values, clipped = self.fitted.rows(rows.detach(), index, (self._rows, self._columns))
        else:
            values = self._constant_row(rows).expand_as(rows)
        if self._chosen is not None:
            marks = self._marks_of_rows(self._chosen, index)
            if self.spec.rescale:
                factor = 1 / (1 - self.share)
                values = torch.where(marks, values, rows.detach() * factor)
                at = marks.reshape(-1).nonzero().squeeze(1)
                return _apply(_Rescaled, rows, values, at, factor)
            values = torch.where(marks, values, rows.detach())
            clipped = clipped if clipped is None else clipped[marks.reshape(-1)[clipped]]
        return _apply(Replaced, rows, values, clipped)

    # --- inside ----------------------------------------------------------------------------------

    def _draw(self, generator: torch.Generator, device: torch.device) -> Tensor:
        if self.spec.selection == "clusters":
            indices, points = self.fitted.indices, self.fitted.points
            if indices is not None:  # which :meth:`Replacing.draw` has seen to
                return marked(points, self.share, generator, device)[indices]
        count = self._rows * self._across
        is_table = self._rows >= _TABLE * self._columns  # of which a few rows will be read
        draw = listed if self.share < _RARE and not is_table else marked
        return draw(count, self.share, generator, device)

    def _fill_constant(self, weight: Tensor, out: Tensor) -> None:
        row = self._constant_row(weight)
        if self._chosen is None:
            out.view(self._rows, self._columns).copy_(row.expand(self._rows, -1))
            return
        out.copy_(weight)
        if self.spec.rescale:
            out.mul_(1 / (1 - self.share))
        if self._is_whole():
            self._view(out)[self._chosen] = row[: self._block]
        else:
            marks = self._marks(self._chosen, (self._rows, self._columns))
            table = out.view(self._rows, self._columns)
            torch.where(marks, row, table, out=table)

    def _constant_row(self, like: Tensor) -> Tensor:
        """What a row of chosen blocks becomes: zeros, or the mean block again and again."""
        if self.spec.kind != "mean" or self._mean is None:
            return like.new_zeros(self._columns)
        return self._mean.repeat(self._across)[: self._columns]

    def _fill_rounded(
        self, fmt: Affine, weight: Tensor, out: Tensor, chosen: Tensor
    ) -> Tensor | None:
        at = self._positions(chosen)
        out.copy_(weight)
        shared = self.fitted.shared_at(weight, at, tuple(weight.shape))
        values, clipped = round_some(fmt.line(shared), weight.view(-1)[at])
        out.view(-1).index_copy_(0, at, values)
        return None if clipped is None else at[clipped]

    def _is_whole(self) -> bool:
        return self._columns % self._block == 0

    def _view(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1, self._block)

    def _blocks(self, weight: Tensor) -> Tensor:
        table = weight.reshape(self._rows, self._columns)
        if not self._is_whole():
            table = torch.nn.functional.pad(table, (0, -self._columns % self._block))
        return table.reshape(-1, self._block)

    def _marks_of_rows(self, chosen: Tensor, index: Tensor) -> Tensor:
        """Whether each weight of some rows is chosen: a mask ``(*index.shape, columns)``."""
        if chosen.dtype == torch.int64:
            if self._marked is None:
                self._marked = self._mark(chosen)
            chosen = self._marked
        marks = chosen.view(self._rows, self._across)[index]
        return marks.repeat_interleave(self._block, -1)[..., : self._columns]

    def _mark(self, listed: Tensor) -> Tensor:
        marks = torch.zeros(self._rows * self._across, dtype=torch.bool, device=listed.device)
        return marks.index_fill_(0, listed, value=True)

    def _marks(self, chosen: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Whether each weight is chosen, a mask of the weight's shape."""
        if chosen.dtype == torch.int64:
            chosen = self._mark(chosen)
        table = chosen.view(self._rows, self._across, 1).expand(-1, -1, self._block)
        return table.reshape(self._rows, -1)[:, : self._columns].reshape(shape)

    def _positions(self, chosen: Tensor) -> Tensor:
        """Flat positions of the chosen weights, int64."""
        if chosen.dtype != torch.int64 or not self._is_whole():
            marks = self._marks(chosen, (self._rows, self._columns))
            return marks.reshape(-1).nonzero().squeeze(1)
        if self._block == 1:
            return chosen
        within = torch.arange(self._block, device=chosen.device)
        return (chosen.unsqueeze(1) * self._block + within).view(-1)


class _Rescaled(torch.autograd.Function):
    """Survivors times a factor; dropped weights get the gradient straight through."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, dropped: Tensor, factor: float) -> Tensor:
        del weight  # named for its gradient
        ctx.dropped, ctx.factor = dropped, factor
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat = gradient.reshape(-1)
        scaled = flat * ctx.factor
        scaled[ctx.dropped] = flat[ctx.dropped]
        return scaled.view(gradient.shape), None, None, None


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    values: Tensor = function.apply(*arguments)
    return values


def marked(count: int, share: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """Each of ``count`` with probability ``share``, to 1 in 65,536: a mask."""
    least = round(share * 65536) - 32768
    bits = uniform(count, generator, device)
    return bits < least if least < 32768 else torch.ones_like(bits, dtype=torch.bool)


def listed(count: int, share: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """Each of ``count`` with probability ``share``: positions in order, int64.

    The gaps between them are geometric, so that only they need be drawn.
    """
    expected = count * share
    size = int(expected + 6 * math.sqrt(expected)) + 16
    parts, last = [], -1
    while last < count - 1:
        gaps = torch.empty(size, device=device).exponential_(generator=generator)
        # Beyond `count` any gap will do.
        gaps = gaps.mul_(-1 / math.log1p(-share)).clamp_(max=count).to(torch.int64).add_(1)
        parts.append(gaps.cumsum_(0).add_(last))
        last = int(parts[-1][-1])
    found = torch.cat(parts) if len(parts) > 1 else parts[0]
    return found[: int(torch.searchsorted(found, count))]
