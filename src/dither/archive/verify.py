"""Check every byte of an archive."""

from __future__ import annotations

import os

from dither.archive.reader import Archive, BaseSource
from dither.core import ArchiveError
from dither.progress import steps


def verify(
    path: str | os.PathLike[str], max_nbytes: int | None = None, base: BaseSource | None = None
) -> list[str]:
    """Read and decode everything in an archive; returns a list of faults, empty if there are none.

    Args:
        path: the file.
        max_nbytes: a limit on the memory of one tensor: see :meth:`Archive.open`. All tensors
            together, one after the other, may take as much, or what is usual for a file of that
            size.
        base: the weights that the file stores differences to, if it does. Without it, the
            differences alone are checked.

    Raises:
        OSError: the file cannot be read.

    >>> import tempfile, torch
    >>> import dither
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dither.compress({"w": torch.randn(64, 64)}, size="2kB").save(f"{folder}/w.dither")
    ...     verify(f"{folder}/w.dither")
    []
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
