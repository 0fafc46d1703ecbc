"""Products of two integer matrices, times a scale: low ranks and rotated bases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
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
    expect_codes,
    expect_param,
    expect_parts,
)
from dither.formats.affine import SCALE_DTYPES
from dither.formats.factors_twin import Product
from dither.formats.grid_rounding import require_floating, require_held, restore, usable_scale
from dither.formats.grouping import rows_of
from dither.formats.memory import new_tensor
from dither.formats.settings import check_choice, check_restored

MOST_RANK = 4096
"""The highest rank: decoding takes time in proportion."""

EXACT = 1 << 53
"""Integers below this are exact in float64, and so are their sums in any order."""

_CHUNK = 1 << 20
"""Values handled at once."""

_BOX = 1 << 18
"""Values of either factor, and of their product, that decoding handles at once."""

_MOST_CODE = 1 << 22
_SETTLES = 16
_SURE = 0.49


@dataclass(frozen=True)
class Factors(Format):
    """``scale * (left @ right)`` with integer matrices, so that every machine finds the same sums.

    The tensor is viewed as ``(shape[0], rest)``; a vector is one row. With few rows in ``right`` it
    is a matrix of low rank; with as many as columns, a change of basis: a table is coded in
    coordinates in which its columns are independent (:class:`dither.encoders.rotated.Rotated`).

    Parts: codes ``left`` ``(rows, rank)``, ``right`` ``(rank, columns)`` and ``zero`` ``(2,)``,
    which is minus the lowest code of either; param ``scale`` ``(scales,)``. Products are summed
    exactly (a tensor whose sums could reach 2**53 is refused), converted to float32, and multiplied
    once.

    Attributes:
        axis: 0 for one scale for each row; None for one scale.
        scale_dtype: type of scales: float32, float16 or bfloat16.

    Raises:
        SpecError: settings out of range, weights that are not finite, a step too small.

    >>> right = torch.tensor([[3, 4], [4, -3]])
    >>> params = {"right": right, "scale": torch.tensor([0.02])}
    >>> encoded = Factors().assign(torch.tensor([[0.61, 0.79], [0.1, 0.1]]), params)
    >>> (encoded.codes["left"].values - encoded.codes["zero"].values[0]).tolist()
    [[10, 0], [1, 0]]
    >>> encoded.decode()
    tensor([[0.6000, 0.8000],
            [0.0600, 0.0800]])
    """

    name: ClassVar[str] = "factors"

    axis: int | None = None
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        check_choice("Factors", "scale_dtype", self.scale_dtype, SCALE_DTYPES)
        check_choice("Factors", "axis", self.axis, (None, 0))

    def fit(self, weight: Tensor, stats: Stats | None = None) -> dict[str, Tensor]:
        """The right singular vectors, and steps of an eighth of the root mean square.

        A step is no finer than what the tensor's type resolves in a row of its length.

        Raises:
            SpecError: a weight is not finite, or there are more than 4,096 rows and columns.
        """
        del stats
        weight = require_floating(weight, self.name)
        matrix = _matrix(weight)
        rows, columns = matrix.shape
        if min(rows, columns) > MOST_RANK:
            raise SpecError(
                f"a matrix of {rows} x {columns} has a higher rank than {MOST_RANK}; use Affine()"
            )
        largest = float(matrix.abs().max()) if matrix.numel() else 0.0
        unit = largest or 1.0  # squares of the values alone may be beyond float64, or 0
        _, _, vectors = torch.linalg.svd(matrix / unit, full_matrices=False)
        fine = 32 * math.sqrt(max(columns, 1))
        norms = (matrix / unit).square().sum(1).sqrt()
        if self.axis is None:
            longest = norms.max().reshape(1) if rows else norms.new_zeros(1)
            usual = norms.square().mean().sqrt().reshape(1) if rows else longest
        else:
            longest = usual = norms
        info = torch.finfo(weight.dtype)
        eps = max(info.eps, torch.finfo(torch.float32).eps)
        step = torch.maximum(usual / math.sqrt(max(columns, 1)) / 8, 3 * eps * longest) * unit
        least = 4 * float(info.tiny) * float(info.eps) * math.sqrt(max(columns, 1))
        step = torch.where(step > 0, step.clamp(min=least), fine)
        scale = usable_scale(step / fine, self.scale_dtype)
        return {"right": (vectors * fine).round().to(torch.int32), "scale": scale}

    def assign(self, weight: Tensor, params: Mapping[str, Tensor]) -> Encoded:
        """Least squares for the left factor, rounded: nearest where ``right`` has orthogonal rows.

        Args:
            weight: floating point, finite.
            params: ``right`` ``(rank, columns)``, integers; ``scale``, finite.

        Raises:
            SpecError: parameters that are missing, of the wrong shape or not finite; steps so small
                that there are too many codes, or that the tensor's type does not resolve them.
        """
        weight = require_floating(weight, self.name)
        matrix = _matrix(weight)
        rows, columns = matrix.shape
        right = self._right(params, rows, columns).to(matrix.device)
        count = rows if self.axis == 0 else 1
        scale = require_held(self, params, "scale", count).to(matrix.device)
        scale = scale.to(self.scale_dtype, copy=True)
        if not bool(scale.isfinite().all()):
            raise SpecError(f"{self!r}: 'scale' is not finite in {self.scale_dtype}")
        wide = right.double()
        inverse, sure = _inverse(wide)
        left = torch.empty(rows, len(right), dtype=torch.int32, device=matrix.device)
        steps = scale.float().expand(rows)[:, None]
        size = max(1, _CHUNK // max(columns, 1))
        for start in range(0, rows, size):
            part = slice(start, start + size)
            lattice = _Lattice(wide, inverse, sure, steps[part], weight.dtype)
            left[part] = lattice.nearest(matrix[part]).to(torch.int32)
        return self.encoded(left, right, tuple(weight.shape), weight.dtype, scale)

    def encoded(
        self, left: Tensor, right: Tensor, shape: tuple[int, ...], dtype: torch.dtype, scale: Tensor
    ) -> Encoded:
        """A tensor from its factors.

        Args:
            left: ``(rows, rank)`` int32.
            right: ``(rank, columns)`` int32.
            shape: of the tensor.
            dtype: type to restore it to.
            scale: ``(scales,)`` in ``scale_dtype``.

        Raises:
            SpecError: shapes do not fit, or sums might not be exact.
        """
        (lefts, low), (rights, other) = _from_zero(left), _from_zero(right)
        zero = Codes(torch.tensor([low, other], device=left.device), MAX_ALPHABET)
        parts = {"left": lefts, "right": rights, "zero": zero}
        return Encoded(self, shape, dtype, parts, {"scale": scale})

    def comes_back(self, encoded: Encoded) -> bool:
        """Whether the decoded tensor is assigned codes that decode alike.

        What :meth:`assign` returns always does; factors found otherwise may lie so close to others
        that rounding to float32, or to the tensor's type, confuses them.
        """
        held = self.params_of(encoded)
        right = held["right"].double()
        zero = encoded.codes["zero"].values[0].double()
        inverse, sure = _inverse(right)
        rows = rows_of(encoded.shape)[0]
        steps = held["scale"].float().expand(rows)[:, None]
        codes = encoded.codes["left"].values.double() - zero
        if _Lattice(right, inverse, sure, steps, encoded.dtype).is_sure(codes):
            return True
        decoded = encoded.decode()
        try:
            return torch.equal(self.assign(decoded, held).decode(), decoded)
        except SpecError:
            return False

    def decode(self, encoded: Encoded) -> Tensor:
        """Exact sums of products, one conversion to float32, one float32 multiplication."""
        rows, columns = rows_of(encoded.shape)
        left, right = encoded.codes["left"].values, encoded.codes["right"].values
        # Float32 holds sums below 2**24, in any order, in half the time.
        is_small = left.device.type == "cpu" and self._most_sum(encoded) < 1 << 24
        kind = torch.float32 if is_small else torch.float64
        zero = encoded.codes["zero"].values.to(kind)
        scale = encoded.params["scale"]
        out = new_tensor((rows, columns), encoded.dtype, left.device)
        width = max(1, min(columns, _BOX // max(len(right), 1)))
        height = max(1, _BOX // max(width, len(right)))
        for begin in range(0, columns, width):
            along = slice(begin, begin + width)
            wide = right[:, along].to(kind) - zero[1]
            loop = Product.of(wide.numpy(), rows) if is_small else None
            for start in range(0, rows, height):
                part = slice(start, start + height)
                steps = (scale if self.axis is None else scale[part]).float()
                box = out[part, along]
                if loop is None or not loop.fill(box, left[part], int(zero[0]), steps):
                    sums = _sums(left[part].to(kind) - zero[0], wide)
                    box.copy_(restore(sums.mul_(steps.reshape(-1, 1)), encoded.dtype))
        return out.reshape(encoded.shape)

    def multiplications(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """One for each value and each rank."""
        left, right = shapes.get("left", ()), shapes.get("right", ())
        return prod(left) * right[-1] if right else 0

    def params_of(self, encoded: Encoded) -> dict[str, Tensor]:
        """The scale, and the right factor as signed integers."""
        right = encoded.codes["right"].values.to(torch.int32)
        return {**encoded.params, "right": right - encoded.codes["zero"].values[1].to(torch.int32)}

    def check(self, encoded: Encoded) -> None:
        """Factors that fit the tensor and each other, and whose sums are exact."""
        expect_parts(encoded, {"left", "right", "zero"}, {"scale"})
        check_restored(self.name, encoded.dtype)
        rows, columns = rows_of(encoded.shape)
        left, right = encoded.codes["left"], encoded.codes["right"]
        rank = right.values.shape[0] if right.values.ndim else 0
        if rank > min(rows, columns, MOST_RANK):
            raise SpecError(
                f"factors of a tensor of {rows} x {columns} have a rank of at most "
                f"{min(rows, columns, MOST_RANK)}, not {rank}"
            )
        expect_codes(encoded, "left", (rows, rank), None)
        expect_codes(encoded, "right", (rank, columns), None)
        expect_codes(encoded, "zero", (2,), MAX_ALPHABET)
        expect_param(encoded, "scale", (rows if self.axis == 0 else 1,), self.scale_dtype)
        if self._most_sum(encoded) >= EXACT:
            raise SpecError(
                f"sums of {rank} products of integers of {left.alphabet} and {right.alphabet} "
                "values may reach 2**53, and would not be exact; give a larger step or a coarser "
                "right factor"
            )

    def _most_sum(self, encoded: Encoded) -> int:
        """A bound of all sums, by the alphabets alone."""
        left, right = encoded.codes["left"], encoded.codes["right"]
        zeros = encoded.codes["zero"].values.tolist()
        most = [
            max(zero, part.alphabet - 1 - zero)
            for zero, part in zip(zeros, (left, right), strict=True)
        ]
        return int(most[0] * most[1] * len(right.values))

    def _right(self, params: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """The right factor, checked, int32."""
        right = require_held(self, params, "right", None)
        most = min(rows, columns, MOST_RANK)
        if right.ndim != 2 or right.shape[1] != columns or len(right) > most:
            raise SpecError(
                f"{self!r} has a 'right' of shape (0 to {most}, {columns}) for this tensor, not "
                f"{tuple(right.shape)}"
            )
        double = right.double()
        whole = bool((double.round() == double).all())
        if not whole or (double.numel() and float(double.abs().max()) > _MOST_CODE):
            raise SpecError(f"{self!r}: 'right' holds integers up to {_MOST_CODE} either way")
        return double.to(torch.int32)


@dataclass(frozen=True, eq=False)
class _Lattice:
    """The values of some rows: sums of the rows of ``right``.

    Attributes:
        right: ``(rank, columns)`` float64 integers.
        inverse: ``(columns, rank)``, its pseudo-inverse.
        sure: codes so short, in squares summed, come back from values that float32 rounded.
        steps: ``(rows, 1)`` float32.
        dtype: of the tensor.
    """

    right: Tensor
    inverse: Tensor
    sure: float
    steps: Tensor
    dtype: torch.dtype

    def nearest(self, matrix: Tensor) -> Tensor:
        """Float64 integers ``(rows, rank)`` that decode to rows which are assigned the same.

        Rounding to a narrow type may move a value nearer to other codes. Then these are tried, and
        so on, so that what is returned always comes back.
        """
        codes, _ = self._round(matrix)
        if not codes.numel():
            return codes
        if not bool(codes.isfinite().all()) or float(codes.abs().max()) > _MOST_CODE:
            raise SpecError(
                f"a step of {self.steps.abs().min().item():.4g} needs too many codes for this "
                "tensor; give a larger step, or use Raw()"
            )
        if self.is_sure(codes):
            return codes
        open_rows = torch.arange(len(codes), device=codes.device)
        for _ in range(_SETTLES):
            decoded = self.at(open_rows)._decoded(codes[open_rows])  # noqa: SLF001
            again, distance = self.at(open_rows)._round(decoded.double())  # noqa: SLF001
            settled = (self.at(open_rows)._decoded(again) == decoded).all(1)  # noqa: SLF001
            settled &= (distance <= _SURE).all(1)
            if bool(settled.all()):
                return codes
            if not bool(again.isfinite().all()) or float(again.abs().max()) > _MOST_CODE:
                break
            open_rows = open_rows[~settled]
            codes[open_rows] = again[~settled]
        raise SpecError(
            f"a step of {self.steps.abs().min().item():.4g} is finer than {self.dtype} resolves in "
            "these rows; give a larger step, or use Affine()"
        )

    def at(self, rows: Tensor) -> _Lattice:
        """The same of some rows."""
        return _Lattice(self.right, self.inverse, self.sure, self.steps[rows], self.dtype)

    def _round(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of float64 rows, and how far from them the real ones are."""
        steps = torch.where(self.steps == 0, torch.inf, self.steps).double()
        place = (matrix / steps) @ self.inverse
        codes = place.round()
        return codes, place.sub_(codes).abs_()

    def _decoded(self, codes: Tensor) -> Tensor:
        return restore(_sums(codes, self.right).mul_(self.steps), self.dtype)

    def is_sure(self, codes: Tensor) -> bool:
        """Whether errors of the type are so small beside a step that all codes come back."""
        if self.dtype not in (torch.float32, torch.float64) or not codes.numel():
            return not codes.numel()
        lengths = codes.square().sum(1)
        sizes = self.steps[:, 0].double().abs()
        far = float((sizes * lengths.sqrt()).max()) * float(self.right.square().sum().sqrt())
        normal = bool((sizes > 2.0**-120).all()) and far < 2.0**120
        return normal and float(lengths.max()) < self.sure


def _inverse(right: Tensor) -> tuple[Tensor, float]:
    """The pseudo-inverse, and up to which squared length codes survive float32 rounding."""
    inverse = torch.linalg.pinv(right) if right.numel() else right.T
    # A decoded row errs by 2**-23 of its length at most; taken back that is less than
    # 2**-23 |codes| |right| |inverse|, and a quarter of a step is far from a tie.
    growth = float(right.square().sum().sqrt() * inverse.square().sum().sqrt())
    return inverse.contiguous(), (2.0**20 / growth) ** 2 if growth > 0 else math.inf


def _sums(left: Tensor, right: Tensor) -> Tensor:
    """Exact sums in float32. Adding 0 makes 0 of the -0 that some orders of summation leave."""
    if left.dtype == torch.float32:
        return _product(left, right)
    if left.device.type == "cpu" and left.numel() and right.numel():
        largest = float(left.abs().sum(1).max()) * float(right.abs().max())
        if largest < 1 << 24:
            return _product(left.float(), right.float())
    return (left @ right).add_(0.0).float()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The same in float32, which holds them: NumPy's, since torch's may be set to round factors."""
    return torch.from_numpy(left.numpy() @ right.numpy()).add_(0.0)


def _matrix(weight: Tensor) -> Tensor:
    """The tensor as rows, float64.

    Raises:
        SpecError: a weight is not finite in float32.
    """
    if not bool(weight.float().isfinite().all()):
        raise SpecError(
            "a weight is not finite, or is beyond float32; repair it, or store the tensor with "
            "Raw()"
        )
    return weight.reshape(rows_of(tuple(weight.shape))).double()


def _from_zero(values: Tensor) -> tuple[Codes, int]:
    """Codes from 0, and minus the lowest value; the range always holds 0."""
    low = min(0, int(values.min())) if values.numel() else 0
    high = max(0, int(values.max())) if values.numel() else 0
    return Codes(values - low, high - low + 1), -low
