"""Compiled twin of what :mod:`dither.formats.affine` decodes to, all in one pass.

Float32 holds codes, zeros and their differences; the product, and the sum with an offset, are
rounded one by one, since numba fuses no products unless it is told to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dither.compiled import Twin
from dither.formats.grid_rounding import Grid

F32 = np.float32
_SHORT = 32
"""Runs of so few numbers are left to plain code, which does many of them at a time."""

Floats = NDArray[np.float32]


def grid_loop(
    codes: NDArray[Any], zeros: Floats, scales: Floats, offsets: Floats, stride: int, out: Floats
) -> None:
    """``(stride * code - zero) * scale``, and plus the offset where there are offsets.

    Args:
        codes: ``(a, b, c)`` integers below 2**24.
        zeros: ``(a or 1, b or 1)``.
        scales: likewise.
        offsets: likewise, or empty.
        stride: 1 or 2.
        out: ``(a, b, c)``.
    """
    step = F32(stride)
    for outer in range(codes.shape[0]):
        first = outer if scales.shape[0] > 1 else 0
        for middle in range(codes.shape[1]):
            second = middle if scales.shape[1] > 1 else 0
            zero, scale = zeros[first, second], scales[first, second]
            given, found = codes[outer, middle], out[outer, middle]
            for place in range(len(found)):
                found[place] = (F32(given[place]) * step - zero) * scale
            if offsets.size:
                for place in range(len(found)):
                    found[place] += offsets[first, second]


GRID = Twin(grid_loop)


def loop_for(out: Tensor) -> Callable[..., None] | None:
    """The compiled loop; None where plain code is to decode to what ``out`` is a 3-D view of."""
    is_plain = out.dtype != torch.float32 or out.device.type != "cpu" or out.shape[2] < _SHORT
    return None if is_plain else GRID.chosen(out.numel() * 1e-9)


def fill(loop: Callable[..., None], out: Tensor, codes: Tensor, grid: Grid) -> None:
    """Values of a grid, whose parameters broadcast against the 3-D ``out``, but not along runs."""
    zero, scale = torch.as_tensor(grid.zero), grid.scale
    offset = scale[:0] if grid.offset is None else grid.offset
    held = [part[:, :, 0].numpy() for part in (zero.float().expand(scale.shape), scale, offset)]
    loop(codes.numpy(), *map(np.ascontiguousarray, held), grid.stride, out.numpy())
