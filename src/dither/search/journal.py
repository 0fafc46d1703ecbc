"""What a long job has done so far, beside its output: after an interruption it goes on from there.

A journal is one file that only grows. Its first entry says of what job it is; each of the others
has a key, a description in JSON, and payloads. What a killed process left half written at the end
is cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from dither.archive.source import FileSource
from dither.archive.writer import CodedPart, CodedTensor, Payload
from dither.coding import crc32
from dither.core import ArchiveError, DitherError
from dither.formats import format_from_json, format_to_json
from dither.terminal import printable

if sys.platform != "win32":
    import fcntl

PATIENCE = 5.0
"""Seconds of work from which on a journal is kept: what takes less is sooner done again."""

ROOM = 1 << 26
"""Bytes of payloads that are kept in memory before a journal is."""

SYNC = 10.0
"""Seconds of work, about, that are lost when the machine fails, and not this process alone."""

_HEAD = struct.Struct("<4s32sIQI")
"""Mark, key, lengths of description and payloads, CRC-32 of the key and the description."""

_MARK = b"DJ\x01\n"
_SMALL = 256
"""Bytes up to which a payload stays in memory, too."""


class _Place(NamedTuple):
    """Where an entry's payloads begin, and what is said of them."""

    offset: int
    said: Any


class Journal:
    """Remembers what was computed, by keys that say all that it depends on.

    Nothing is on disk before :data:`PATIENCE` or :data:`ROOM` is used up, unless an earlier process
    has left a journal of the same job.

    Args:
        path: of the journal.
        job: what the results depend on, JSON values; a journal of another job is not used, with a
            warning.

    Attributes:
        path: the same.
        resumed: entries that an earlier process has left.
    """

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        self.path = path
        self._job, self._places = dict(job), dict[bytes, _Place]()
        self._lock, self._start, self._held = threading.RLock(), time.monotonic(), 0
        self._file: Any = None
        self._synced = 0.0
        if path.exists():
            self._open()
        self.resumed = len(self._places)

    def is_kept(self, nbytes: int = 0) -> bool:
        """Whether results are written down from now on.

        Args:
            nbytes: that were computed since the last question, and kept in memory.

        Raises:
            OSError: the journal cannot be written.
        """
        with self._lock:
            self._held += nbytes
            is_due = time.monotonic() - self._start > PATIENCE or self._held > ROOM
            if self._file is None and is_due and self._start:
                self.path.touch()  # another process may have begun one meanwhile
                self._open()
            return self._file is not None

    def recall(self, key: bytes) -> Any:  # noqa: ANN401 - JSON
        """What was said under a key; None if there is nothing."""
        place = self._places.get(key)
        return None if place is None else place.said

    def note(self, key: bytes, said: Any) -> None:  # noqa: ANN401 - JSON
        """Write down JSON values under a key."""
        self._append(key, said, b"")

    def recall_coded(self, key: bytes) -> CodedTensor | None:
        """A tensor that was coded; None if there is none, or the disk has lost it."""
        place = self._places.get(key)
        if place is None:
            return None
        try:
            return self._coded(place, is_new=False)
        except DitherError:
            del self._places[key]
            return None

    def keep(self, key: bytes, coded: CodedTensor) -> CodedTensor:
        """Write a coded tensor down; the same with its payloads on disk."""
        parts = {
            name: [*part[:-1], part.payload.nbytes, part.payload.crc]
            for name, part in coded.parts.items()
        }
        said = [format_to_json(coded.format), coded.shape, coded.dtype, parts]
        data = b"".join(part.payload.read() for part in coded.parts.values())
        return self._coded(self._append(key, json.loads(json.dumps(said)), data), is_new=True)

    def close(self) -> None:
        """Leave it to a later process; nothing more is written down."""
        if self._file is not None:
            self._source.close()
            self._file.close()
            self._file = None
        self._start = 0.0

    def remove(self) -> None:
        """The same where there is nothing left to be done."""
        is_mine = self._file is not None
        self.close()
        if is_mine:
            self.path.unlink(missing_ok=True)

    def _open(self) -> None:
        """Begin a journal, or go on with one that is there, if it is of this job."""
        file = self.path.open("r+b")
        if not _locked(file):
            file.close()
            self._say("is in use by another process; this one works without a journal")
            self._start = 0.0
            return
        self._file, self._source = file, FileSource(self.path)
        self._job |= {"program": program()}
        end, about = self._scan()
        if about is not None and about != json.loads(json.dumps(self._job)):
            self._say("is of another job (other weights, size, settings or program): begun anew")
            end, about = 0, None
        if about is None:
            self._places.clear()
            end = 0
        file.truncate(end)
        file.seek(end)
        if about is None:
            self._append(b"", self._job, b"")

    def _scan(self) -> tuple[int, Any]:
        """Find all entries: where the last whole one ends, and what the first says."""
        size, offset, about = self._source.size, 0, None
        while offset + _HEAD.size <= size:
            head = self._source.read(offset, _HEAD.size)
            mark, key, length, nbytes, crc = _HEAD.unpack(head)
            place = offset + _HEAD.size + length
            if mark != _MARK or place + nbytes > size:
                break
            text = self._source.read(offset + _HEAD.size, length)
            if crc32(head[:-4] + text) != crc:
                break
            said = json.loads(text)
            if offset:
                self._places[key] = _Place(place, said)
            else:
                about = said
            offset = place + nbytes
        return offset, about

    def _append(self, key: bytes, said: Any, data: bytes) -> _Place:  # noqa: ANN401 - JSON
        text = json.dumps(said).encode()
        head = _HEAD.pack(_MARK, key, len(text), len(data), 0)[:-4]
        head += struct.pack("<I", crc32(head + text))
        with self._lock:
            offset = self._file.tell() + len(head) + len(text)
            for piece in (head, text, data):
                self._file.write(piece)
            self._file.flush()
            if time.monotonic() - self._synced > SYNC:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
            place = self._places[key] = _Place(offset, said)
        return place

    def _coded(self, place: _Place, *, is_new: bool) -> CodedTensor:
        """The tensor that an entry describes; one that is not new is read, and may be lost."""
        described, shape, dtype, listed = place.said
        offset, parts = place.offset, {}
        for name, (codec, own, alphabet, kind, nbytes, crc) in listed.items():
            read = partial(self._read, offset, nbytes, crc)
            payload = Payload(nbytes, crc, read)
            if nbytes <= _SMALL:
                payload = Payload.of(read())
            elif not is_new:
                read()
            parts[name] = CodedPart(codec, tuple(own), alphabet, kind, payload)
            offset += nbytes
        return CodedTensor(format_from_json(described), tuple(shape), dtype, parts)

    def _read(self, offset: int, nbytes: int, crc: int) -> bytes:
        data = self._source.read(offset, nbytes)
        if crc32(data) != crc:
            raise ArchiveError(f"{self._named()} is damaged; remove it and begin again")
        return data

    def _named(self) -> str:
        return f"the journal {printable(str(self.path))!r}"

    def _say(self, what: str) -> None:
        warnings.warn(f"{self._named()} {what}", stacklevel=2)


def _locked(file: Any) -> bool:  # noqa: ANN401 - any open file
    """Take a file for this process alone, where the system can; False if another has it."""
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # of file systems without locks
            return True
    return True


@lru_cache(maxsize=1)
def program() -> str:
    """A digest of this program's sources: another version may encode otherwise."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
