"""Token tables on a grid along their principal axes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dither.core import Encoded
from dither.encoders.rotated import Rotated
from dither.search.knowledge import Choice, Knowledge, short
from dither.search.predict import can_quantize, predict_grids


@dataclass(frozen=True)
class RotatedGrid:
    """Rows are rounded along the axes that are known of a table: see :class:`Rotated`."""

    def propose(self, known: Knowledge) -> Iterator[Choice]:
        """Grids of every step, where the table has axes."""
        if known.axes is None or not can_quantize(known.value):
            return
        for found in predict_grids(known):
            yield Choice(found.nbytes, found.loss, self, short(found.step))

    def encode(self, known: Knowledge, choice: Choice) -> Encoded:
        """Codes along the axes, and the axes."""
        assert known.axes is not None  # noqa: S101 - proposed for those only
        return Rotated(known.steps(choice.step or 0.0), known.axes).encode(known.value)
