"""The ``.dither`` file: writer, lazy reader, verification. ``docs/FORMAT.md`` specifies it."""

from dither.archive.atomic import atomic_write
from dither.archive.base import Base, content_hash, resting
from dither.archive.layout import Entry, Part
from dither.archive.load import Loaded, load, load_into, load_weights
from dither.archive.reader import Archive, BaseSource, base_of
from dither.archive.source import WRAPPER_NBYTES, is_archive, wrapper
from dither.archive.table import describe
from dither.archive.verify import verify
from dither.archive.writer import (
    ArchiveWriter,
    CodedPart,
    CodedTensor,
    Payload,
    code,
    pack,
    pack_into,
    packed_nbytes,
    write,
)

__all__ = [
    "WRAPPER_NBYTES",
    "Archive",
    "ArchiveWriter",
    "Base",
    "BaseSource",
    "CodedPart",
    "CodedTensor",
    "Entry",
    "Loaded",
    "Part",
    "Payload",
    "atomic_write",
    "base_of",
    "code",
    "content_hash",
    "describe",
    "is_archive",
    "load",
    "load_into",
    "load_weights",
    "pack",
    "pack_into",
    "packed_nbytes",
    "resting",
    "verify",
    "wrapper",
    "write",
]
