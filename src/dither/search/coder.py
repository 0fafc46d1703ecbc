"""Carries choices out, or remembers what came of it in an earlier process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from weakref import ref

import torch
from torch import Tensor

from dither.archive import CodedTensor, code, pack
from dither.core import Encoded, Stats
from dither.encoders.outputs import PIECE
from dither.search.journal import Journal
from dither.search.knowledge import Choice, Knowledge, keep_all
from dither.search.ladder import Ladder
from dither.search.proposers import PROPOSERS, Stored
from dither.search.sensitivity import facts_of

PROBE = 6
"""One row of so many of a large tensor is coded first."""

_PROPOSERS = {repr(proposer): proposer for proposer in (*PROPOSERS, Stored(torch.float16))}
"""Those that can be written down."""


class Coder:
    """Predicts and codes tensors, one at a time.

    With a journal, results are looked up there first, and payloads are on disk. Each is found by a
    digest of all that it depends on: values, what is known of them, and the choice.

    Args:
        journal: of the job, if there is one.
        release: gives back the memory of files that tensors show, after each that was looked at.
    """

    def __init__(
        self, journal: Journal | None = None, release: Callable[[], None] = keep_all
    ) -> None:
        self.release = release
        self._journal = journal
        self._digests: dict[int, tuple[ref[Tensor], bytes]] = {}

    def facts(self, value: Tensor) -> tuple[bool, float]:
        """What :func:`~dither.search.sensitivity.facts_of` finds."""
        journal = self._kept()
        if journal is None:
            return facts_of(value)
        key = _digest_of("facts", self._digest(value))
        found: tuple[bool, float] | None = journal.recall(key)
        if found is None:
            found = facts_of(value)
            journal.note(key, found)
        return found

    def ladder(self, known: Knowledge) -> Ladder:
        """All choices worth taking."""
        journal = self._kept()
        if journal is None:
            return self._predicted(known)
        key = self._key("ladder", known)
        said = journal.recall(key)
        if said is not None:
            rows = ((nbytes, loss, _PROPOSERS[who], *rest) for nbytes, loss, who, *rest in said)
            return Ladder(tuple(Choice(*row) for row in rows))
        ladder = self._predicted(known)
        said = [
            (float(c.nbytes), float(c.loss), repr(c.proposer), c.step, c.fed)
            for c in ladder.choices
        ]
        if all(row[2] in _PROPOSERS for row in said):
            journal.note(key, said)
        return ladder

    def probe(self, known: Knowledge, choice: Choice) -> int:
        """Bytes of every :data:`PROBE`-th row."""
        journal = self._kept()
        key = b"" if journal is None else self._key("probe", known, choice)
        nbytes: int | None = None if journal is None else journal.recall(key)
        if nbytes is None:
            nbytes = self._coded(known.every(PROBE), choice).nbytes
            if journal is not None:
                journal.note(key, nbytes)
        return nbytes

    def code(self, known: Knowledge, choice: Choice) -> CodedTensor:
        """A whole tensor."""
        journal = self._kept()
        found = None if journal is None else journal.recall_coded(self._key("code", known, choice))
        if found is not None:
            return found
        coded = self._coded(known, choice)
        journal = self._kept(coded.nbytes)
        return coded if journal is None else journal.keep(self._key("code", known, choice), coded)

    def remembered(
        self, what: str, depends: Sequence[object], make: Callable[[], Encoded]
    ) -> tuple[Encoded, CodedTensor]:
        """An encoding of any kind, and the same coded.

        Args:
            what: it is.
            depends: all that it depends on: tensors, statistics, and what its ``repr`` tells.
            make: makes it.
        """
        journal = self._kept()
        key = b"" if journal is None else _digest_of(what, *depends)
        coded = None if journal is None else journal.recall_coded(key)
        if coded is not None:
            return pack({what: coded}).encoded(what), coded
        encoded = make()
        coded = code(encoded)
        return encoded, coded if journal is None else journal.keep(key, coded)

    def _kept(self, nbytes: int = 0) -> Journal | None:
        journal = self._journal
        return journal if journal is not None and journal.is_kept(nbytes) else None

    def _predicted(self, known: Knowledge) -> Ladder:
        ladder = Ladder.of(known)
        self.release()
        return ladder

    def _coded(self, known: Knowledge, choice: Choice) -> CodedTensor:
        encoded = choice.encode(known)
        self.release()
        coded = code(encoded)
        self.release()  # what is stored as it is was read again
        return coded

    def _key(self, what: str, known: Knowledge, choice: Choice | None = None) -> bytes:
        """A digest of all that a result depends on."""
        digest = hashlib.sha256()
        for tensor in (known.value, known.rows, known.gram, known.axes):
            digest.update(b"none" if tensor is None else self._digest(tensor))
        numbers = (float(known.sensitivity), known.coarsest, known.least)
        chosen = None if choice is None else (choice.proposer, choice.step, choice.fed)
        digest.update(repr((what, numbers, known.proposers, chosen)).encode())
        self.release()
        return digest.digest()

    def _digest(self, tensor: Tensor) -> bytes:
        """Of shape, type and values; taken once, since nobody changes them meanwhile."""
        owner, found = self._digests.get(id(tensor), (None, b""))
        if owner is not None and owner() is tensor:
            return found
        found = _digest_of(tensor)
        self._digests[id(tensor)] = ref(tensor), found
        return found


def _digest_of(*values: object) -> bytes:
    """A digest of tensors, of statistics, and of what else is told by its ``repr``."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Stats):
            digest.update(_digest_of(*vars(value).values()))
        elif isinstance(value, Tensor):
            digest.update(repr((tuple(value.shape), value.dtype)).encode())
            for part in value.detach().reshape(-1).split(PIECE):
                flat = part.contiguous() if part.stride() == (1,) else part.clone()
                digest.update(flat.view(torch.uint8).numpy())
        else:
            digest.update(repr(value).encode())
        digest.update(b";")
    return digest.digest()
