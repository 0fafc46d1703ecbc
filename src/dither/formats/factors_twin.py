"""Compiled twin of the product that :mod:`dither.formats.factors` decodes to, a row at a time.

Along most axes most codes are 0, and rows of the right factor that they belong to are not read.
Sums are of 16 bits, which hold those of usual rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dither.compiled import Twin
from dither.formats.grid_rounding import restore

F32, I16 = np.float32, np.int16
MOST = (1 << 15) - 1
TOGETHER = 4
"""Rows of the right factor that are added at a time: sums are read and written once for all."""

Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]


def product_loop(
    left: NDArray[Any], zero: int, right: Shorts, scales: Floats, out: Floats, most: int
) -> int:
    """``(left - zero) @ right`` into ``out``, each row times its scale, or all times the only one.

    Args:
        left: ``(rows, rank)`` integers.
        zero: minus the lowest.
        right: ``(rank, columns)``.
        scales: ``(rows,)`` or ``(1,)``.
        out: ``(rows, columns)``.
        most: the largest magnitude in ``right``.

    Returns:
        Rows that were done: all before the first whose sums might need more than 16 bits.
    """
    rank, columns = right.shape
    places, codes = np.zeros(rank + TOGETHER, np.int64), np.zeros(rank + TOGETHER, I16)
    sums = np.zeros(columns, I16)
    for row in range(len(left)):
        count, size = 0, np.int64(0)
        for place in range(rank):
            code = np.int64(left[row, place]) - zero
            places[count], codes[count] = place, code
            count += code != 0
            size += abs(code)
        if size * most > MOST:
            return row
        codes[count : count + TOGETHER], places[count : count + TOGETHER] = 0, 0
        sums[:] = 0
        for at in range(0, count, TOGETHER):
            a, b, c, d = codes[at], codes[at + 1], codes[at + 2], codes[at + 3]
            one, two = right[places[at]], right[places[at + 1]]
            three, four = right[places[at + 2]], right[places[at + 3]]
            for column in range(columns):
                low = I16(I16(a * one[column]) + I16(b * two[column]))
                high = I16(I16(c * three[column]) + I16(d * four[column]))
                sums[column] = I16(sums[column] + I16(low + high))
        line, scale = out[row], scales[row if len(scales) > 1 else 0]
        for column in range(columns):
            line[column] = F32(sums[column]) * scale
    return len(left)


PRODUCT = Twin(product_loop)


@dataclass(frozen=True)
class Product:
    """A right factor, ready for rows of left ones; made by :meth:`of`."""

    run: Callable[[NDArray[Any], int, Shorts, Floats, Floats, int], int]
    right: Shorts
    most: int

    @classmethod
    def of(cls, right: NDArray[Any], rows: int) -> Product | None:
        """None where plain code is to multiply.

        Args:
            right: ``(rank, columns)`` integers of any type.
            rows: how many of them are to come.
        """
        run = PRODUCT.chosen(rows * right.size * 2e-11)
        if run is None or not right.size:
            return None
        most = int(np.abs(right).max())
        return cls(run, right.astype(I16), most) if most <= MOST else None

    def fill(self, out: Tensor, left: Tensor, zero: int, scales: Tensor) -> bool:
        """``(left - zero) @ right * scales``; False where plain code is to do it.

        Args:
            out: ``(rows, columns)``.
            left: ``(rows, rank)`` codes.
            zero: of the left factor.
            scales: ``(rows,)`` or ``(1,)`` float32.
        """
        whole = out if out.dtype == torch.float32 else torch.empty(out.shape)
        numbers = left.numpy(), zero, self.right, scales.numpy(), whole.numpy(), self.most
        is_done = self.run(*numbers) == len(left)
        if is_done and whole is not out:
            out.copy_(restore(whole, out.dtype))
        return is_done
