"""Contexts that follow the codes before: a linear machine driven by their parities.

Codes of a trellis come from two quantizers in turn, whose codes are distributed differently. Which
one is in force follows from the parities of the codes that stand ``stride`` places before, twice
as far before, and so on: as many machines run side by side as the last axis is long. With ``z(t)``
the quantizer and ``p(t)`` the parity at step ``t`` of one of them, ``sum(a[i] * z(t - i)) =
sum(b[i] * p(t - i))`` modulo 2, and everything before the first step is 0.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dither.coding import lanes_twin
from dither.coding.errors import CodingError
from dither.coding.tables import Table

LOW = 1 << 16
MAX_DEGREE = 8


@dataclass(frozen=True)
class Machine:
    """A pair of polynomials: bit ``i`` of ``divisor`` is ``a[i]``, of ``factor`` ``b[i]``.

    Raises:
        CodingError: they do not define the next step, or it depends on its own parity.
    """

    divisor: int
    factor: int

    def __post_init__(self) -> None:
        """Refuse what is no machine."""
        degree = self.divisor.bit_length() - 1
        if not (self.divisor & 1 and 1 <= degree <= MAX_DEGREE):
            raise CodingError(f"a machine cannot divide by {self.divisor:#o}")
        if self.factor & 1 or not 0 < self.factor < 2 << degree:
            raise CodingError(f"a machine cannot have the factor {self.factor:#o}")

    def following(self) -> NDArray[np.int64]:
        """The state after ``s`` and parity ``p``, at ``2 * s + p``; ``z`` is its lowest bit."""
        state, parity = np.divmod(np.arange(2 << (self.divisor.bit_length() - 1)), 2)
        after = (state >> 1) ^ ((state & 1) * (self.divisor >> 1))
        return np.asarray(after ^ (parity * (self.factor >> 1)), np.int64)

    def run(self, parities: NDArray[Any], stride: int) -> NDArray[np.uint8]:
        """The quantizer of every code, flat, by the parities of all codes, a multiple of stride."""
        lanes = parities.reshape(-1, stride)
        found = np.zeros(lanes.shape, np.uint8)
        following, state = self.following(), np.zeros(stride, np.int64)
        for row, parity in zip(found, lanes, strict=True):
            row[:] = state & 1
            state = following.take(2 * state + parity)
        return found.reshape(-1)


class Steering:
    """A machine at work on a part, from its first symbol to its last."""

    def __init__(
        self,
        machine: Machine,
        stride: int,
        odd: int,
        contexts: NDArray[np.uint8] | None,
        tables: Sequence[Table],
    ) -> None:
        """Begin at the first symbol.

        Args:
            machine: what says which quantizer is in force.
            stride: length of the last axis; 1 for a vector.
            odd: 1 where the symbol 0 stands for an odd code, else 0.
            contexts: of every symbol, which of the first half of the tables; None for one.
            tables: those of the first quantizer, then as many of the second.
        """
        self._following = machine.following()
        self._stride, self._odd = stride, odd
        self._contexts = contexts
        self._tables, self._half = tables, len(tables) // 2
        self._machines = np.zeros(stride, np.uint8)

    def compiled(
        self,
        states: NDArray[np.uint32],
        words: NDArray[np.uint8],
        out: NDArray[Any],
        precision: int,
    ) -> NDArray[np.uint32] | None:
        """All of ``out``, compiled, and the states at the end; None where that is not worth it."""
        settings, machines = (precision, self._odd), self._machines
        held = self._contexts, self._tables
        return lanes_twin.steered(states, words, *held, out, machines, self._following, settings)

    def scalar(
        self, current: list[int], source: list[int], coded: int, precision: int
    ) -> list[int]:
        """The first ``coded`` symbols, one after another; ``current`` are the states of lanes."""
        lists = [
            (t.symbols.tolist(), t.frequencies.tolist(), np.cumsum(t.frequencies).tolist())
            for t in self._tables
        ]
        choice = [0] * coded if self._contexts is None else self._contexts[:coded].tolist()
        following = self._following.tolist()
        machines, stride, half, odd = [0] * self._stride, self._stride, self._half, self._odd
        out, at, place, lanes, slot_mask = [0] * coded, 0, 0, len(current), (1 << precision) - 1
        for index in range(coded):
            machine = machines[place]
            symbols, frequencies, ends = lists[choice[index] + half * (machine & 1)]
            state = current[index % lanes]
            slot = state & slot_mask
            rank = bisect_right(ends, slot)
            symbol = out[index] = symbols[rank]
            machines[place] = following[2 * machine + ((symbol ^ odd) & 1)]
            place = place + 1 if place + 1 < stride else 0
            share = frequencies[rank]
            state = share * (state >> precision) + slot - ends[rank] + share
            if state < LOW:
                if at == len(source):
                    raise CodingError("the payload has too few words")
                state = (state << 16) | source[at]
                at += 1
            current[index % lanes] = state
        if at != len(source):
            raise CodingError("the payload has too many words")
        self._machines[:] = machines
        return out

    def rows(
        self,
        state: NDArray[np.int64],
        source: NDArray[np.uint16],
        slots: tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]],
        out: NDArray[Any],
        precision: int,
    ) -> None:
        """All of ``out``, a turn of the lanes at a time; ``state`` is overwritten.

        Args:
            state: of the lanes, which are no more than the stride.
            source: words.
            slots: symbol, frequency and place of every slot, table after table.
            out: whole turns.
            precision: frequencies sum to ``2**precision``.
        """
        symbol_of, share_of, place_of = slots
        at, lanes, mask = 0, len(state), (1 << precision) - 1
        second = self._half << precision
        for begin in range(0, len(out), lanes):
            turn = slice(begin, begin + lanes)
            slot = (state & mask) + second * self._ahead(begin, lanes)
            if self._contexts is not None:
                slot += self._contexts[turn].astype(np.int64) << precision
            symbols = symbol_of.take(slot, out=out[turn])
            self._advance(begin, symbols)
            state >>= precision
            state *= share_of.take(slot)
            state += place_of.take(slot)
            empty = (state < LOW).nonzero()[0]
            if taken := len(empty):
                if at + taken > len(source):
                    raise CodingError("the payload has too few words")
                state[empty] = (state[empty] << 16) | source[at : at + taken]
                at += taken
        if at != len(source):
            raise CodingError("the payload has too many words")

    def tail(self, ranks: NDArray[np.int64], out: NDArray[Any]) -> None:
        """The last symbols of ``out``, from their ranks."""
        most = max(len(table.symbols) for table in self._tables)
        sizes = np.array([len(table.symbols) for table in self._tables])
        symbols = np.zeros((len(self._tables), most), np.int64)
        for row, table in zip(symbols, self._tables, strict=True):
            row[: len(table.symbols)] = table.symbols
        first = len(out) - len(ranks)
        for begin in range(first, len(out), self._stride):
            turn = slice(begin, min(begin + self._stride, len(out)))
            here = ranks[turn.start - first : turn.stop - first]
            which = self._half * self._ahead(begin, len(here))
            if self._contexts is not None:
                which += self._contexts[turn]
            if (here >= sizes[which]).any():
                raise CodingError("the last symbols are out of range")
            out[turn] = symbols[which, here]
            self._advance(begin, out[turn])

    def _ahead(self, begin: int, count: int) -> NDArray[np.int64]:
        """The quantizers of ``count`` symbols, at most a stride of them."""
        place = begin % self._stride
        found = self._machines[place : place + count]
        if len(found) < count:
            found = np.concatenate([found, self._machines[: count - len(found)]])
        return (found & 1).astype(np.int64)

    def _advance(self, begin: int, symbols: NDArray[Any]) -> None:
        """Tell the machines what the symbols from ``begin`` on were."""
        place, count = begin % self._stride, len(symbols)
        parity = (symbols.astype(np.int64) ^ self._odd) & 1
        here = min(count, self._stride - place)
        for where, part in (
            (slice(place, place + here), parity[:here]),
            (slice(count - here), parity[here:]),
        ):
            if len(part):
                state = self._machines[where].astype(np.int64)
                self._machines[where] = self._following.take(2 * state + part)
