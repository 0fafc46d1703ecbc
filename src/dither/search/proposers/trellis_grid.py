"""Grids whose codes are searched for on a trellis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dither.core import Encoded, Stats
from dither.encoders.viterbi import Viterbi
from dither.search.knowledge import Choice, Knowledge
from dither.search.proposers.grid import Grid

_WORTH_A_TRELLIS = 4096


@dataclass(frozen=True)
class TrellisGrid:
    """Trellises in place of grids for large tensors with error feedback; each has half the step.

    Attributes:
        search: its own step is not used.
    """

    search: Viterbi

    def propose(self, known: Knowledge) -> Iterator[Choice]:
        """What a grid is predicted to take and lose: the trellis does a little better."""
        for choice in Grid().propose(known):
            is_worth = choice.fed and known.value.numel() >= _WORTH_A_TRELLIS
            yield replace(choice, proposer=self) if is_worth else choice

    def encode(self, known: Knowledge, choice: Choice) -> Encoded:
        """The cheapest path."""
        steps = known.steps(choice.step or 0.0)
        return replace(self.search, step=steps / 2).encode(known.value, Stats(gram=known.gram))
