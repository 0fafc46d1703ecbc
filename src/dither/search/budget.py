"""Meet a budget in file bytes: predict, encode, measure, correct."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dither.archive import CodedTensor, code, pack, packed_nbytes
from dither.core import BudgetError
from dither.search.allocate import allocate
from dither.search.options import GRID_INDEX_NBYTES, Ladder, Option, Weighted, build_ladder

Item = TypeVar("Item")
Result = TypeVar("Result")

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""

LEAST_SHARE = 0.985
SLACK_NBYTES = 64
"""A file that meets its budget fills this share of it, or all but this many bytes."""

_AIM = 0.9985
_ENOUGH = 0.995
_PASSES = 4
_CLOSE = 0.02
"""Share of the budget by which a pass may miss for single tensors to make up for it."""
_TOUCHES = 24
_PROBED = 1 << 16
_PROBE = 6
_LARGE = 1 << 21
_FEW = 64
_NEARLY = 24.0
"""Predictions of the smallest options may be off by about so many bytes."""
_BRACKETINGS = 8
_MOST_CHANGE = 0.08
_MOST_COARSER = 0.5
_MOST_FINER = 3.0
_FINE_STEPS = 1 << 12
"""Payloads from this size on may spend two bytes more on an exact step."""


class BudgetSearch:
    """Finds, for each tensor, the option that fills a budget with the least predicted loss.

    Nothing but coded payloads is kept, and a tensor is coded again only when its option changes.
    """

    def __init__(
        self,
        tensors: Mapping[str, Weighted],
        aliases: Mapping[str, str],
        metadata: Mapping[str, Any],
        progress: Progress,
    ) -> None:
        self._tensors = dict(tensors)
        self._aliases = aliases
        self._metadata = metadata
        self._progress = progress
        self._ladders = self._map("predicting", build_ladder, tensors)
        self._chosen: dict[str, Option] = {}
        self._coded: dict[str, CodedTensor] = {}
        self._known: dict[str, dict[float, float]] = {name: {} for name in tensors}

    def run(self, budget: int) -> dict[str, CodedTensor]:
        """Coded tensors whose archive takes at most ``budget`` bytes.

        Raises:
            BudgetError: no choice of options fits; it names the smallest size that does.
        """
        turned = [name for name, tensor in self._tensors.items() if tensor.basis is not None]
        try:
            size = self._meet(budget)
        except BudgetError:
            if not turned:
                raise
            size = 0
        if turned and size < LEAST_SHARE * budget and budget - size > SLACK_NBYTES:
            # Near the least size a basis costs too much, and near the accuracy of its type a table
            # has to do without: in between there are sizes that only plain grids reach.
            plain = {name: replace(self._tensors[name], basis=None) for name in turned}
            self._tensors = {**self._tensors, **plain}
            self._ladders = {**self._ladders, **self._map("predicting", build_ladder, plain)}
            self._known |= {name: {} for name in turned}
            self._coded, self._chosen = {}, {}
            self._meet(budget)
        return self._coded

    def _meet(self, budget: int) -> int:
        """Code all tensors; the size of the file, at most the budget."""
        ladders, index = self._ladders, self._guess_index()
        size = 0
        self._probe(allocate(ladders, budget * _AIM - index))
        ladders = self._corrected()
        for attempt in range(_PASSES):
            chosen = allocate(ladders, budget * _AIM - index)
            if attempt and chosen == self._chosen:
                break
            size = self._encode(chosen, f"encoding, pass {attempt + 1}")
            index = size - self._spent()
            if _full(size, budget) or abs(size - budget) < _CLOSE * budget:
                break
            ladders = self._corrected()
        size = self._touch_up(budget, size)
        if size > budget:
            size = self._touch_up(budget, self._shrink(budget))
        return size

    # --- for searches that encode some tensors themselves ---------------------------------------

    @property
    def chosen(self) -> Mapping[str, Option]:
        """The option of each tensor."""
        return self._chosen

    @property
    def coded(self) -> dict[str, CodedTensor]:
        """All tensors, coded."""
        return dict(self._coded)

    def tensor(self, name: str) -> Weighted:
        """A tensor and what an error in it costs."""
        return self._tensors[name]

    def decoded(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Values of some tensors as the file would hold them."""
        archive = pack({name: self._coded[name] for name in names})
        return {name: archive[name] for name in archive}

    def plan(self, budget: int) -> dict[str, Option]:
        """The best options by all that is known now."""
        size = packed_nbytes(self._coded, self._aliases, self._metadata)
        return allocate(self._corrected(), budget * _AIM - (size - self._spent()))

    def encode(self, chosen: Mapping[str, Option], skip: AbstractSet[str]) -> None:
        """Take these options, and code what changed but for those to skip."""
        kept = {name: self._chosen[name] for name in skip}
        self._encode({**chosen, **kept}, "encoding")
        self._chosen = dict(chosen)

    def put(self, name: str, option: Option, coded: CodedTensor) -> float:
        """Take a tensor that was coded elsewhere; returns the bytes that depend on the option."""
        self._coded[name], self._chosen[name] = coded, option
        measured = self._measured(name)
        if option.step is not None:
            self._known[name] = {option.step: measured}
        return measured

    def move(self, name: str, value: Tensor) -> None:
        """Give a tensor another value, and code it again with its option."""
        name = self._aliases.get(name, name)
        value = value.reshape(self._tensors[name].value.shape)
        self._tensors[name] = replace(self._tensors[name], value=value)
        self._coded[name] = _encode(self._tensors[name], self._chosen[name])

    def room(self, budget: int, names: Iterable[str]) -> float:
        """Bytes that a budget leaves to some tensors."""
        size = packed_nbytes(self._coded, self._aliases, self._metadata)
        return _goal(budget) - size + sum(self._measured(name) for name in names)

    def expected(self, name: str) -> float:
        """Bytes that a tensor is expected to take, as :meth:`put` counts them."""
        step = self._chosen[name].step
        if step is None:
            return self._measured(name)
        return self._ladders[name].corrected(self._known[name]).predict(step)

    def settle(self, budget: int, frozen: AbstractSet[str]) -> int:
        """Bring the file to its budget by tensors that are not frozen; its size then."""
        size = packed_nbytes(self._coded, self._aliases, self._metadata)
        return self._touch_up(budget, size, frozen)

    # --------------------------------------------------------------------------------------------

    def _probe(self, chosen: Mapping[str, Option]) -> None:
        """Learn what large tensors take from a part of their rows, before any is coded whole."""
        parts = {
            name: (self._tensors[name].every(_PROBE), option)
            for name, option in chosen.items()
            if option.step is not None and _can_probe(self._tensors[name])
        }
        coded = self._map("probing", lambda item: _encode(*item), parts)
        for name, (part, option) in parts.items():
            share = part.value.numel() / self._tensors[name].value.numel()
            if option.step is not None:
                self._known[name][option.step] = coded[name].nbytes / share + GRID_INDEX_NBYTES

    def _shrink(self, budget: int) -> int:
        """Take bytes away until the file fits: for budgets near the least."""
        target = self._spent()
        size = packed_nbytes(self._coded, self._aliases, self._metadata)
        while size > budget:
            ladders = self._corrected()
            least = sum(ladder.options[0].nbytes for ladder in ladders.values())
            target = max(least, target - max(1.25 * (size - budget), 16))
            chosen = allocate(ladders, target)
            if chosen == self._chosen and target <= least:
                return self._least(budget)
            size = self._encode(chosen, "fitting")
        return size

    def _least(self, budget: int) -> int:
        """The smallest file there is, by coding the cheapest options of every tensor.

        Raises:
            BudgetError: it is larger than the budget.
        """
        candidates = {}
        for name, ladder in self._ladders.items():
            most = 2 * ladder.options[0].nbytes + _NEARLY
            cheap = [option for option in ladder.options if option.nbytes <= most]
            tried = [(_encode(self._tensors[name], option), option) for option in cheap]
            best = min(
                tried, key=lambda t: t[0].nbytes + GRID_INDEX_NBYTES * (t[1].step is not None)
            )
            self._coded[name], self._chosen[name] = best
            candidates[name] = tried
        size = packed_nbytes(self._coded, self._aliases, self._metadata)
        # In a small file the index counts: what compresses well there depends on all tensors.
        for name in candidates if len(candidates) <= _FEW else ():
            for coded, option in candidates[name]:
                before = self._coded[name]
                self._coded[name] = coded
                measured = packed_nbytes(self._coded, self._aliases, self._metadata)
                if measured < size:
                    size, self._chosen[name] = measured, option
                else:
                    self._coded[name] = before
        if size > budget:
            raise BudgetError(
                f"a file of {budget} bytes is impossible: these tensors take at least {size} "
                f"bytes, their names and shapes included; ask for {size} bytes or more",
                smallest=size,
            )
        return size

    def _touch_up(self, budget: int, size: int, frozen: AbstractSet[str] = frozenset()) -> int:
        """Bring a file that is nearly right to its budget by the steps of single tensors.

        Each time, the smallest tensor for which the change is small takes it on.
        """
        tried = set(frozen)
        while not _full(size, budget) and len(tried) < _TOUCHES + len(frozen):
            name = self._pick(abs(_goal(budget) - size), tried)
            if name is None:
                break
            tried.add(name)
            size = self._fit(name, budget, size)
        return size

    def _pick(self, gap: int, tried: set[str]) -> str | None:
        """The smallest tensor on a grid to which the gap is little, or else the largest."""
        grids = {
            name: self._coded[name].nbytes
            for name, option in self._chosen.items()
            if option.step is not None and option.loss > 0 and name not in tried
        }
        roomy = [name for name, nbytes in grids.items() if nbytes * _MOST_CHANGE >= gap]
        if roomy:
            return min(roomy, key=lambda name: grids[name])
        return max(grids, key=lambda name: grids[name], default=None)

    def _fit(self, name: str, budget: int, size: int) -> int:
        """Search for the step of one tensor at which the file fills its budget; its new size.

        Positions are octaves finer than now; sizes at either side of the goal enclose it.
        """
        tensor, option, goal = self._tensors[name], self._chosen[name], _goal(budget)
        best = (size, self._coded[name], option)
        under, over = ((0.0, size), None) if size <= goal else (None, (0.0, size))
        # One octave of the step is one bit for each value, and less where codes are few.
        position = 8 * (goal - size) / tensor.value.numel()
        for _ in range(_BRACKETINGS):
            position = min(max(position, -_MOST_COARSER), _MOST_FINER)
            step = (option.step or 1.0) * 2.0**-position
            if best[1].nbytes < _FINE_STEPS or tensor.rows is not None:
                step = float(torch.tensor(step).bfloat16())
            changed = replace(option, step=step)
            self._coded[name] = _encode(tensor, changed)
            measured = packed_nbytes(self._coded, self._aliases, self._metadata)
            if _miss(measured, budget) < _miss(best[0], budget):
                best = (measured, self._coded[name], changed)
            if _full(best[0], budget):
                break
            if measured <= goal:
                under = (position, measured)
            else:
                over = (position, measured)
            if under and over:
                share = (goal - under[1]) / max(over[1] - under[1], 1)
                position = under[0] + min(max(share, 0.15), 0.85) * (over[0] - under[0])
            else:
                position = position * 2 or 0.01
        size, self._coded[name], self._chosen[name] = best
        return size

    def _spent(self) -> float:
        """Bytes that depend on the options: payloads, and what grids add to the index."""
        return sum(self._measured(name) for name in self._coded)

    def _measured(self, name: str) -> float:
        on_grid = self._chosen[name].step is not None
        return self._coded[name].nbytes + (GRID_INDEX_NBYTES if on_grid else 0.0)

    def _encode(self, chosen: dict[str, Option], stage: str) -> int:
        """Code what changed; returns the exact size of the archive."""
        changed = {
            name: (self._tensors[name], option)
            for name, option in chosen.items()
            if name not in self._coded or self._chosen.get(name) != option
        }
        self._coded |= self._map(stage, lambda item: _encode(*item), changed)
        self._coded = {name: self._coded[name] for name in self._tensors}
        self._chosen = dict(chosen)
        for name in changed:
            if (step := chosen[name].step) is not None:
                self._known[name][step] = self._measured(name)
        return packed_nbytes(self._coded, self._aliases, self._metadata)

    def _corrected(self) -> dict[str, Ladder]:
        """The ladders with predictions corrected by all that was measured."""
        return {name: ladder.corrected(self._known[name]) for name, ladder in self._ladders.items()}

    def _guess_index(self) -> float:
        """Bytes of the index before any tensor was coded."""
        return 64 + sum(14 + len(name) / 4 for name in [*self._tensors, *self._aliases])

    def _map(
        self, stage: str, function: Callable[[Item], Result], items: Mapping[str, Item]
    ) -> dict[str, Result]:
        """Apply a function to every value on all cores; NumPy and torch release the lock."""
        done: dict[str, Result] = {}

        def note(name: str, result: Result) -> None:
            done[name] = result
            self._progress(stage, len(done) / len(items))

        # Large tensors one after another, so that the copies of one at most are in memory.
        large = [name for name in items if self._tensors[name].value.numel() > _LARGE]
        small = [name for name in items if self._tensors[name].value.numel() <= _LARGE]
        for name in large:
            note(name, function(items[name]))
        with ThreadPoolExecutor(max_workers=min(4, torch.get_num_threads())) as pool:
            results = pool.map(function, (items[name] for name in small))
            for name, result in zip(small, results, strict=True):
                note(name, result)
        return done


def _can_probe(tensor: Weighted) -> bool:
    """Whether some rows tell what all take: not where they share a basis, which is stored once."""
    return tensor.value.numel() > _PROBED and tensor.basis is None


def _full(size: int, budget: int) -> bool:
    """Whether a file meets its budget so well that more passes are not worth their time."""
    return size <= budget and (size >= _ENOUGH * budget or size >= budget - SLACK_NBYTES)


def _goal(budget: int) -> int:
    """What single tensors aim at: a little less than all."""
    return budget - max(round(budget * (1 - _ENOUGH) / 4), SLACK_NBYTES // 4)


def _miss(size: int, budget: int) -> float:
    """How far a file is from its budget; too large is worse than any that fits."""
    return float(budget - size) if size <= budget else float(budget + size)


def _encode(tensor: Weighted, option: Option) -> CodedTensor:
    return code(option.encode(tensor))
