"""Values as they are, or in half precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dither.core import Encoded
from dither.formats import Raw
from dither.search.knowledge import Choice, Knowledge
from dither.search.predict import can_quantize, half_step, raw_nbytes

_LARGEST_HALF = 65504.0
_LEAST_HALF = 2.0**-8


@dataclass(frozen=True)
class Stored:
    """Stores values in a type, ``None`` for their own; proposes that and float16."""

    dtype: torch.dtype | None = None

    def propose(self, known: Knowledge) -> Iterator[Choice]:
        """Every tensor can be stored as it is; wide ones in range also as float16."""
        value = known.value
        yield Choice(raw_nbytes(value), 0.0, self)
        if not can_quantize(value) or value.element_size() <= 2:
            return
        if _LEAST_HALF < float(value.abs().max()) < _LARGEST_HALF:
            error = half_step(value) ** 2 / 12
            if known.rows is not None:
                error *= float(known.rows.square().reciprocal().mean())
            loss = known.sensitivity * error * value.numel()
            yield Choice(raw_nbytes(value.half()), loss, Stored(torch.float16))

    def encode(self, known: Knowledge, choice: Choice) -> Encoded:
        """Values in the type."""
        return Raw(self.dtype).encode(known.value)
