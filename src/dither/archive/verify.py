"""Check every byte of an archive."""

from __future__ import annotations

import os

from dither.archive.reader import Archive, BaseSource
from dither.core import ArchiveError
from dither.progress import steps


def verify(
    path: str | os.PathLike[str], max_nbytes: int | None = None, base: BaseSource | None = None
) -> list[str]:
    """Read and decode everything in an archive; returns what is wrong, nothing if all is well.

    Args:
        path: the file.
        max_nbytes: most memory for one tensor, see :meth:`Archive.open`. All tensors together, one
            after the other, may take as much, or what is usual for a file of that size.
        base: what its tensors rest on, where it stores differences. Without, these are checked by
            themselves.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        archive = Archive.open(path, max_nbytes, base)
    except ArchiveError as error:
        return [str(error)]
    faults = []
    with archive:
        try:
            archive.check_total()
        except ArchiveError as error:
            return [str(error)]
        entries = archive.entries
        for name in steps("checking", entries, lambda name: entries[name].decoded_nbytes):
            try:
                archive.stored(name) if base is None else archive[name]
            except ArchiveError as error:
                faults.append(str(error))
    return faults
