"""An archive that is read over a network, a few ranges of its bytes at a time."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeGuard

from dither.core import ArchiveError
from dither.terminal import printable

AHEAD = 8 << 20
"""Bytes of neighbouring tensors that are asked for at once, where all are wanted."""

FIRST = 1 << 16
"""Bytes at the end that are asked for first: most indices are smaller, and some files."""

_PIECE = 32 << 20
"""Most bytes of one request: servers and clients give up on what takes minutes."""

_MARKS = frozenset(
    [
        "size",
        "etag",
        "last-modified",
        "lastmodified",
        "content-md5",
        "digest",
        "md5",
        "md5hash",
        "sha256",
        "mtime",
        "generation",
        "version_id",
        "versionid",
        "partial",
    ]
)
"""By what file systems tell one state of a file from another, as far as each knows them."""

_PRECONDITION_FAILED = 412


def is_url(path: object) -> TypeGuard[str]:
    """Whether a path names something elsewhere: ``https://``, ``s3://``, ``hf://`` and so on.

    >>> is_url("https://example.org/model.dither"), is_url("C:/model.dither")
    (True, False)
    """
    return isinstance(path, str) and "://" in path


class RemoteSource:
    """A file behind a URL, of which ranges are asked for.

    Reading is safe from several threads, which take turns, and from processes that were forked
    after opening, which connect anew; so do copies and pickles. No answer is kept but what
    :meth:`bringing` holds, and a small file.

    Args:
        url: of any kind that fsspec knows.

    Raises:
        ArchiveError: fsspec, or what it needs for this kind of URL, is not installed; the size is
            not known; the server does not answer ranges.
        OSError: the server cannot be reached, or refuses.
    """

    ahead = AHEAD

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.RLock()
        self._held: tuple[tuple[int, bytes], ...] = ()
        self._connect()

    def _connect(self) -> None:
        self._process = os.getpid()
        try:
            core: Any = importlib.import_module("fsspec.core")
            self._system, self._path = core.url_to_fs(self._url)
        except ImportError as error:
            raise ArchiveError(
                f"to read {self._shown}, install dither[remote] ({error}); or download the file "
                "and open it by its path"
            ) from error
        except ValueError as error:
            raise ArchiveError(f"{self._shown} is no URL that fsspec knows: {error}") from error
        self._marks = self._now()
        if self._marks.get("partial") is False:
            raise self._without_ranges()
        if not isinstance(self._marks.get("size"), int):
            raise ArchiveError(
                f"the server does not say how large {self._shown} is; download it instead"
            )
        self.size: int = self._marks["size"]
        self._file = self._system.open(self._path, "rb", cache_type="none", **self._settings())
        if self.size <= FIRST:
            self._held = ((0, self.read(0, self.size)),)

    def _settings(self) -> dict[str, object]:
        """What to ask a web server for beside the range: these bytes as they are, of this state."""
        if "http" not in self._system.protocol:
            return {}
        headers = {**self._system.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
        tag = str(self._marks.get("etag", "W/"))
        if not tag.startswith("W/"):  # weak ones match nothing
            headers["If-Match"] = tag
        return {"size": self.size, "headers": headers}

    def _now(self) -> dict[str, Any]:
        """What is known of the file's state."""
        try:
            found: Mapping[str, Any] = self._system.info(self._path)
        except OSError:
            raise
        except Exception as error:  # clients have exceptions of their own
            raise OSError(f"{self._shown} cannot be read: {_said(error)}") from error
        return {key.lower(): value for key, value in found.items() if key.lower() in _MARKS}

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on.

        Raises:
            ArchiveError: the file has changed, or the answer is not what was asked for.
            OSError: the server cannot be reached, or refuses.
        """
        for begin, data in self._held:
            if begin <= offset and offset + length <= begin + len(data):
                return data[offset - begin : offset - begin + length]
        end = offset + length
        starts = range(offset, end, _PIECE)
        pieces = [self._fetch(start, min(start + _PIECE, end)) for start in starts]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _fetch(self, begin: int, end: int) -> bytes:
        with self._lock:
            if self._process != os.getpid():  # the connection is the parent's
                marks = self._marks
                self._connect()
                self._refuse_others(marks)
            try:
                self._file.seek(begin)
                data = bytes(self._file.read(end - begin))
            except Exception as error:
                self._explain(error, begin, end)
                raise
        if len(data) != end - begin:
            self.check_unchanged()
            raise ArchiveError(
                f"the server sent {len(data)} bytes of {self._shown} where {end - begin} from byte "
                f"{begin} on were asked for; try again, or download the file"
            )
        return data

    def _explain(self, error: Exception, begin: int, end: int) -> None:
        """Raise what an error of the client's means."""
        is_changed = getattr(error, "status", None) == _PRECONDITION_FAILED
        if is_changed:
            raise self._changed() from error
        if isinstance(error, ValueError) and "range requests" in str(error):
            raise self._without_ranges() from error
        self.check_unchanged()
        if not isinstance(error, OSError):
            raise OSError(
                f"reading bytes {begin} to {end} of {self._shown} failed: {_said(error)}"
            ) from error

    @contextmanager
    def bringing(self, begin: int, end: int) -> Iterator[None]:
        """Ask for a range at once, and read from it within the block."""
        if any(b <= begin and end <= b + len(data) for b, data in self._held) or begin >= end:
            yield
            return
        held = begin, self.read(begin, end - begin)
        with self._lock:
            self._held = (*self._held, held)
        try:
            yield
        finally:
            with self._lock:
                self._held = tuple(other for other in self._held if other is not held)

    def check_unchanged(self) -> None:
        """See that the file is the one that was opened, as far as the server tells.

        Raises:
            ArchiveError: it is another.
        """
        with suppress(OSError):
            self._refuse_others(self._now())

    def _refuse_others(self, marks: Mapping[str, Any]) -> None:
        if marks != self._marks:
            raise self._changed()

    def _changed(self) -> ArchiveError:
        return ArchiveError(f"{self._shown} has changed since it was opened; open it again")

    def _without_ranges(self) -> ArchiveError:
        return ArchiveError(
            f"the server does not answer requests for a part of {self._shown}; download the file, "
            "and open it by its path"
        )

    @property
    def _shown(self) -> str:
        """The URL, without what may be secret."""
        return repr(printable(self._url.partition("?")[0]))

    def close(self) -> None:
        """End reading."""
        self._file.close()

    def __reduce__(self) -> tuple[object, ...]:
        """By URL, with the state that the file had."""
        return _reopened, (self._url, self._marks)


def _reopened(url: str, marks: Mapping[str, Any]) -> RemoteSource:
    source = RemoteSource(url)
    source._refuse_others(marks)  # noqa: SLF001 - its own kind
    return source


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
