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
from typing import Any

from dither.archive.index_values import (
    dtype_in,
    equal,
    expect,
    format_in,
    integer,
    no_constant,
    shape_in,
    table_of,
    unique,
)
from dither.coding import crc32
from dither.core import DTYPES, MAX_ALPHABET, ArchiveError, Format
from dither.formats import format_to_json

MAGIC = b"\x8dDITHER\x1a"
VERSION = 1
HEAD = struct.Struct("<8sHH")
"""Magic, version, required features."""
TAIL = struct.Struct("<III4s")
"""Index length, its length before compression, CRC-32, end mark."""
END = b"htid"
DIFFERENCES = 1
"""The feature that tensors may rest on those of a base."""
FEATURES = DIFFERENCES
"""Required-feature bits that this reader understands."""

MAX_INDEX_NBYTES = 1 << 28
INDEX_BASE, INDEX_RATIO = 1 << 20, 64
"""Bytes of an index before compression: so many for any file, and as many for each of its own."""
PARSED = 40
"""Bytes of memory for each of an index's: lists of an empty list, the worst, take 33."""
MAX_PARTS = 64
INLINE_NBYTES = 12
"""Payloads up to this size stand in the index itself: an entry of their own costs more."""


_FIELDS = {"formats", "tensors", "parts", "aliases", "metadata", "sites", "base"}
_TENSOR = ("name", "format", "dtype", "shape", "parts")
_PART = ("name", "codec", "shape", "holds", "data")
_HEXADECIMAL = re.compile(r"(?:[0-9a-fA-F]{2})*")
_HASH = re.compile(r"[0-9a-f]{64}")


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
    """One tensor as stored.

    Where it rests ``on_base``, parts hold the difference to the base's tensor of that name, which
    is without any where there is none.
    """

    name: str
    format: Format
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    on_base: bool = False

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

    ``sites`` holds activation encodings, ``base`` the hash of what tensors rest on, if any do.
    """

    entries: tuple[Entry, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sites: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None


def head(*, on_base: bool = False) -> bytes:
    """The first bytes of every file of this version; they say whether it rests on a base."""
    return HEAD.pack(MAGIC, VERSION, DIFFERENCES if on_base else 0)


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
            **({"base": [int(e.on_base) for e in index.entries]} if index.base else {}),
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
    start, lengths = head(on_base=bool(index.base)), struct.pack("<II", len(packed), len(text))
    return packed + TAIL.pack(len(packed), len(text), crc32(start + packed + lengths), END)


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
        document = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"the archive's index is damaged: {error}") from error
    return _Parser(parts_end, HEAD.unpack(file_head)[2]).index(document)


class _Parser:
    """Reads the index's JSON with every value checked; payload offsets follow from lengths."""

    def __init__(self, parts_end: int, features: int) -> None:
        self.offset = HEAD.size
        self.parts_end, self.features = parts_end, features

    def index(self, document: object) -> Index:
        fields = expect(document, dict, "index")
        if unknown := sorted(set(fields) - _FIELDS):
            raise ArchiveError(f"the archive's index has unknown fields {unknown}; upgrade dither")
        base = fields.get("base")
        if (base is not None) != bool(self.features & DIFFERENCES):
            raise ArchiveError("the archive's index and its first bytes differ on whether it rests")
        if base is not None and not (isinstance(base, str) and _HASH.fullmatch(base)):
            raise ArchiveError(f"the archive names its base {base!r}; expected 64 digits of a hash")
        formats = [format_in(item) for item in expect(fields.get("formats"), list, "formats")]
        entries = tuple(self.entries(fields, formats))
        if self.offset != self.parts_end:
            raise ArchiveError(
                f"the archive's payloads end at byte {self.offset}, its index begins at byte "
                f"{self.parts_end}"
            )
        names = {entry.name for entry in entries}
        if len(names) != len(entries):
            raise ArchiveError("the archive's index names a tensor twice")
        aliases = expect(fields.get("aliases", {}), dict, "aliases")
        for alias, target in aliases.items():
            if not isinstance(target, str) or target not in names or alias in names:
                raise ArchiveError(f"alias {alias!r} of {target!r} is not possible")
        metadata = expect(fields.get("metadata", {}), dict, "metadata")
        sites = expect(fields.get("sites", {}), dict, "sites")
        for name, site in sites.items():
            expect(site, dict, f"site {name!r}")
        return Index(entries, aliases, metadata, sites, base)

    def entries(self, fields: dict[str, Any], formats: list[Format]) -> Iterator[Entry]:
        named = (*_TENSOR, "base") if fields.get("base") else _TENSOR
        tensors = table_of(fields.get("tensors"), "tensors", named)
        rests = tensors.pop("base", [0] * len(tensors["name"]))
        parts = table_of(fields.get("parts"), "parts", (*_PART, "crc"))
        crcs = iter(parts.pop("crc"))
        rows = zip(*equal(parts, "parts"), strict=True)
        in_order = zip(*equal({**tensors, "base": rests}, "tensors"), strict=True)
        for name, which, kind, sizes, count, rest in in_order:
            expect(name, str, "tensor name")
            dtype, shape = dtype_in(kind, repr(name)), shape_in(sizes, repr(name))
            of = formats[integer(which, len(formats) - 1, f"format of {name!r}")]
            own = list(islice(rows, integer(count, MAX_PARTS, f"parts of {name!r}")))
            held = tuple(self.part(row, name, shape, crcs) for row in own)
            if len(held) != count or len({part.name for part in held}) != count:
                raise ArchiveError(f"tensor {name!r} lacks a part or names one twice")
            on_base = bool(integer(rest, 1, f"base of {name!r}"))
            if on_base and held and not DTYPES[dtype].is_floating_point:
                raise ArchiveError(f"tensor {name!r} of {dtype} cannot be stored as a difference")
            yield Entry(name, of, dtype, shape, held, on_base)
        if any(True for _ in rows) or any(True for _ in crcs):
            raise ArchiveError("the archive's index has parts that belong to no tensor")

    def part(
        self, row: tuple[Any, ...], tensor: str, shape: tuple[int, ...], crcs: Iterator[Any]
    ) -> Part:
        name, codec, sizes, holds, data = row
        where = f"tensor {tensor!r}, part {expect(name, str, f'part name of {tensor!r}')!r}"
        expect(codec, str, f"codec of {where}")
        own = shape if type(sizes) is int and sizes == 0 else shape_in(sizes, where)
        alphabet = dtype = None
        if isinstance(holds, str):
            dtype = dtype_in(holds, where)
        else:
            alphabet = integer(holds, MAX_ALPHABET, f"alphabet of {where}", least=1)
        if isinstance(data, str):
            if not _HEXADECIMAL.fullmatch(data):  # bytes.fromhex would take spaces, too
                raise ArchiveError(
                    f"payload of {where} is damaged: {data[:40]!r} is not pairs of hexadecimal "
                    "digits"
                )
            inline = bytes.fromhex(data)
            return Part(name, codec, own, alphabet, dtype, len(inline), inline=inline)
        length = integer(data, self.parts_end - self.offset, f"length of {where}")
        crc = integer(next(crcs, None), 0xFFFFFFFF, f"checksum of {where}")
        offset, self.offset = self.offset, self.offset + length
        return Part(name, codec, own, alphabet, dtype, length, crc, offset)
