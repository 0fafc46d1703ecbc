"""The layout of a ``.dither`` file, version 1: fixed ends and the index between them.

``docs/FORMAT.md`` is the specification; this module and that page say the same. Nothing here
touches tensors: it turns an :class:`Index` into bytes and hostile bytes into an :class:`Index`
or an :class:`~dither.core.ArchiveError`.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
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
INDEX_BASE, INDEX_RATIO = 1 << 20, 64
"""Bytes of an index before compression: so many for any file, and as many for each of its own."""
PARSED = 40
"""Bytes of memory for each of an index's: lists of an empty list, the worst, take 33."""
MAX_DIMENSIONS = 32
MAX_PARTS = 64
MAX_NUMEL = 1 << 46
INLINE_NBYTES = 12
"""Payloads up to this size stand in the index itself: an entry of their own costs more."""


_FIELDS = {"formats", "tensors", "parts", "aliases", "metadata", "sites", "base"}
_TENSOR = ("name", "format", "dtype", "shape", "parts")
_PART = ("name", "codec", "shape", "holds", "data")
_HEXADECIMAL = re.compile(r"(?:[0-9a-fA-F]{2})*")


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

    @property
    def data(self) -> int | str:
        """What the index says: the payload's length, or a small payload itself."""
        return self.length if self.inline is None else self.inline.hex()


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

    ``sites`` holds activation encodings, ``base`` is the place of the archive to which this one
    stores differences; version 1 writers leave that empty.
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
    """The index and the end of the file behind it.

    It stands in columns: what repeats from tensor to tensor then compresses to almost nothing.
    """
    described = [format_to_json(entry.format) for entry in index.entries]
    formats: list[Any] = []
    for item in described:
        if item not in formats:
            formats.append(item)
    parts = [(part, entry) for entry in index.entries for part in entry.parts]
    document: dict[str, Any] = {
        "formats": formats,
        "tensors": {
            "name": [entry.name for entry in index.entries],
            "format": [formats.index(item) for item in described],
            "dtype": [entry.dtype for entry in index.entries],
            "shape": [list(entry.shape) for entry in index.entries],
            "parts": [len(entry.parts) for entry in index.entries],
        },
        "parts": {
            "name": [part.name for part, _ in parts],
            "codec": [part.codec for part, _ in parts],
            "shape": [
                0 if part.shape == entry.shape else list(part.shape) for part, entry in parts
            ],
            "holds": [part.alphabet or part.dtype for part, _ in parts],
            "data": [part.data for part, _ in parts],
            "crc": [part.crc for part, _ in parts if part.inline is None],
        },
    }
    optional = {
        "aliases": dict(index.aliases),
        "metadata": _ordered(index.metadata),
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
    size = HEAD.size + len(packed) + TAIL.size
    size += sum(part.length for part, _ in parts if part.inline is None)
    if len(text) > INDEX_BASE + INDEX_RATIO * size:
        raise ArchiveError(
            f"the index of this archive would unpack to {len(text)} bytes, more than readers allow "
            f"a file of {size} bytes; store less metadata, or shorter names"
        )
    lengths = struct.pack("<II", len(packed), len(text))
    return packed + TAIL.pack(len(packed), len(text), crc32(head() + packed + lengths), END)


def _ordered(metadata: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any JSON value
    """The user's values with the fields of objects in order, so that theirs changes no byte."""
    plain = json.loads(json.dumps(dict(metadata), allow_nan=False))  # keys are strings then
    return json.loads(json.dumps(plain, sort_keys=True))


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


def index_room(size: int, max_nbytes: int, *, is_default: bool) -> int:
    """Most bytes that an index may unpack to.

    Args:
        size: of the file.
        max_nbytes: most memory.
        is_default: whether that is what nobody asked for.
    """
    room = min(max(INDEX_BASE, max_nbytes // PARSED), MAX_INDEX_NBYTES)
    return min(room, INDEX_BASE + INDEX_RATIO * size) if is_default else room


def unpack_tail(tail: bytes, size: int, room: int) -> tuple[int, int]:
    """Where the index lies: its offset and its length; refused if it unpacks to more than room."""
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
    if raw > room:
        raise ArchiveError(
            f"the archive's index would unpack to {raw} bytes, more than the {room} allowed; if "
            "you trust the file, open it with a larger max_nbytes"
        )
    return offset, packed


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
        # Of bytes, json would take UTF-16 and UTF-32, too, and of UTF-8 a byte order mark.
        document = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"the archive's index is damaged: {error}") from error
    return _Parser(parts_end).index(document)


class _Parser:
    """Reads the index's JSON with every value checked; payload offsets follow from lengths."""

    def __init__(self, parts_end: int) -> None:
        self.offset = HEAD.size
        self.parts_end = parts_end

    def index(self, document: object) -> Index:
        fields = _expect(document, dict, "index")
        if unknown := sorted(set(fields) - _FIELDS):
            raise ArchiveError(f"the archive's index has unknown fields {unknown}; upgrade dither")
        if fields.get("base") is not None:
            raise ArchiveError(
                "the archive holds differences to a base archive, which this release does not "
                "read; upgrade dither"
            )
        formats = [_format(item) for item in _expect(fields.get("formats"), list, "formats")]
        entries = tuple(self.entries(fields, formats))
        if self.offset != self.parts_end:
            raise ArchiveError(
                f"the archive's payloads end at byte {self.offset}, its index begins at byte "
                f"{self.parts_end}"
            )
        names = {entry.name for entry in entries}
        if len(names) != len(entries):
            raise ArchiveError("the archive's index names a tensor twice")
        aliases = _expect(fields.get("aliases", {}), dict, "aliases")
        for alias, target in aliases.items():
            if not isinstance(target, str) or target not in names or alias in names:
                raise ArchiveError(f"alias {alias!r} of {target!r} is not possible")
        metadata = _expect(fields.get("metadata", {}), dict, "metadata")
        sites = _expect(fields.get("sites", {}), dict, "sites")
        for name, site in sites.items():
            _expect(site, dict, f"site {name!r}")
        return Index(entries, aliases, metadata, sites)

    def entries(self, fields: dict[str, Any], formats: list[Format]) -> Iterator[Entry]:
        tensors = _columns(fields.get("tensors"), "tensors", _TENSOR)
        parts = _columns(fields.get("parts"), "parts", (*_PART, "crc"))
        crcs = iter(parts.pop("crc"))
        rows = zip(*_equal(parts, "parts"), strict=True)
        for name, which, kind, sizes, count in zip(*_equal(tensors, "tensors"), strict=True):
            _expect(name, str, "tensor name")
            dtype, shape = _dtype(kind, repr(name)), _shape(sizes, repr(name))
            of = formats[_count(which, len(formats) - 1, f"format of {name!r}")]
            own = list(islice(rows, _count(count, MAX_PARTS, f"parts of {name!r}")))
            held = tuple(self.part(row, name, shape, crcs) for row in own)
            if len(held) != count or len({part.name for part in held}) != count:
                raise ArchiveError(f"tensor {name!r} lacks a part or names one twice")
            yield Entry(name, of, dtype, shape, held)
        if any(True for _ in rows) or any(True for _ in crcs):
            raise ArchiveError("the archive's index has parts that belong to no tensor")

    def part(
        self, row: tuple[Any, ...], tensor: str, shape: tuple[int, ...], crcs: Iterator[Any]
    ) -> Part:
        name, codec, sizes, holds, data = row
        where = f"tensor {tensor!r}, part {_expect(name, str, f'part name of {tensor!r}')!r}"
        _expect(codec, str, f"codec of {where}")
        own = shape if type(sizes) is int and sizes == 0 else _shape(sizes, where)
        alphabet = dtype = None
        if isinstance(holds, str):
            dtype = _dtype(holds, where)
        else:
            alphabet = _count(holds, MAX_ALPHABET, f"alphabet of {where}", least=1)
        if isinstance(data, str):
            if not _HEXADECIMAL.fullmatch(data):  # bytes.fromhex would take spaces, too
                raise ArchiveError(
                    f"payload of {where} is damaged: {data[:40]!r} is not pairs of hexadecimal "
                    "digits"
                )
            inline = bytes.fromhex(data)
            return Part(name, codec, own, alphabet, dtype, len(inline), inline=inline)
        length = _count(data, self.parts_end - self.offset, f"length of {where}")
        crc = _count(next(crcs, None), 0xFFFFFFFF, f"checksum of {where}")
        offset, self.offset = self.offset, self.offset + length
        return Part(name, codec, own, alphabet, dtype, length, crc, offset)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a field stands twice")
    return table


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _columns(value: object, what: str, names: tuple[str, ...]) -> dict[str, list[Any]]:
    table = _expect(value, dict, what)
    if set(table) != set(names):
        raise ArchiveError(f"the archive's index has the columns {sorted(table)} of {what}")
    return {name: _expect(table[name], list, f"column {name!r} of {what}") for name in names}


def _equal(columns: dict[str, list[Any]], what: str) -> list[list[Any]]:
    if len({len(column) for column in columns.values()}) != 1:
        raise ArchiveError(f"the archive's index has columns of unequal length for {what}")
    return list(columns.values())


def _expect(value: object, kind: type[T], what: str) -> T:
    if not isinstance(value, kind):
        raise ArchiveError(
            f"the archive's index is damaged: {what} is {type(value).__name__}, not {kind.__name__}"
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
