"""The layout of a ``.dither`` file, version 1: fixed ends and the index between them.

``docs/FORMAT.md`` is the specification; this module and that page say the same. Nothing here
touches tensors: it turns an :class:`Index` into bytes and hostile bytes into an :class:`Index`
or an :class:`~dither.core.ArchiveError`.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dither.coding import crc32
from dither.core import DTYPES, MAX_ALPHABET, ArchiveError, Format, SpecError
from dither.formats import format_from_json, format_to_json

T = TypeVar("T")

MAGIC = b"\x8dDITHER\x1a"
VERSION = 1
HEAD = struct.Struct("<8sHH")
"""Magic, version, required features."""
TAIL = struct.Struct("<III4s")
"""Index length, its length before compression, CRC-32, end mark."""
END = b"htid"
FEATURES = 0
"""Required-feature bits that this reader understands: none exist in version 1."""

MAX_INDEX_NBYTES = 1 << 28
MAX_DIMENSIONS = 32
MAX_NUMEL = 1 << 46
INLINE_NBYTES = 12
"""Payloads up to this size stand in the index itself: an entry of their own costs more."""


@dataclass(frozen=True)
class Part:
    """One part of a tensor as stored: what it holds, how it is coded and where it lies.

    ``alphabet`` is set for codes and ``dtype`` for numbers. ``inline`` holds the payload of a
    small part; otherwise it lies at ``offset`` in the file and has the CRC-32 ``crc``.
    """

    name: str
    codec: str
    shape: tuple[int, ...]
    alphabet: int | None
    dtype: str | None
    length: int
    crc: int = 0
    offset: int = 0
    inline: bytes | None = None


@dataclass(frozen=True)
class Entry:
    """One tensor as stored."""

    name: str
    format: Format
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def decoded_nbytes(self) -> int:
        """Bytes of the tensor once decoded."""
        return self.numel * DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the payloads in the file; the index is not included."""
        return sum(part.length for part in self.parts)


@dataclass(frozen=True)
class Index:
    """Everything in a file but the payloads.

    ``sites`` is the place of activation encodings, ``base`` that of the archive to which this
    one stores differences; version 1 writers leave both empty.
    """

    entries: tuple[Entry, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sites: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None


def head() -> bytes:
    """The first bytes of every file of this version."""
    return HEAD.pack(MAGIC, VERSION, FEATURES)


def pack_index(index: Index) -> bytes:
    """The index and the end of the file behind it."""
    formats: list[Any] = []
    rows: list[Any] = []
    for entry in index.entries:
        described = format_to_json(entry.format)
        if described not in formats:
            formats.append(described)
        parts = [_part_to_json(part, entry) for part in entry.parts]
        rows.append(
            [entry.name, formats.index(described), entry.dtype, list(entry.shape), *parts]
        )
    document = {"formats": formats, "tensors": rows}
    optional = {
        "aliases": dict(index.aliases),
        "metadata": dict(index.metadata),
        "sites": dict(index.sites),
        "base": index.base,
    }
    document |= {key: value for key, value in optional.items() if value}
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_INDEX_NBYTES:
        raise ArchiveError(
            f"the index of this archive would take {len(text)} bytes, more than "
            f"{MAX_INDEX_NBYTES}; store fewer tensors or less metadata in one archive"
        )
    packed = zlib.compress(text, 9)
    lengths = struct.pack("<II", len(packed), len(text))
    return packed + TAIL.pack(len(packed), len(text), crc32(head() + packed + lengths), END)


def _part_to_json(part: Part, entry: Entry) -> list[Any]:
    shape = 0 if part.shape == entry.shape else list(part.shape)
    holds = part.alphabet if part.alphabet is not None else part.dtype
    if part.inline is not None:
        return [part.name, part.codec, shape, holds, part.inline.hex()]
    return [part.name, part.codec, shape, holds, part.length, part.crc]


def check_head(data: bytes) -> None:
    """Refuse what is no archive, or one that this version cannot read."""
    if len(data) < HEAD.size or data[: len(MAGIC)] != MAGIC:
        raise ArchiveError("not a .dither archive: it does not begin with the archive's mark")
    _, version, features = HEAD.unpack(data[: HEAD.size])
    if version != VERSION:
        raise ArchiveError(
            f"archive version {version} is not {VERSION}, the one this release reads; "
            "upgrade dither"
        )
    if features & ~FEATURES:
        raise ArchiveError(
            f"archive needs features {features:#06x} that this release lacks; upgrade dither"
        )


def unpack_tail(tail: bytes, size: int) -> tuple[int, int, int]:
    """Where the index lies: its offset, its length, and its length before compression."""
    if len(tail) < TAIL.size or size < HEAD.size + TAIL.size:
        raise ArchiveError(f"the archive is cut off: it has {size} bytes")
    packed, raw, _, end = TAIL.unpack(tail[-TAIL.size :])
    if end != END:
        raise ArchiveError("the archive is cut off or damaged: its end mark is missing")
    offset = size - TAIL.size - packed
    if offset < HEAD.size or raw > MAX_INDEX_NBYTES:
        raise ArchiveError(
            f"the archive's end is damaged: an index of {packed} bytes ({raw} unpacked) does "
            f"not fit a file of {size} bytes"
        )
    return offset, packed, raw


def unpack_index(file_head: bytes, packed: bytes, tail: bytes, parts_end: int) -> Index:
    """Check and read the index; ``parts_end`` is where the payloads must end."""
    _, raw, crc, _ = TAIL.unpack(tail)
    if crc32(file_head + packed + tail[:8]) != crc:
        raise ArchiveError("the archive's index is damaged: its checksum does not match")
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(packed, raw + 1)
    except zlib.error as error:
        raise ArchiveError(f"the archive's index is damaged: {error}") from error
    if len(text) != raw or not inflater.eof or inflater.unused_data:
        raise ArchiveError(f"the archive's index is damaged: it does not unpack to {raw} bytes")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"the archive's index is damaged: {error}") from error
    return _Parser(parts_end).index(document)


class _Parser:
    """Reads the index's JSON with every value checked; payload offsets follow from lengths."""

    def __init__(self, parts_end: int) -> None:
        self.offset = HEAD.size
        self.parts_end = parts_end

    def index(self, document: object) -> Index:
        table = _expect(document, dict, "index")
        known = {"formats", "tensors", "aliases", "metadata", "sites", "base"}
        if unknown := sorted(set(table) - known):
            raise ArchiveError(f"the archive's index has unknown fields {unknown}")
        if table.get("base") is not None or table.get("sites"):
            raise ArchiveError(
                "the archive holds activation sites or differences to a base archive, which "
                "this release does not read; upgrade dither"
            )
        formats = [_format(item) for item in _expect(table.get("formats"), list, "formats")]
        entries = tuple(
            self.entry(row, formats) for row in _expect(table.get("tensors"), list, "tensors")
        )
        if self.offset != self.parts_end:
            raise ArchiveError(
                f"the archive's payloads end at byte {self.offset}, its index begins at byte "
                f"{self.parts_end}"
            )
        names = {entry.name for entry in entries}
        if len(names) != len(entries):
            raise ArchiveError("the archive's index names a tensor twice")
        aliases = _expect(table.get("aliases", {}), dict, "aliases")
        for alias, target in aliases.items():
            if not isinstance(target, str) or target not in names or alias in names:
                raise ArchiveError(f"alias {alias!r} of {target!r} is not possible")
        metadata = _expect(table.get("metadata", {}), dict, "metadata")
        return Index(entries, aliases, metadata)

    def entry(self, row: object, formats: list[Format]) -> Entry:
        fields = _expect(row, list, "tensor")
        if len(fields) < 4:  # noqa: PLR2004 - name, format, dtype, shape
            raise ArchiveError(f"the archive's index has a tensor of {len(fields)} fields")
        name = _expect(fields[0], str, "tensor name")
        which = _count(fields[1], len(formats) - 1, f"format of {name!r}")
        dtype = _dtype(fields[2], name)
        shape = _shape(fields[3], name)
        parts = tuple(self.part(item, name, shape) for item in fields[4:])
        if len({part.name for part in parts}) != len(parts):
            raise ArchiveError(f"tensor {name!r} names a part twice")
        return Entry(name, formats[which], dtype, shape, parts)

    def part(self, row: object, tensor: str, shape: tuple[int, ...]) -> Part:
        fields = _expect(row, list, f"part of {tensor!r}")
        if len(fields) not in (5, 6):
            raise ArchiveError(f"tensor {tensor!r} has a part of {len(fields)} fields")
        name = _expect(fields[0], str, f"part name of {tensor!r}")
        where = f"{tensor!r}, part {name!r}"
        codec = _expect(fields[1], str, f"codec of {where}")
        own = shape if fields[2] == 0 and fields[2] is not False else _shape(fields[2], where)
        alphabet = dtype = None
        if isinstance(fields[3], str):
            dtype = _dtype(fields[3], where)
        else:
            alphabet = _count(fields[3], MAX_ALPHABET, f"alphabet of {where}", least=1)
        if len(fields) == 5:  # noqa: PLR2004 - the payload stands here
            try:
                inline = bytes.fromhex(_expect(fields[4], str, f"payload of {where}"))
            except ValueError as error:
                raise ArchiveError(f"payload of {where} is damaged: {error}") from error
            return Part(name, codec, own, alphabet, dtype, len(inline), inline=inline)
        length = _count(fields[4], self.parts_end - self.offset, f"length of {where}")
        crc = _count(fields[5], 0xFFFFFFFF, f"checksum of {where}")
        offset, self.offset = self.offset, self.offset + length
        return Part(name, codec, own, alphabet, dtype, length, crc, offset)


def _expect(value: object, kind: type[T], what: str) -> T:
    if not isinstance(value, kind):
        raise ArchiveError(
            f"the archive's index is damaged: {what} is {type(value).__name__}, not "
            f"{kind.__name__}"
        )
    return value


def _count(value: object, most: int, what: str, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ArchiveError(
            f"the archive's index is damaged: {what} is {value!r}, expected an integer from "
            f"{least} to {most}"
        )
    return value


def _dtype(value: object, where: str) -> str:
    if not isinstance(value, str) or value not in DTYPES:
        raise ArchiveError(f"{where} has the unknown type {value!r}; upgrade dither")
    return value


def _shape(value: object, where: str) -> tuple[int, ...]:
    sizes = _expect(value, list, f"shape of {where}")
    if len(sizes) > MAX_DIMENSIONS:
        raise ArchiveError(f"{where} has {len(sizes)} dimensions, more than {MAX_DIMENSIONS}")
    shape = tuple(_count(n, MAX_NUMEL, f"shape of {where}") for n in sizes)
    if math.prod(max(n, 1) for n in shape) > MAX_NUMEL:
        raise ArchiveError(f"{where} has the shape {shape}, more than {MAX_NUMEL} values")
    return shape


def _format(item: object) -> Format:
    settings = _expect(item, dict, "format")
    try:
        return format_from_json(settings)
    except (SpecError, TypeError, ValueError) as error:
        raise ArchiveError(f"the archive uses a format that cannot be read: {error}") from error
