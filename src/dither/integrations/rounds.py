"""Models that change from round to round, known exactly at both ends: each file rests on the last.

A sender has a :class:`Line` of files, and receivers take up those that they lack. Both hold the
model as the last file has it, named by the hash of its content; what the files lose is made up for
by the next.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dither.archive import Archive, Base, atomic_write, content_hash, pack
from dither.core import ArchiveError
from dither.formats import Raw
from dither.search import compress

State = dict[str, Tensor]

_ROOM = 1 << 26


@dataclass
class Line:
    """Files of one model, of which each rests on the one before.

    Attributes:
        size: of each file but the first: bytes, or as text.
        first: of the first; None: all values as they are.
        files: by the hash of the model that they make, in order.
        model: as the last of them has it; None before the first.
    """

    size: int | str
    first: int | str | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    model: State | None = None
    _wanted: str = ""
    _whole: tuple[str, bytes] = ("", b"")

    @property
    def digest(self) -> str:
        """The hash of the model as it is now; empty before the first."""
        return next(reversed(self.files), "")

    def advance(self, wanted: Mapping[str, Tensor]) -> State:
        """Come as near to a model as a file allows; what receivers then have."""
        digest = content_hash(wanted)
        if self.model is None or digest != self._wanted:
            base = None if self.model is None else Base.of(self.model)
            archive = whole(wanted) if base is None and self.first is None else None
            if archive is None:
                archive = compress(wanted, self.size if base else self.first or 0, base=base)
            self.model = archive.state_dict()
            self.files[content_hash(self.model)] = archive.to_bytes()
            self._wanted = digest
        return self.model

    def since(self, digest: str | None) -> list[bytes]:
        """The files that make the model for whoever has it as some hash says; all, or whole.

        Args:
            digest: of what a receiver has; None or unknown: nothing.
        """
        hashes = list(self.files)
        begin = hashes.index(digest) + 1 if digest in self.files else 0
        files = [self.files[key] for key in hashes[begin:]]
        nbytes = sum(map(len, files))
        if self.model is None or nbytes <= _least(self.model):
            return files
        if self._whole[0] != self.digest:
            self._whole = self.digest, whole(self.model).to_bytes()
        return [self._whole[1]] if len(self._whole[1]) < nbytes else files

    def save(self, folder: Path) -> None:
        """Keep what is needed to go on: the files, and which model they were to come near to."""
        for number, data in enumerate(self.files.values()):
            path = folder / f"{number}.dither"
            if not path.is_file() or path.stat().st_size != len(data):
                with atomic_write(path) as file:
                    file.write(data)
        about = json.dumps({"hashes": list(self.files), "wanted": self._wanted}).encode()
        with atomic_write(folder / "line.json") as file:
            file.write(about)

    def load(self, folder: Path) -> None:
        """Go on from what :meth:`save` kept.

        Raises:
            ArchiveError: a file is damaged, or lacks.
        """
        about = json.loads((folder / "line.json").read_text(encoding="utf-8"))
        hashes = [str(digest) for digest in about["hashes"]]
        files = [(folder / f"{number}.dither").read_bytes() for number in range(len(hashes))]
        self.model = follow(None, files, hashes[-1])
        self.files = dict(zip(hashes, files, strict=True))
        self._wanted = str(about["wanted"])


def whole(model: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> Archive:
    """All values as they are, and what is to be noted."""
    encoded = {name: Raw().encode(value.detach().cpu()) for name, value in model.items()}
    return pack(encoded, metadata=metadata)


def follow(model: Mapping[str, Tensor] | None, files: Sequence[bytes], digest: str) -> State:
    """The model that files make of another, or of nothing.

    Args:
        model: what the first file rests on, if it does.
        files: in order.
        digest: what comes of it.

    Raises:
        ArchiveError: a file is damaged, rests on another model, or makes another.
    """
    state = None if model is None else dict(model)
    for data in files:
        archive = Archive.from_bytes(data)
        if archive.base is not None:
            if state is None:
                raise ArchiveError(f"the model {archive.base}, on which a file rests, is not here")
            archive = Archive.from_bytes(data, base=state)
        state = archive.state_dict()
    found = "" if state is None else content_hash(state)
    if state is None or found != digest:
        raise ArchiveError(f"the files make the model {found or 'none'}, not {digest}")
    return state


def update(before: Mapping[str, Tensor], after: Mapping[str, Tensor], size: int | str) -> bytes:
    """What training made of a model, as a file that rests on it."""
    return compress(after, size, base=Base.of(before)).to_bytes()


def updated(before: Mapping[str, Tensor], data: bytes) -> State:
    """What :func:`update` says, from somebody who may send anything.

    Raises:
        ArchiveError: the file is damaged, rests on another model, has other tensors, or numbers
            that are not finite.
    """
    nbytes = sum(value.nbytes for value in before.values())
    archive = Archive.from_bytes(data, 16 * nbytes + _ROOM, base=Base.of(before))
    entries = {name: archive.entries[archive.aliases.get(name, name)] for name in archive}
    found = {name: (entry.shape, entry.dtype) for name, entry in entries.items()}
    kinds = {n: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for n, v in before.items()}
    if found != kinds:
        raise ArchiveError("the update has other tensors than the model: names, shapes or types")
    state = archive.state_dict()
    for name, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ArchiveError(f"the update has numbers in {name!r} that are not finite")
    return state


def moved(
    model: Mapping[str, Tensor], sent: Mapping[str, Tensor], back: Mapping[str, Tensor]
) -> State:
    """A model after a round: the change of what was sent to what came back is made in it.

    So is what a file lost on the way to the clients made up for by the next.
    """
    return {
        name: value + (back[name].to(value.dtype) - sent[name].to(value.dtype))
        if value.is_floating_point()
        else back[name].to(value.dtype)
        for name, value in model.items()
    }


def _least(model: Mapping[str, Tensor]) -> int:
    """Bytes below which all values as they are hardly get."""
    return sum(value.nbytes for value in model.values()) // 2
