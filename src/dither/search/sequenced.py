"""Fill a budget layer by layer: each weight makes up for the errors of those before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dither.archive import code
from dither.calibrate import Sequence, Sequenced
from dither.core import Encoded, Encoder, Stats
from dither.encoders.gptq import GPTQ
from dither.encoders.outputs import retargeted
from dither.encoders.rdo import HIGH_RATE_STRENGTH
from dither.encoders.viterbi import Viterbi
from dither.search.budget import BudgetSearch, Progress
from dither.search.calibrated import lean
from dither.search.options import Option, Weighted

DAMPING = 0.1
"""Of second moments, as a share of their mean diagonal: samples are few, and will differ."""

RATE = 4 * HIGH_RATE_STRENGTH
"""Lambda of the trellis, in its squared steps, which are a quarter of a grid's, for each bit.

It draws weights to zero, which refitted steps make up for: where they are not, it is 0.
"""

_LEARNING_SHARE = 4
"""The first round, which only learns how many bytes layers take, reads one in so many batches."""

_MOST_CHANGE = 0.25
"""Octaves that the step of a layer may differ from its plan."""

_MOST_LAST = 1.0
"""The same of the last layer."""

_FITS = 5
_NEAR, _NEAR_NBYTES = 0.005, 8
"""What the last layer may leave: a share of its bytes, and some more."""


_ATTEMPTS = 3
_WORTH_A_TRELLIS = 4096
_MATRIX = 2


class SequencedSearch:
    """Meets a budget with weights encoded in the order of use.

    A first round over part of the data shows what layers take once they make up for the errors
    before them, which is less than they took alone. The budget is then spent anew, and a second
    round over all data encodes; as it goes, steps of layers still to come take up what is too much
    or too little.

    Args:
        search: of the same tensors and budget; has run.
        sequence: the layers.
        budget: bytes.
        progress: called with a stage and the share of it that is done.
    """

    def __init__(
        self, search: BudgetSearch, sequence: Sequence, budget: int, progress: Progress
    ) -> None:
        self._search, self._sequence = search, sequence
        self._budget, self._progress = budget, progress

    def run(self, batches: int) -> bool:
        """Encode all layers; the search then holds the coded tensors.

        Args:
            batches: how many the sequence has.

        Returns:
            Whether the file meets the budget.
        """
        self._round(self._budget, max(1, batches // _LEARNING_SHARE), steer=False)
        aim = self._budget
        for _ in range(_ATTEMPTS):
            done, fed = self._round(aim, batches, steer=True)
            for name, value in done.moved.items():
                self._search.move(name, value)
            size = self._search.settle(self._budget, frozen=set(fed))
            if size <= self._budget:
                return True
            aim -= size - self._budget
        return False

    def _round(self, budget: int, batches: int, *, steer: bool) -> tuple[Sequenced, list[str]]:
        """Spend the budget by what is known, and encode all layers; also names of those."""
        search = self._search
        chosen = search.plan(budget)
        names = [name for name in self._sequence.order.names if name in chosen]
        fed = [n for n in names if chosen[n].step and chosen[n].fed and chosen[n].loss > 0]
        search.encode(chosen, skip=set(fed))
        left = _Left(search, budget, fed, steer=steer)
        stage = f"encoding in sequence{'' if steer else ', to learn'}"

        def choose(name: str, weight: Tensor) -> Encoder | None:
            del weight
            if name not in left.waiting:
                return None
            self._progress(stage, 1 - len(left.waiting) / len(fed))
            return _Turn(left, name)

        start = search.decoded(name for name in chosen if name not in set(fed))
        done = self._sequence.run(choose, start=start, biases=True, batches=batches)
        self._progress(stage, 1.0)
        return done, fed


class _Left:
    """What is left of a budget while layers are encoded one after another."""

    def __init__(self, search: BudgetSearch, budget: int, names: list[str], *, steer: bool) -> None:
        self.search, self.names = search, names
        self.waiting = list(names)
        self._steer, self._budget = steer, search.room(budget, names)

    def option(self, name: str) -> Option:
        """The option of the weight whose turn it is."""
        chosen = self.search.chosen[name]
        expected = {n: self.search.expected(n) for n in self.waiting}
        self.waiting.remove(name)
        if not self._steer:
            return chosen
        over = sum(expected.values()) - self._budget
        values = sum(self.search.tensor(n).value.numel() for n in expected)
        return _finer(chosen, min(max(-8 * over / values, -_MOST_CHANGE), _MOST_CHANGE))

    def encode(self, name: str, encode: Callable[[Option], Encoded]) -> Encoded:
        """Encode the weight whose turn it is; the last one fills what is left."""
        option = self.option(name)
        encoded = encode(option)
        spent = self.search.put(name, option, code(encoded))
        position, values = 0.0, encoded.numel
        fits = (spent, option, encoded) if spent <= self._budget else None
        for _ in range(_FITS if self._steer and not self.waiting else 0):
            miss = self._budget - spent
            if 0 <= miss < _NEAR_NBYTES + _NEAR * spent:
                break
            position = min(max(position + 8 * miss / values, -_MOST_LAST), _MOST_LAST)
            trial = _finer(option, position)
            encoded = encode(trial)
            spent = self.search.put(name, trial, code(encoded))
            if spent <= self._budget and (fits is None or spent > fits[0]):
                fits = spent, trial, encoded
        if fits is not None and fits[2] is not encoded:
            spent, option, encoded = fits
            spent = self.search.put(name, option, code(encoded))
        self._budget -= spent
        return encoded


def _finer(option: Option, octaves: float) -> Option:
    """The same with a step that many octaves finer."""
    if option.step is None:
        return option
    return replace(option, step=float(torch.tensor(option.step * 2.0**-octaves).bfloat16()))


def _is_worth_a_trellis(weight: Tensor, stats: Stats) -> bool:
    """Whether its second table is paid for, and one matrix of moments holds for all outputs."""
    if stats.gram is None or stats.cross is None or stats.outputs or stats.gram.ndim != _MATRIX:
        return False
    return weight.numel() >= _WORTH_A_TRELLIS


@dataclass(frozen=True, eq=False)
class _Turn:
    """The encoder of one weight."""

    left: _Left
    name: str

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        """On a trellis, or a grid for small weights, with the step that the budget allows."""
        weighted: Weighted = self.left.search.tensor(self.name)
        leaning = None if stats is None else lean(stats, weighted.gram)

        def encode(option: Option) -> Encoded:
            steps = option.steps(weighted)
            if leaning is None or not _is_worth_a_trellis(weight, leaning):
                return GPTQ(steps, damping=DAMPING, refit=weighted.refit).encode(weight, leaning)
            aim = retargeted(weight, leaning, DAMPING)
            rate = RATE if weighted.refit else 0.0
            search = Viterbi(steps / 2, rate, damping=DAMPING, refit=weighted.refit)
            return search.encode(aim, Stats(gram=leaning.gram))

        return self.left.encode(self.name, encode)
