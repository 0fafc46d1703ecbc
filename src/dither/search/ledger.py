"""Exact bytes of a file while its tensors are chosen."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from dither.archive import Archive, Base, CodedTensor, pack, pack_into, packed_nbytes, write
from dither.disk import Disk
from dither.search.differences import Differences
from dither.search.knowledge import Choice
from dither.search.predict import GRID_INDEX_NBYTES


class Ledger:
    """What each tensor takes, as chosen and coded, and what that leaves of a budget.

    Args:
        names: of all tensors, in the order of the file.
        aliases: further names of tied tensors.
        metadata: of the file.
        differences: of those that rest on a base, if there is one.
    """

    def __init__(
        self,
        names: Iterable[str],
        aliases: Mapping[str, str],
        metadata: Mapping[str, Any],
        differences: Differences | None = None,
    ) -> None:
        own = tuple(names)
        same = frozenset() if differences is None else differences.same
        self._order = own
        self.names = tuple(name for name in own if name not in same)
        self.all_names = (*own, *aliases)
        self.aliases, self._metadata, self._differences = aliases, metadata, differences
        self._rows: dict[str, tuple[Choice, CodedTensor]] = {}

    def put(self, name: str, choice: Choice, coded: CodedTensor) -> float:
        """Take a tensor, in place of what it was before; returns what :meth:`measured` does."""
        self._rows[name] = (choice, coded)
        return self.measured(name)

    def clear(self) -> None:
        """Take everything back."""
        self._rows.clear()

    def rows(self) -> Mapping[str, tuple[Choice, CodedTensor]]:
        """All that it holds, as it is now: for :meth:`restore`."""
        return dict(self._rows)

    def restore(self, rows: Mapping[str, tuple[Choice, CodedTensor]]) -> None:
        """Hold again what it held."""
        self._rows = dict(rows)

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def choice(self, name: str) -> Choice:
        """What was chosen for a tensor."""
        return self._rows[name][0]

    def coded(self, name: str) -> CodedTensor:
        """A tensor as the file holds it."""
        return self._rows[name][1]

    def measured(self, name: str) -> float:
        """Bytes of a tensor that depend on its choice: payloads, and what a grid adds to the index.

        They are what :class:`~dither.search.ladder.Ladder` predicts.
        """
        choice, coded = self._rows[name]
        return coded.nbytes + (GRID_INDEX_NBYTES if choice.step is not None else 0.0)

    @property
    def nbytes(self) -> int:
        """The exact size of the file."""
        return packed_nbytes(self._ordered(), self.aliases, self._metadata, base=self._base)

    @property
    def overhead(self) -> float:
        """Bytes that depend on no choice."""
        return self.nbytes - sum(self.measured(name) for name in self._rows)

    @property
    def expected_overhead(self) -> float:
        """The same before any tensor was coded, about."""
        return 64 + sum(14 + len(name) / 4 for name in self.all_names)

    def decoded(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Names and values of some tensors, as the file would hold them, one after another."""
        return ((name, pack({name: self.coded(name)})[name]) for name in names)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file, one tensor after the other."""
        write(path, self._ordered(), self.aliases, self._metadata, base=self._base)

    def archive(self, disk: Disk | None = None) -> Archive:
        """The file, in memory or, where nothing rests on a base, on a disk."""
        what = self._ordered(), self.aliases, self._metadata
        if disk is None or self._base is not None:
            return pack(*what, base=self._base)
        return pack_into(disk.memory, *what)

    @property
    def _base(self) -> Base | None:
        return None if self._differences is None else self._differences.base

    def _ordered(self) -> dict[str, CodedTensor]:
        held = {name: self._rows[name][1] for name in self.names if name in self._rows}
        return held if self._differences is None else self._differences.placed(held, self._order)
