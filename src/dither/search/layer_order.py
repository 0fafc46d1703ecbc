"""Spend a budget layer by layer: each weight makes up for the errors of those before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain

from torch import Tensor

from dither.archive import CodedTensor
from dither.calibrate import Layer, Layerwise
from dither.core import BudgetError, Encoded, Stats
from dither.encoders.gptq import GPTQ
from dither.encoders.outputs import retargeted
from dither.encoders.rdo import HIGH_RATE_STRENGTH
from dither.encoders.viterbi import Viterbi
from dither.progress import report
from dither.search.calibrated import lean
from dither.search.forecast import Forecast
from dither.search.knowledge import Choice, Knowledge
from dither.search.landing import goal, land
from dither.search.ledger import Ledger
from dither.search.proposers.grid import refits
from dither.search.sensitivity import of_vector, unit_of
from dither.search.size import LEAST_SHARE, SLACK_NBYTES

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


class LayerOrder:
    """Meets a budget with weights encoded in the order of use.

    A first round over part of the data shows what layers take once they make up for the errors
    before them, which is less than they took alone. The budget is then spent anew, and a second
    round over all data encodes; as it goes, steps of layers still to come take up what is too much
    or too little.

    Args:
        forecast: of all tensors; learns from what is encoded.
        ledger: full, as :class:`~dither.search.greedy.Greedy` leaves it; is filled anew.
        layers: of the model.
    """

    def __init__(self, forecast: Forecast, ledger: Ledger, layers: Layerwise) -> None:
        self._forecast, self._ledger, self._layers = forecast, ledger, layers
        self._starts: dict[str, Tensor] = {}  # what moves, as each walk finds it

    def spend(self, budget: int) -> None:
        """Encode all layers, and fill the ledger with a file of at most ``budget`` bytes.

        Raises:
            BudgetError: the file came out larger each time. Of those that fit, the fullest is kept.
        """
        aim, batches = budget, len(list(self._layers.data))
        moved, _ = self._round(aim, max(1, batches // _LEARNING_SHARE), steer=False)
        self._learn(moved)
        best, kept = 0, self._ledger.rows()
        for _ in range(_ATTEMPTS):
            moved, fed = self._round(aim, batches, steer=True)
            for name, value in moved.items():
                self._move(self._ledger.aliases.get(name, name), value)
            size = land(self._ledger, self._forecast, budget, frozen=set(fed))
            if best < size <= budget:
                best, kept = size, self._ledger.rows()
            if budget >= size >= min(LEAST_SHARE * budget, budget - SLACK_NBYTES):
                break
            aim += budget - size
        if not best:
            raise BudgetError(f"layers in sequence take {size} bytes, more than {budget}")
        self._ledger.restore(kept)

    def _learn(self, moved: Mapping[str, Tensor]) -> None:
        """Know anew what takes no bytes as it is, and will once it moves: biases that are all 0."""
        places = {self._ledger.aliases.get(name, name): value for name, value in moved.items()}
        unit = unit_of(self._forecast.tensors.values())
        found = {
            name: of_vector(self._shaped(name, value), unit)
            for name, value in places.items()
            if _is_constant(self._forecast.tensors[name].value) and not _is_constant(value)
        }
        self._starts |= dict(self._ledger.decoded(found))
        self._forecast.change(found)

    def _shaped(self, name: str, value: Tensor) -> Tensor:
        known = self._forecast.tensors[name].value
        return value.cpu().reshape(known.shape).to(known.dtype)

    def _round(
        self, budget: int, batches: int, *, steer: bool
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Spend the budget by what is known, and encode all layers.

        Returns:
            Biases and means that moved, and the names of the weights that were encoded in order.
        """
        forecast, ledger = self._forecast, self._ledger
        chosen = forecast.plan(budget, ledger.overhead)
        names = [name for name in self._layers.order.names if name in chosen]
        fed = [n for n in names if chosen[n].step and chosen[n].fed and chosen[n].loss > 0]
        others = {name: choice for name, choice in chosen.items() if name not in set(fed)}
        forecast.encode(others, ledger, "encoding")
        for name in fed:
            ledger.put(name, chosen[name], ledger.coded(name))
        turns = _Turns(forecast, ledger, budget, fed, steer=steer)
        stage = f"encoding in sequence{'' if steer else ', to learn'}"
        start = chain(ledger.decoded(others), self._starts.items())
        with self._layers.walk(fed, start=start, biases=True, batches=batches) as walk:
            for layer in walk:
                report(stage, turns.share, layer.name)
                layer.commit(turns.encode(layer))
        report(stage, 1.0)
        return walk.moved, fed

    def _move(self, name: str, value: Tensor) -> None:
        """Give a tensor another value, and code it again as was chosen."""
        if name not in self._starts:
            self._starts |= dict(self._ledger.decoded([name]))
        known = replace(self._forecast.tensors[name], value=self._shaped(name, value))
        self._forecast.tensors[name] = known
        choice = self._ledger.choice(name)
        self._ledger.put(name, choice, self._forecast.code(name, choice))


def _is_constant(value: Tensor) -> bool:
    return bool((value == value.flatten()[:1]).all())


class _Turns:
    """Encodes one layer after another, and steers those to come by what is left of a budget."""

    def __init__(
        self, forecast: Forecast, ledger: Ledger, budget: int, names: list[str], *, steer: bool
    ) -> None:
        self._forecast, self._ledger, self._steer = forecast, ledger, steer
        self.waiting = {n: forecast.expected(n, ledger.choice(n).step or 1.0) for n in names}
        self._sizes = {n: forecast.tensors[n].value.numel() for n in names}
        self._left = goal(budget) - ledger.nbytes + sum(map(ledger.measured, names))

    @property
    def share(self) -> float:
        """Of the values, how many had their turn."""
        return 1 - sum(self._sizes[n] for n in self.waiting) / max(sum(self._sizes.values()), 1)

    def encode(self, layer: Layer) -> Encoded:
        """Encode the weight whose turn it is; the last one fills what is left."""
        name, choice = layer.name, self._choice(layer.name)
        encoded, coded, spent = self._try(layer, choice)
        position, values = 0.0, encoded.numel
        fits = (spent, choice, encoded, coded) if spent <= self._left else None
        for _ in range(_FITS if self._steer and not self.waiting else 0):
            miss = self._left - spent
            if 0 <= miss < _NEAR_NBYTES + _NEAR * spent:
                break
            position = min(max(position + 8 * miss / values, -_MOST_LAST), _MOST_LAST)
            trial = choice.finer(position)
            encoded, coded, spent = self._try(layer, trial)
            if spent <= self._left and (fits is None or spent > fits[0]):
                fits = spent, trial, encoded, coded
        if fits is not None and fits[2] is not encoded:
            spent, choice, encoded, coded = fits
            self._put(name, choice, coded)
        self._left -= spent
        return encoded

    def _choice(self, name: str) -> Choice:
        """As planned, or with a step that takes up what others took too much or too little."""
        choice, values = self._ledger.choice(name), 0
        over = sum(self.waiting.values()) - self._left
        values = sum(self._forecast.tensors[n].value.numel() for n in self.waiting)
        del self.waiting[name]
        if not self._steer:
            return choice
        return choice.finer(min(max(-8 * over / values, -_MOST_CHANGE), _MOST_CHANGE))

    def _try(self, layer: Layer, choice: Choice) -> tuple[Encoded, CodedTensor, float]:
        known = self._forecast.tensors[layer.name]
        encoded, coded = self._forecast.coder.remembered(
            "in sequence",
            (layer.weight, layer.stats, known.gram, known.rows, choice.step, refits(known)),
            lambda: _encode(layer, known, choice),
        )
        return encoded, coded, self._put(layer.name, choice, coded)

    def _put(self, name: str, choice: Choice, coded: CodedTensor) -> float:
        spent = self._ledger.put(name, choice, coded)
        self._forecast.renew(name, choice.step, spent)
        return spent


def _encode(layer: Layer, known: Knowledge, choice: Choice) -> Encoded:
    """On a trellis, or a grid for small weights, with the step that was chosen."""
    leaning, steps = lean(layer.stats, known.gram), known.steps(choice.step or 0.0)
    if not _is_worth_a_trellis(layer.weight, leaning):
        return GPTQ(steps, damping=DAMPING, refit=refits(known)).encode(layer.weight, leaning)
    aim = retargeted(layer.weight, leaning, DAMPING)
    rate = RATE if refits(known) else 0.0
    search = Viterbi(steps / 2, rate, damping=DAMPING, refit=refits(known))
    return search.encode(aim, Stats(gram=leaning.gram))


def _is_worth_a_trellis(weight: Tensor, stats: Stats) -> bool:
    """Whether its second table is paid for, and one matrix of moments holds for all outputs."""
    if stats.gram is None or stats.cross is None or stats.outputs or stats.gram.ndim != _MATRIX:
        return False
    return weight.numel() >= _WORTH_A_TRELLIS
