"""Rate-distortion rounding: codes for the least error plus lambda times coded bits.

On a uniform grid whose codes are entropy coded with one table, the best code for a value depends
on the value alone, so that the whole choice is a list of thresholds (an entropy-constrained scalar
quantizer: Chou, Lookabaugh, Gray 1989). They are found on a sorted sample; the tensor itself is
read once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dither.coding import code_lengths
from dither.core import Encoded, Stats, code_dtype, on_cpu
from dither.encoders.coded_grid import BySettings, code_range, grid_steps, in_steps, on_grid

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]

HIGH_RATE_STRENGTH = 0.1155
"""Lambda in squared steps for each bit, where it matches the slope of a fine grid.

The error is step**2 / 12 and falls to a quarter with each bit, a slope of ``ln(2) / 6``.
"""

SAMPLE = 1 << 17
CHUNK = 1 << 22
_PASSES = 3
_MOST_SYMBOLS = 1 << 10


@dataclass(frozen=True)
class Thresholds:
    """A scalar quantizer of the line in units of the step: ``codes[i]`` between two edges."""

    codes: Ints
    edges: Floats


def sorted_sample(values: Tensor, size: int = SAMPLE) -> Floats:
    """At most ``size`` values, evenly spaced in memory, with both extremes, sorted."""
    flat = values.detach().reshape(-1)
    if flat.numel() > size:
        # An odd stride visits all residues of the usual power-of-two row lengths.
        stride = -(-flat.numel() // size) | 1
        low, high = torch.aminmax(flat)
        flat = torch.cat([flat[::stride], low[None], high[None]])
    return np.sort(flat.to(torch.float64).cpu().numpy())


def find_thresholds(sample: Floats, strength: float) -> Thresholds:
    """The quantizer for values ``sample`` (sorted, in steps) at lambda ``strength``.

    Args:
        sample: sorted values divided by the step.
        strength: lambda in squared steps for each coded bit; 0 is rounding to nearest.

    The table and the thresholds depend on each other; a few passes from rounding suffice.
    """
    low, high = (int(np.rint(sample[i])) for i in (0, -1))
    codes: Ints = np.arange(low, high + 1, dtype=np.int64)
    edges: Floats = codes[:-1] + 0.5
    if strength > 0 and len(codes) <= _MOST_SYMBOLS:
        for _ in range(_PASSES):
            lengths = code_lengths(count(sample, edges))
            codes, edges = _envelope(codes, codes * codes + strength * lengths)
    return Thresholds(codes, edges)


def count(sample: Floats, edges: Floats) -> Ints:
    """How many sorted values lie between each two edges; one more count than edges."""
    return np.diff(np.searchsorted(sample, edges), prepend=0, append=len(sample))


def _envelope(codes: Ints, heights: Floats) -> tuple[Ints, Floats]:
    """Codes that are best somewhere, and where one takes over from the next.

    The cost of code ``q`` at ``x`` is ``(x - q)**2 + r(q)``: lines ``q**2 + r(q) - 2 q x`` but
    for ``x**2``, so the codes in use are the lower convex hull of ``(q, q**2 + r(q))``.
    """
    slopes: Floats = np.diff(heights) / np.diff(codes)
    if (np.diff(slopes) > 0).all():
        return codes, slopes / 2
    hull: list[int] = []
    for i in range(len(codes)):
        while len(hull) > 1 and _turns_down(codes, heights, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    kept, height = codes[hull], heights[hull]
    edges: Floats = np.diff(height) / np.diff(kept) / 2
    return kept, edges


def _turns_down(codes: Ints, heights: Floats, a: int, b: int, c: int) -> bool:
    left = (heights[b] - heights[a]) * (codes[c] - codes[b])
    right = (heights[c] - heights[b]) * (codes[b] - codes[a])
    return bool(left >= right)


@dataclass(frozen=True, eq=False)
class RateDistortion(BySettings):
    """Rate-distortion rounding on a uniform, entropy-coded grid.

    Attributes:
        step: the step, or one for each index of the first axis (1-D).
        strength: lambda, in squared steps for each coded bit; 0 rounds to nearest.

    >>> weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    >>> plain, rdo = (RateDistortion(1.0, k).encode(weight) for k in (0.0, 0.12))
    >>> bool((rdo.decode() == 0).sum() > (plain.decode() == 0).sum())
    True
    """

    step: float | Tensor
    strength: float = HIGH_RATE_STRENGTH

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        """Codes in ``Affine(bits=None)``, per tensor or, for a step per row, ``axis=0``.

        Args:
            weight: floating point, finite.
            stats: not used; the step already says what an error costs.

        Raises:
            SpecError: a step is not positive, or so small that the codes leave the alphabet; a
                weight is not finite.
        """
        weight, _ = on_cpu(weight)
        steps = grid_steps(self.step)
        scaled = in_steps(weight, steps)
        if not weight.numel():
            return on_grid(weight, steps, scaled, 0, 0)
        sample = sorted_sample(scaled)
        code_range(weight, *(float(np.rint(sample[i])) for i in (0, -1)))
        found = find_thresholds(sample, self.strength)
        low, high = code_range(weight, float(found.codes[0]), float(found.codes[-1]))
        levels = torch.empty(scaled.shape, dtype=code_dtype(high - low + 1))
        edges = torch.from_numpy(found.edges).float()
        offsets = torch.from_numpy(found.codes - low).to(levels.dtype)
        source, target = scaled.reshape(-1), levels.reshape(-1)
        for start in range(0, source.numel(), CHUNK):
            index = torch.bucketize(source[start : start + CHUNK], edges, out_int32=True)
            target[start : start + CHUNK] = offsets[index]
        return on_grid(weight, steps, levels, low, high)
