"""Entropy-coded grids: with error feedback where inputs are known, else rounded to nearest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from dither.core import STACKED, Codes, Encoded, Stats
from dither.encoders.gptq import GPTQ
from dither.search.knowledge import Choice, Knowledge, short_all
from dither.search.predict import GRID_NBYTES, can_quantize, coded_nbytes, predict_grids
from dither.search.sensitivity import counted

_MOST_EXACT = 1 << 15


@dataclass(frozen=True)
class Grid:
    """Uniform grids of every step, a step for each row where rows differ.

    Attributes:
        refit: whether the steps of matrices are fitted to their codes, as :class:`~dither.GPTQ`
            does it, where errors are fed on.
    """

    refit: bool = True

    def propose(self, known: Knowledge) -> Iterator[Choice]:
        """Steps from dropping the tensor to the accuracy of float16, and one that loses nothing."""
        if known.axes is not None or not can_quantize(known.value):
            return
        grids = list(predict_grids(known))
        for found, step in zip(grids, short_all([found.step for found in grids]), strict=True):
            yield Choice(found.nbytes, found.loss, self, step, found.is_useful)
        if known.rows is None:
            yield from self._exact(known.value)

    def encode(self, known: Knowledge, choice: Choice) -> Encoded:
        """Codes with error feedback, if the choice says so and inputs are known."""
        outputs = STACKED if known.is_stack else 0
        stats = Stats(gram=known.gram, outputs=outputs) if choice.fed else None
        refit = self.refit and choice.fed and refits(known)
        encoder = GPTQ(known.steps(choice.step or 0.0), refit=refit)
        if known.whole is not None and counted(known.whole).numel() and known.value.ndim < 2:
            return _kept_half(known, choice.step or 0.0, known.whole)
        if known.least is not None:
            return _kept_positive(encoder.encode(known.value), known.value > known.least)
        return encoder.encode(known.value, stats)

    def _exact(self, value: Tensor) -> Iterator[Choice]:
        """The grid that loses nothing, where the values are few multiples of the smallest one.

        So are masks, signs, and weights that somebody has rounded already.
        """
        flat = value.detach().reshape(-1).float()
        if flat.numel() < 2:
            return
        for part in (flat[: 1 << 12], flat):
            magnitudes = part.abs()
            step = float(magnitudes[magnitudes > 0].min()) if bool(magnitudes.any()) else 1.0
            codes = part / step
            whole = bool((codes.round() * step == part).all())
            if float(codes.abs().max()) > _MOST_EXACT or not whole:
                return
        counts = np.bincount((codes - codes.min()).long().cpu().numpy())
        yield Choice(GRID_NBYTES + coded_nbytes(counts.astype(np.float64)), 0.0, self, step)


def _kept_positive(encoded: Encoded, is_kept: Tensor) -> Encoded:
    """The same with one step in place of 0 where a value must not vanish."""
    levels, zero = encoded.codes["levels"], int(encoded.codes["zero"].values)
    codes = levels.values.long()
    lost = is_kept & (codes == zero)
    if not bool(lost.any()) or bool((codes == zero).all()):  # or it was dropped altogether
        return encoded
    raised = Codes(codes.masked_fill(lost, zero + 1), max(levels.alphabet, zero + 2))
    return replace(encoded, codes={**encoded.codes, "levels": raised})


def _kept_half(known: Knowledge, step: float, whole: Tensor) -> Encoded:
    """A difference in nearest codes at a step, or at the first of its halves that is fine enough.

    Of what must not vanish, such as the variances of a batch norm, half is left at least.
    """
    positive = whole >= counted(whole).min()
    while True:
        encoded = GPTQ(known.steps(step)).encode(known.value)
        lost = known.value.double() - encoded.decode().double()
        if bool((lost <= whole.double() / 2)[positive].all()):
            return encoded
        step /= 2


def refits(known: Knowledge) -> bool:
    """Whether inputs of a matrix or stack are known: its steps may be fitted to its codes."""
    return known.gram is not None and (known.value.ndim == 2 or known.is_stack)
