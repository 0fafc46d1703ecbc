"""Check every byte of an archive."""

from __future__ import annotations

import os

from dither.archive.reader import (
    MULTIPLICATIONS,
    Archive,
    default_limit,
    multiplications,
    working_nbytes,
)
from dither.core import ArchiveError


def verify(path: str | os.PathLike[str], max_nbytes: int | None = None) -> list[str]:
    """Read and decode everything in an archive; returns what is wrong, nothing if all is well.

    Args:
        path: the file.
        max_nbytes: most memory for one tensor, see :meth:`Archive.open`. All tensors together, one
            after the other, may take as much, or what is usual for a file of that size.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        archive = Archive.open(path, max_nbytes)
    except ArchiveError as error:
        return [str(error)]
    faults = []
    with archive:
        if fault := _too_much(archive):
            return [fault]
        for name in archive.entries:
            try:
                archive[name]
            except ArchiveError as error:
                faults.append(str(error))
    return faults


def _too_much(archive: Archive) -> str | None:
    """What makes reading all tensors take hours, where a small file says that they are vast."""
    most = max(archive.max_nbytes, default_limit(archive.nbytes))
    entries = archive.entries.values()
    need = max(
        sum(map(working_nbytes, entries)), sum(map(multiplications, entries)) // MULTIPLICATIONS
    )
    if need <= most:
        return None
    return (
        f"reading all tensors would take {need} bytes, or the time for as many, where {most} are "
        f"usual for a file of {archive.nbytes} bytes; if you trust it, allow more with max_nbytes"
    )
