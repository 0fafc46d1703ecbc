"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

UNFINISHED: set[Path] = set()
"""Temporary files there are now, for a process that ends without waiting for its threads."""

_NAMED = 40
"""Characters of a file's name in that of its temporary file: systems take 255 bytes at most."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``; rename it to ``path`` when the block succeeds.

    A symbolic link is followed. Until then an existing file stays as it was, whatever happens: an
    exception removes the temporary file, a killed process leaves it under a name of its own. A file
    that is replaced keeps its permissions; a new one has those that the process gives new files.

    Raises:
        OSError: the folder cannot be written to.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{target} is no regular file: write to a file's path")
    mode = target.stat().st_mode & 0o777 if target.exists() else None
    # The system takes the process's mask off: asking for it would change it for all threads.
    handle, temporary = _create(target, 0o666 if mode is None else mode)
    UNFINISHED.add(temporary)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            temporary.chmod(mode)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        UNFINISHED.discard(temporary)


def _create(target: Path, mode: int) -> tuple[int, Path]:
    """A new file in the folder of ``target``, open for writing."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        name = f".{target.name[:_NAMED]}.{secrets.token_hex(6)}.tmp"
        temporary = target.with_name(name)
        try:
            return os.open(temporary, flags, mode), temporary
        except FileExistsError:
            continue
