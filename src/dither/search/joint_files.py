"""Files in which every kernel has the bits that it was given, and which fill a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dither.core import BudgetError
from dither.search.coder import Coder
from dither.search.joint_layers import Kernels
from dither.search.joint_space import FINEST, Layout, Point, Space, Widths
from dither.search.knowledge import Choice, Knowledge, short
from dither.search.ledger import Ledger
from dither.search.predict import coded_nbytes
from dither.search.proposers import Grid
from dither.search.size import fills

LEVELS = math.sqrt(2 * math.pi * math.e)
"""Steps in a standard deviation at 0 bits, so that widths are the entropy of normal weights."""

COARSEST = -4.0
"""The same the other way: below 0, all but the largest weights are 0."""

_PRUNED = -math.inf
_TRIES = 10
_AIM = 0.9975
_GAIN = 1.6
"""Bytes by which a prediction must move for each that is missed, until two tries tell."""

_LEAP = 1.0
_MARGIN = 0.05

_SAMPLE = 1 << 15
_HALVINGS = 14


class Files:
    """Makes a file for each point of a joint search.

    Tensors that nobody decides of are as the allocator left them, but for the vectors that go with
    kernels that are pruned.

    Args:
        kernels: of all layers.
        known: what is known of all tensors.
        ledger: as the allocator filled it, within the budget.
        budget: bytes.
        space: what may be chosen.
    """

    def __init__(
        self,
        kernels: Sequence[Kernels],
        known: Mapping[str, Knowledge],
        ledger: Ledger,
        budget: int,
        space: Space,
    ) -> None:
        self.budget = budget
        self._ledger, self._start, self._coder = ledger, ledger.rows(), Coder()
        names = {name for k in kernels for name in (k.name, *k.followers)}
        self._known = {name: known[name] for name in names}
        values = {k.name: known[k.name].value.detach().float().cpu() for k in kernels}
        self._units = {name: LEVELS * float(value.std()) for name, value in values.items()}
        self._samples = {n: _sample(value) / self._units[n] for n, value in values.items()}
        start = [self._allocated(k, space) for k in kernels]
        self.layout = Layout(tuple(kernels), space, tuple(n for part in start for n in part))
        self._ratios = {k.name: self._ratio(k.name) for k in kernels}

    def allocated(self) -> Ledger:
        """The ledger as the allocator left it."""
        self._ledger.restore(self._start)
        return self._ledger

    def fill(self, widths: Widths) -> tuple[Ledger, Widths]:
        """A ledger whose file has at most the budget, and the bits that kernels have come to.

        It fills the budget as other files do, unless no step can be finer.

        Raises:
            BudgetError: no steps were found that take so little.
        """
        ledger = self.allocated()
        self._prune_followers(widths)
        searched = [kernels.name for kernels in self.layout.kernels]
        rest = ledger.nbytes - sum(ledger.measured(name) for name in searched)
        goal, best, tried = _AIM * self.budget, None, dict[float, int]()
        shift = self._predicted_shift(widths, goal - rest)
        for _ in range(_TRIES):
            moved = _moved(widths, shift)
            for name in searched:
                self._put(name, moved[name])
            size = tried[shift] = ledger.nbytes
            if size <= self.budget and (best is None or size > best[0]):
                best = size, ledger.rows(), moved
            is_finest = all(w in {_PRUNED, FINEST} for own in moved.values() for w in own)
            if best and (is_finest or fills(best[0], self.budget)):
                break
            if len(tried) == 1:
                asked = self._predicted(moved) + _GAIN * (goal - size)
                shift = self._predicted_shift(widths, asked)
            if shift in tried:
                shift = _next_shift(tried, goal)
        if best is None:
            raise BudgetError(
                f"no steps were found with which these widths take at most {self.budget} bytes, of "
                f"which {rest:.0f} are not searched; ask for more, or prune more"
            )
        ledger.restore(best[1])
        said = {name: tuple(_said(w) for w in own) for name, own in best[2].items()}
        return ledger, said

    def _put(self, name: str, widths: Sequence[float]) -> None:
        """Code a weight with a step for each kernel."""
        known, kept = self._known[name], torch.tensor(widths) > _PRUNED
        least = min(width for width in widths if width > _PRUNED)
        step = short(self._units[name] * 2.0**-least)
        relative = torch.tensor(
            [2.0 ** (least - width) if width > _PRUNED else 1.0 for width in widths]
        )
        rows = None if bool((relative == 1).all()) else relative
        if known.rows is not None:
            rows = known.rows * relative
        value = known.value * _along(kept, known.value)
        known = replace(known, value=value, rows=rows, axes=None)
        choice = Choice(0.0, 0.0, Grid(), step, fed=known.gram is not None)
        self._ledger.put(name, choice, self._coder.code(known, choice))

    def _prune_followers(self, widths: Widths) -> None:
        """Vectors that go with kernels lose what belongs to those that are pruned."""
        for kernels in self.layout.kernels:
            pruned = torch.tensor(widths[kernels.name]) == 0
            for name in kernels.followers if bool(pruned.any()) else ():
                choice, known = self._start[name][0], self._known[name]
                known = replace(known, value=known.value.masked_fill(pruned, 0.0))
                self._ledger.put(name, choice, self._coder.code(known, choice))

    def _predicted_shift(self, widths: Widths, nbytes: float) -> float:
        """By how many bits widths are moved for what is predicted of them to be some bytes."""
        low, high = COARSEST - FINEST, FINEST
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if self._predicted(_moved(widths, middle)) > nbytes:
                high = middle
            else:
                low = middle
        return low

    def _predicted(self, widths: Widths) -> float:
        """Bytes that weights take, about."""
        total = 0.0
        for kernels in self.layout.kernels:
            total += self._ratios[kernels.name] * self._entropy(kernels.name, widths[kernels.name])
        return total

    def _entropy(self, name: str, widths: Sequence[float]) -> float:
        """Bytes of nearest codes, by their entropy."""
        scales = 2.0 ** np.asarray(widths)
        sample = self._samples[name]
        codes = np.rint(sample * scales[:, None]).astype(np.int64)
        counts = np.bincount((codes - codes.min()).ravel()).astype(np.float64)
        return coded_nbytes(counts * (self._known[name].value.numel() / sample.size))

    def _ratio(self, name: str) -> float:
        """Bytes of a weight over those predicted, as the allocator stored it."""
        choice, coded = self._start[name]
        if choice.step is None:
            return 1.0
        width = min(max(math.log2(self._units[name] / choice.step), COARSEST), FINEST)
        predicted = self._entropy(name, [width] * len(self._samples[name]))
        return min(max(coded.nbytes / max(predicted, 1.0), 0.5), 2.0)

    def _allocated(self, kernels: Kernels, space: Space) -> Point:
        """A layer's part of the point nearest to what the allocator chose."""
        step = self._start[kernels.name][0].step
        width = space.highest if step is None else math.log2(self._units[kernels.name] / step)
        return (0.0, *[space.number(width)] * space.groups)


def _next_shift(tried: Mapping[float, int], goal: float) -> float:
    """Where a line through what was tried next to the goal, or nearest it, meets the goal."""
    under = max((s for s, size in tried.items() if size <= goal), default=None)
    over = min((s for s, size in tried.items() if size > goal), default=None)
    if under is None or over is None or under > over:
        ends = sorted(tried, key=lambda s: abs(tried[s] - goal))[:2]
    else:
        ends = [under, over]
    (one, other), (start, end) = ends, (tried[s] for s in ends)
    if start == end:
        return one + math.copysign(_LEAP, goal - start)
    found = one + (other - one) * (goal - start) / (end - start)
    if under is not None and over is not None and under < over:
        margin = _MARGIN * (over - under)
        return min(max(found, under + margin), over - margin)
    return min(max(found, one - _LEAP), one + _LEAP)


def _said(width: float) -> float:
    """As a kernel's bits are told: those of few are few, and 0 is pruned."""
    return 0.0 if width == _PRUNED else max(width, 1 / 16)


def _moved(widths: Widths, shift: float) -> Widths:
    return {
        name: tuple(min(max(w + shift, COARSEST), FINEST) if w else _PRUNED for w in own)
        for name, own in widths.items()
    }


def _along(kept: Tensor, value: Tensor) -> Tensor:
    """A mask of kernels as it broadcasts to their weight, in its type."""
    return kept.reshape(-1, *[1] * (value.ndim - 1)).to(value.device, value.dtype)


def _sample(value: Tensor) -> NDArray[np.float32]:
    """Some weights of every kernel."""
    flat = value.flatten(1)
    stride = max(1, flat.numel() // _SAMPLE)
    found: NDArray[np.float32] = flat[:, :: min(stride, flat.shape[1])].numpy()
    return found
