"""Product quantization: blocks of weights share a table of vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dither.core import (
    MAX_ALPHABET,
    Codes,
    Encoded,
    Format,
    SpecError,
    Stats,
    code_dtype,
    expect_codes,
    expect_param,
    expect_parts,
)
from dither.formats.grid_rounding import require_floating, require_held, restore, usable_scale
from dither.formats.grouping import chunks, rows_of
from dither.formats.matching import nearest_vectors
from dither.formats.memory import new_tensor
from dither.formats.settings import check_choice, check_count, check_restored

SAMPLE = 1 << 17
"""Blocks looked at, at most, to choose a first table."""

_INT8_ZERO = 128


@dataclass(frozen=True)
class Product(Format):
    """Blocks of consecutive weights, each one of a few centroids (Jégou et al. 2011; Stock 2020).

    The weight is seen as ``(shape[0], rest)`` and each row is cut into blocks: a 3x3 kernel with
    ``block=9`` is one block, Linear layers are cut along their inputs. Where ``block`` does not
    divide a row, the end of its last centroid is not used. A vector is one row.

    Parts: codes ``indices`` ``(rows, blocks per row)``; params ``centroids`` ``(1 to points,
    block)`` in ``dtype``. With ``torch.int8``: a code part ``centroids`` over 256 symbols, zero at
    128, and a float32 param ``scale`` ``(1,)``; a centroid is ``(code - 128) * scale``.

    Attributes:
        block: weights of one block.
        points: 2 to 65,536 centroids; fewer are stored where there are fewer distinct blocks.
        dtype: type of the centroids: float16, bfloat16, float32 or int8.

    Raises:
        SpecError: settings out of range, weights that are not finite or do not fit ``dtype``.

    >>> weight = torch.tensor([[1.0, 2.0, 0.0, 0.5], [0.0, 0.5, 1.0, 2.0]])
    >>> encoded = Product(2, points=2).encode(weight)
    >>> encoded.codes["indices"].values.tolist(), bool((encoded.decode() == weight).all())
    ([[1, 0], [0, 1]], True)
    """

    name: ClassVar[str] = "product"

    block: int
    points: int = 256
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        check_count("Product", "block", self.block, 1, MAX_ALPHABET)
        check_count("Product", "points", self.points, 2, 1 << 16)
        types = (torch.float16, torch.bfloat16, torch.float32, torch.int8)
        check_choice("Product", "dtype", self.dtype, types)

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and blocks per row of a tensor.

        >>> Product(9).grid((64, 32, 3, 3)), Product(8).grid((10, 20))
        ((64, 32), (10, 3))
        """
        rows, columns = rows_of(tuple(shape))
        return rows, -(-columns // self.block)

    def blocks(self, weight: Tensor) -> Tensor:
        """All blocks, ``(rows * blocks per row, block)``; short ones are filled up with 0."""
        rows, columns = rows_of(tuple(weight.shape))
        table = weight.reshape(rows, columns)
        if columns % self.block:
            table = torch.nn.functional.pad(table, (0, -columns % self.block))
        return table.reshape(-1, self.block)

    def fit(self, weight: Tensor, stats: Stats | None = None) -> dict[str, Tensor]:
        """Blocks of the weight itself, evenly spread over the order of their lengths.

        All distinct blocks are taken where they are few enough. k-means improves on this.
        """
        del stats
        weight = require_floating(weight, self.name)
        blocks = self.blocks(weight)
        blocks = blocks[:: max(1, blocks.shape[0] // SAMPLE)].to(torch.float32)
        if not bool(blocks.isfinite().all()):
            raise SpecError(
                "a weight is not finite, or beyond float32; repair it, or store it with Raw()"
            )
        if blocks.shape[0] <= 4 * self.points:
            blocks = blocks.unique(dim=0) if blocks.shape[0] else blocks.new_zeros(1, self.block)
        if blocks.shape[0] > self.points:
            order = torch.linalg.vector_norm(blocks, dim=1, dtype=torch.float64).argsort()
            steps = torch.arange(self.points, dtype=torch.float64, device=blocks.device)
            at = ((steps + 0.5) / self.points * blocks.shape[0]).to(torch.int64)
            blocks = blocks[order[at]].unique(dim=0)
        params = {"centroids": blocks}
        if self.dtype == torch.int8:
            params["scale"] = self._int8_scale(blocks)
        return params

    def assign(self, weight: Tensor, params: Mapping[str, Tensor]) -> Encoded:
        """The nearest decoded centroid of each block, by squared distance.

        Args:
            weight: any shape.
            params: ``centroids`` ``(1 to points, block)``, any floating-point type, rounded to
                ``dtype``; for int8 also ``scale``, or it follows from the centroids.

        Raises:
            SpecError: parameters missing, of the wrong shape, or not finite.
        """
        weight = require_floating(weight, self.name)
        rows, columns = rows_of(tuple(weight.shape))
        codes, stored = self._stored(params, weight.device)
        table = restore(self._wide(codes, stored), weight.dtype).to(torch.float32)
        if weight.numel() and not _is_finite(weight):
            raise SpecError(
                "a weight is not finite, or beyond float32; repair it, or store it with Raw()"
            )
        count, shape = table.shape[0], self.grid(tuple(weight.shape))
        indices = torch.empty(shape, dtype=code_dtype(count), device=weight.device)
        view, full = weight.reshape(rows, columns), columns // self.block
        whole = view[:, : full * self.block].reshape(rows * full, self.block)
        found = torch.empty(rows * full, dtype=indices.dtype, device=weight.device)
        for part, chosen in nearest_vectors(whole, table):
            found[part] = chosen.to(indices.dtype)
        indices[:, :full] = found.view(rows, full)
        rest = columns - full * self.block
        if rest:
            for part, chosen in nearest_vectors(view[:, -rest:], table[:, :rest].contiguous()):
                indices[part, full] = chosen.to(indices.dtype)
        parts = {"indices": Codes(indices, count), **codes}
        return Encoded(self, tuple(weight.shape), weight.dtype, parts, stored)

    def with_indices(self, like: Encoded, indices: Tensor) -> Encoded:
        """The same centroids with other indices, ``(rows, blocks per row)`` or flat."""
        part = like.codes["indices"]
        values = indices.reshape(part.values.shape).to(part.values.dtype)
        codes = {**like.codes, "indices": Codes(values, part.alphabet)}
        return Encoded(self, like.shape, like.dtype, codes, like.params)

    def decode(self, encoded: Encoded) -> Tensor:
        """A look-up; for int8 one float32 multiply of the table."""
        rows, columns = rows_of(encoded.shape)
        indices = encoded.codes["indices"].values
        out = new_tensor((rows, columns), encoded.dtype, indices.device)
        full = columns // self.block
        whole, rest = out[:, : full * self.block], out[:, full * self.block :]
        if full:
            self._look_up(whole.unflatten(1, (full, self.block)), indices[:, :full], encoded)
        if rest.shape[1]:
            self._look_up(rest.unsqueeze(1), indices[:, full:], encoded)
        return out.view(encoded.shape)

    def _look_up(self, out: Tensor, indices: Tensor, encoded: Encoded) -> None:
        """Fill ``(rows, blocks, values)`` with the first values of centroids, a box at a time."""
        int8 = self.dtype == torch.int8
        table = encoded.codes["centroids"].values if int8 else encoded.params["centroids"]
        rows, blocks, width = out.shape
        for a, b, c in chunks((rows, blocks, width)):
            chosen = table[:, c].index_select(0, indices[a, b].reshape(-1).to(torch.int64))
            values = self._numbers(chosen, encoded.params)
            out[a, b, c] = restore(values, encoded.dtype).view(out[a, b, c].shape)

    def params_of(self, encoded: Encoded) -> dict[str, Tensor]:
        """Centroids as numbers and, for int8, their scale."""
        held = {"centroids": self._wide(encoded.codes, encoded.params)}
        return held | {name: value for name, value in encoded.params.items() if name == "scale"}

    def check(self, encoded: Encoded) -> None:
        """Indices over the stored centroids, and a table of whole centroids."""
        int8 = self.dtype == torch.int8
        codes = {"indices", "centroids"} if int8 else {"indices"}
        expect_parts(encoded, codes, {"scale"} if int8 else {"centroids"})
        check_restored(self.name, encoded.dtype)
        table = encoded.codes["centroids"].values if int8 else encoded.params["centroids"]
        count = table.shape[0] if table.ndim else 0
        if not 1 <= count <= self.points:
            raise SpecError(f"{self!r} holds 1 to {self.points} centroids, not {count}")
        if int8:
            expect_codes(encoded, "centroids", (count, self.block), 256)
            expect_param(encoded, "scale", (1,), torch.float32)
        else:
            expect_param(encoded, "centroids", (count, self.block), self.dtype)
        expect_codes(encoded, "indices", self.grid(encoded.shape), count)

    def _stored(
        self, params: Mapping[str, Tensor], device: torch.device
    ) -> tuple[dict[str, Codes], dict[str, Tensor]]:
        """Centroids as code parts and params."""
        table = require_held(self, params, "centroids", None).to(device)
        if table.ndim != 2 or table.shape[1] != self.block or not 1 <= len(table) <= self.points:
            raise SpecError(
                f"{self!r} holds centroids of shape (1 to {self.points}, {self.block}), "
                f"not {tuple(table.shape)}"
            )
        if self.dtype != torch.int8:
            stored = table.to(self.dtype, copy=True)
            self._require_finite(stored, table)
            return {}, {"centroids": stored}
        self._require_finite(table, table)
        if "scale" in params:
            scale = require_held(self, params, "scale", 1).to(device, torch.float32, copy=True)
        else:
            scale = self._int8_scale(table)
        wide = torch.where(scale == 0, torch.inf, scale).to(torch.float64)
        codes = (table.to(torch.float64) / wide).round_().clamp_(-_INT8_ZERO, 127) + _INT8_ZERO
        return {"centroids": Codes(codes.to(torch.uint8), 256)}, {"scale": scale}

    def _require_finite(self, stored: Tensor, given: Tensor) -> None:
        if not bool(stored.isfinite().all()):
            raise SpecError(
                f"a centroid of {given.abs().max().item():.4g} does not fit {self.dtype}; "
                "use Product(dtype=torch.float32)"
            )

    def _int8_scale(self, table: Tensor) -> Tensor:
        largest = table.abs().max().to(torch.float64).reshape(1)
        return usable_scale(torch.where(largest == 0, 1.0, largest / 127), torch.float32)

    def _wide(self, codes: Mapping[str, Codes], params: Mapping[str, Tensor]) -> Tensor:
        """Centroids in float32."""
        int8 = self.dtype == torch.int8
        return self._numbers(codes["centroids"].values if int8 else params["centroids"], params)

    def _numbers(self, stored: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Stored centroids, or some of them, in float32."""
        if self.dtype != torch.int8:
            return stored.to(torch.float32)
        return (stored.to(torch.int32) - _INT8_ZERO).to(torch.float32).mul_(params["scale"])


def _is_finite(weight: Tensor) -> bool:
    """Whether all weights are finite in float32, without a copy."""
    if weight.element_size() == 1:  # float8 has no reductions
        weight = weight.to(torch.float32)
    return all(bool(end.to(torch.float32).isfinite()) for end in torch.aminmax(weight))
