"""What decoding takes, counted before it is taken: a file may declare anything."""

from __future__ import annotations

import math
from collections.abc import Collection

from dither.archive.layout import Entry
from dither.coding import coder_nbytes
from dither.core import DTYPES, ArchiveError, code_dtype

LEAST_LIMIT = 1 << 32
LIMIT_RATIO = 256
"""Without ``max_nbytes``, decoding may take 4 GiB or 256 times the file, whichever is more."""
MULTIPLICATIONS = 128
"""Most for each byte of ``max_nbytes``, beyond a few for each value: it bounds the time."""


def default_limit(size: int) -> int:
    """Most memory for a file of ``size`` bytes of which nothing else is said."""
    return max(LEAST_LIMIT, LIMIT_RATIO * size)


def working_nbytes(entry: Entry) -> int:
    """Bytes that decoding a tensor takes at its peak, itself included.

    All of its parts, and either what the coder of one part needs or the tensor: formats decode it
    a box at a time.
    """
    parts, coder = 0, 0
    for part in entry.parts:
        count = math.prod(part.shape)
        dtype = code_dtype(part.alphabet) if part.alphabet else DTYPES[part.dtype or "uint8"]
        parts += count * dtype.itemsize
        own = 0
        if part.codec == "rans":
            own = coder_nbytes(part.shape) if part.alphabet else count
        coder = max(coder, part.length + own)
    return parts + max(coder, entry.decoded_nbytes)


def multiplications(entry: Entry) -> int:
    """Multiplications that decoding a tensor takes, beyond a few for each value."""
    parts = {part.name: part.shape for part in entry.parts}
    return entry.format.multiplications(parts) if parts else 0


def check_memory(entries: Collection[Entry], max_nbytes: int) -> None:
    """Refuse what decoding, and keeping, all of some tensors would take too much for.

    Raises:
        ArchiveError: more memory than ``max_nbytes``, or multiplications than go with it.
    """
    kept = sum(entry.decoded_nbytes for entry in entries)
    beside = max((working_nbytes(e) - e.decoded_nbytes for e in entries), default=0)
    work = sum(map(multiplications, entries))
    for need, most, what in (
        (kept + beside, max_nbytes, "bytes, more than"),
        (work, MULTIPLICATIONS * max_nbytes, f"multiplications, over {MULTIPLICATIONS} *"),
    ):
        if need > most:
            raise ArchiveError(
                f"decoding would take {need} {what} max_nbytes={max_nbytes}; if you "
                "trust the file, open it with a larger max_nbytes"
            )


def check_all(entries: Collection[Entry], max_nbytes: int, size: int) -> None:
    """Refuse to read all tensors of a file, one after the other, if that takes too much.

    Raises:
        ArchiveError: it takes more than ``max_nbytes``, and than is usual for a file of that size.
    """
    most = max(max_nbytes, default_limit(size))
    work = sum(map(multiplications, entries)) // MULTIPLICATIONS
    need = max(sum(map(working_nbytes, entries)), work)
    if need > most:
        raise ArchiveError(
            f"reading all tensors would take {need} bytes, or the time for as many, where {most} "
            f"are usual for a file of {size} bytes; if you trust it, allow more with max_nbytes"
        )
