"""Meet a budget in file bytes: predict, encode, measure, correct."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from dither.archive import CodedTensor, code, packed_nbytes
from dither.core import BudgetError
from dither.search.allocate import allocate
from dither.search.options import Ladder, Option, Weighted, build_ladder

Item = TypeVar("Item")
Result = TypeVar("Result")

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""

LEAST_SHARE = 0.985
SLACK_NBYTES = 64
"""A file that meets its budget fills this share of it, or all but this many bytes."""

_AIM = 0.9985
_ENOUGH = 0.995
_ATTEMPTS = 10
_BISECTIONS = 6
_LANDINGS = 4


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
        self._tensors = tensors
        self._aliases = aliases
        self._metadata = metadata
        self._progress = progress
        self._ladders = self._map("predicting", build_ladder, tensors)
        self._chosen: dict[str, Option] = {}
        self._coded: dict[str, CodedTensor] = {}

    def run(self, budget: int) -> dict[str, CodedTensor]:
        """Coded tensors whose archive takes at most ``budget`` bytes.

        Raises:
            BudgetError: no choice of options fits; it names the smallest size that does.
        """
        best: dict[str, CodedTensor] | None = None
        best_nbytes = 0
        chosen: dict[str, Option] = {}
        ladders, target = dict(self._ladders), budget * _AIM
        index: float = self._guess_index()
        margin, kept = budget * (1 - _AIM), chosen
        for attempt in range(_ATTEMPTS):
            last, chosen = chosen, allocate(ladders, target - index)
            if chosen == last:
                break
            size = self._encode(chosen, f"encoding, pass {attempt + 1}")
            index = size - sum(tensor.nbytes for tensor in self._coded.values())
            ladders = self._corrected()
            if best_nbytes < size <= budget:
                best, best_nbytes, kept = dict(self._coded), size, chosen
            if best is not None and (
                best_nbytes >= _ENOUGH * budget or best_nbytes >= budget - SLACK_NBYTES
            ):
                return best
            if size > budget:
                margin *= 2
                target = budget - margin
            else:
                margin /= 2
                target = budget - margin
        if best is None:
            return self._shrink(budget)
        self._chosen, self._coded = kept, best
        return self._land(budget, best_nbytes)

    def _shrink(self, budget: int) -> dict[str, CodedTensor]:
        """Take bytes away until the file fits: the last resort, for budgets near the least."""
        target = sum(tensor.nbytes for tensor in self._coded.values())
        while True:
            ladders = self._corrected()
            least = sum(ladder.options[0].nbytes for ladder in ladders.values())
            chosen = allocate(ladders, target)
            size = self._encode(chosen, "fitting")
            if size <= budget:
                return self._land(budget, size)
            if target <= least:
                raise BudgetError(
                    f"a file of {budget} bytes is impossible: these tensors take at least {size} "
                    f"bytes, their names and shapes included; ask for {size} bytes or more",
                    smallest=size,
                )
            target = max(least, target - max(1.25 * (size - budget), 16))

    def _land(self, budget: int, size: int) -> dict[str, CodedTensor]:
        """Fill what is left by steps between two options of single tensors."""
        tried: set[str] = set()
        for _ in range(_LANDINGS):
            gap = budget - size
            if size >= _ENOUGH * budget or gap <= SLACK_NBYTES:
                break
            name = self._roomiest(tried, gap)
            if name is None:
                break
            tried.add(name)
            size = self._bisect(name, budget, size)
        return self._coded

    def _roomiest(self, tried: set[str], gap: int) -> str | None:
        """The tensor whose next finer step takes the most, but no more than a few gaps."""
        room = {
            name: self._finer(name).nbytes - option.nbytes
            for name, option in self._chosen.items()
            if name not in tried and self._finer(name).step is not None
        }
        return max(room, key=lambda name: room[name], default=None) if gap > 0 else None

    def _finer(self, name: str) -> Option:
        """The next option of a tensor that takes more bytes, or its present one."""
        now = self._chosen[name]
        for option in self._ladders[name].options:
            if now.step is not None and option.step is not None and option.step < now.step:
                return option
        return Option(now.nbytes, now.loss)

    def _bisect(self, name: str, budget: int, size: int) -> int:
        now = self._chosen[name]
        if now.step is None:
            return size
        coarse, fine = now.step, (self._finer(name).step or now.step) * 0.97
        for _ in range(_BISECTIONS):
            middle = (coarse * fine) ** 0.5
            before = self._coded[name]
            option = Option(now.nbytes, now.loss, step=middle)
            self._coded[name] = _encode(self._tensors[name], option)
            measured = packed_nbytes(self._coded, self._aliases, self._metadata)
            if size <= measured <= budget:
                size, coarse = measured, middle
                self._chosen[name] = option
            else:
                self._coded[name], fine = before, middle
            if size >= _ENOUGH * budget:
                break
        return size

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
        return packed_nbytes(self._coded, self._aliases, self._metadata)

    def _corrected(self) -> dict[str, Ladder]:
        """The ladders with predictions scaled to what was measured."""
        return {
            name: ladder.scaled(self._coded[name].nbytes / max(self._predicted(name), 1.0))
            for name, ladder in self._ladders.items()
        }

    def _predicted(self, name: str) -> float:
        step = self._chosen[name].step
        if step is None:
            return float(self._coded[name].nbytes)
        return next(o.nbytes for o in self._ladders[name].options if o.step == step)

    def _guess_index(self) -> float:
        """Bytes of the index before any tensor was coded."""
        return 64 + sum(14 + len(name) / 4 for name in [*self._tensors, *self._aliases])

    def _map(
        self, stage: str, function: Callable[[Item], Result], items: Mapping[str, Item]
    ) -> dict[str, Result]:
        """Apply a function to every value on all cores; NumPy and torch release the lock."""
        done: dict[str, Result] = {}
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            for i, (name, result) in enumerate(
                zip(items, pool.map(function, items.values()), strict=True)
            ):
                done[name] = result
                self._progress(stage, (i + 1) / len(items))
        return done


def _encode(tensor: Weighted, option: Option) -> CodedTensor:
    return code(option.encoder(tensor).encode(tensor.value))
