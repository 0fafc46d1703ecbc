"""Ways to damage an archive, from single bits to indexes that say what no writer would."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

from dither.archive.layout import END, HEAD, TAIL
from dither.core import DTYPES
from dither.formats import FORMATS

Mutation = Callable[[bytes, random.Random], bytes]
Index = dict[str, Any]

NUMBERS = [0, 1, -1, 2, 7, 8, 255, 256, 257, 1 << 15, 1 << 16, 1 << 20, 1 << 24, (1 << 24) + 1]
NUMBERS += [1 << 31, (1 << 31) + 1, 1 << 32, 1 << 45, 1 << 46, (1 << 46) + 1, 1 << 63, 10**30]
ODD: list[Any] = [None, True, False, 1.0, 0.0, -0.0, 1e300, "", "1", [], [0], {}, {"a": 1}]
NAMES = ["", "a\nb", "\x1b[2J", "\ud800", "__metadata__", "../up", "x" * 9000, "\u202e", "file"]
CODECS = ["bits", "rans", "raw", "", "RANS"]
SETTINGS = ["bits", "axis", "group", "grid", "scale_dtype", "dtype", "points", "bucket", "shift"]
SETTINGS += ["block", "states", "version", "format", "unknown"]
WORDS: list[Any] = ["symmetric", "asymmetric", "endpoint", "int8", *DTYPES, *FORMATS]
METADATA: list[Any] = [
    {"sensitivity": []},
    {"sensitivity": {"t": 10**400, "u": "lots", "v": None}},
    {"budget": "lots"},
    {"budget": -1},
    {"\x1b": "\x1b[0m"},
    [],
    "text",
]
SITES: list[Any] = [{"a@in": {}}, {"a@in": {"bits": "x"}}, {"@": {"bits": [8]}}, {"a": None}, []]


def flip(data: bytes, chance: random.Random) -> bytes:
    """Flip one to eight bits."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8])):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def truncate(data: bytes, chance: random.Random) -> bytes:
    """Cut the end or the beginning off."""
    at = chance.randrange(len(data))
    return data[:at] if chance.random() < 0.8 else data[at:]


def splice(data: bytes, chance: random.Random) -> bytes:
    """Replace, insert, remove or double a stretch, from the file itself."""
    size = min(len(data), chance.choice([1, 4, 16, 200, 2000]))
    a, b = (chance.randrange(len(data) - size + 1) for _ in range(2))
    piece = data[a : a + size]
    kind = chance.randrange(4)
    if kind == 0:
        return data[:b] + piece + data[b + size :]
    if kind == 1:
        return data[:b] + piece + data[b:]
    if kind == 2:
        return data[:b] + data[b + size :]
    return data[:b] + chance.randbytes(size) + data[b + size :]


def edit_index(data: bytes, chance: random.Random) -> bytes:
    """Change values anywhere in the index and make its checksum good again."""
    payloads, index = unpacked(data)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        _edit(index, chance)
    return closed(payloads, index)


def edit_payload(data: bytes, chance: random.Random) -> bytes:
    """Change payloads, in the file and in the index, and make their checksums good again."""
    return _with_payloads(data, chance, flip)


def edit_head(data: bytes, chance: random.Random) -> bytes:
    """The same within the first bytes of payloads, where tables and windows are described."""

    def change(payload: bytes, chance: random.Random) -> bytes:
        size = chance.choice([1, 2, 4, 12])
        head = bytearray(payload[:size])
        for _ in range(chance.choice([1, 1, 2, 3])):
            head[chance.randrange(len(head))] = chance.randrange(256)
        return bytes(head) + payload[size:]

    return _with_payloads(data, chance, change)


def stretch(data: bytes, chance: random.Random) -> bytes:
    """Make lengths of a tensor's shape greater, and those of its parts alike."""
    payloads, index = unpacked(data)
    tensors, parts = index["tensors"], index["parts"]
    if not tensors["name"]:
        return data
    which = chance.randrange(len(tensors["name"]))
    begin = sum(tensors["parts"][:which])
    shapes = [(tensors["shape"], which)]
    shapes += [(parts["shape"], begin + i) for i in range(min(tensors["parts"][which], 64))]
    for length in set(tensors["shape"][which]):
        factor = 1 << chance.randrange(13)
        for column, place in shapes:
            if column[place] and chance.random() < 0.97:
                column[place] = [n * factor if n == length else n for n in column[place]]
    return closed(payloads, index)


def fill_in(data: bytes, chance: random.Random) -> bytes:
    """Put values into fields of the index that are hostile in just that field."""
    payloads, index = unpacked(data)
    for _ in range(chance.choice([1, 1, 2, 3])):
        _FIELDS[chance.choice(list(_FIELDS))](index, chance)
    return closed(payloads, index)


def exchange(data: bytes, chance: random.Random) -> bytes:
    """Exchange two elements of a column, or of all columns, of tensors or parts."""
    payloads, index = unpacked(data)
    table = index[chance.choice(["tensors", "parts"])]
    columns = [c for name, c in table.items() if name != "crc" and len(c) > 1]
    if not columns:
        return data
    a, b = (chance.randrange(len(columns[0])) for _ in range(2))
    for column in columns if chance.random() < 0.3 else [chance.choice(columns)]:
        column[a], column[b] = column[b], column[a]
    return closed(payloads, index)


def rewrite(data: bytes, chance: random.Random) -> bytes:
    """Write the index as a text that is not, or not quite, what the reader expects."""
    payloads, index = unpacked(data)
    text = json.dumps(index)
    depth = chance.choice([100, 5000, 200_000])
    kinds: list[Callable[[], bytes]] = [
        lambda: text.encode("utf-16"),
        lambda: b"\xef\xbb\xbf" + text.encode(),
        lambda: text.encode() + b" " * chance.choice([1, 1 << 16]),
        lambda: text.replace(":", ":" + "[" * depth, 1).encode(),
        lambda: text.replace("{", '{"formats":[],', 1).encode(),
        lambda: text.replace("1", "1" * chance.choice([5, 400, 5000]), 1).encode(),
        lambda: text.replace("1", chance.choice(["NaN", "-Infinity", "1e5", "01", "1_0"])).encode(),
        text[: chance.randrange(len(text))].encode,
        lambda: json.dumps(
            {**index, "metadata": {"x": [[]] * chance.choice([9, 1 << 18])}}
        ).encode(),
        lambda: flip(text.encode(), chance),
    ]
    return closed(payloads, chance.choice(kinds)())


REPAIRED: list[Mutation] = [edit_index, edit_payload, edit_head, stretch]
REPAIRED += [fill_in, exchange, rewrite]
"""Checksums are good again."""

PLAIN: list[Mutation] = [flip, truncate, splice]


def unpacked(data: bytes) -> tuple[bytes, Index]:
    """An archive's head and payloads, and its index."""
    packed, _, _, _ = TAIL.unpack(data[-TAIL.size :])
    start = len(data) - TAIL.size - packed
    index: Index = json.loads(zlib.decompress(data[start : -TAIL.size]))
    return data[:start], index


def closed(payloads: bytes, index: object) -> bytes:
    """The archive of a head and payloads, and of an index or its text."""
    text = index if isinstance(index, bytes) else json.dumps(index, separators=(",", ":")).encode()
    packed = zlib.compress(text)
    lengths = struct.pack("<II", len(packed), len(text))
    crc = zlib.crc32(payloads[: HEAD.size] + packed + lengths)
    return payloads + packed + TAIL.pack(len(packed), len(text), crc, END)


def _with_payloads(data: bytes, chance: random.Random, change: Mutation) -> bytes:
    payloads, index = unpacked(data)
    parts = index["parts"]
    body, start, crc = bytearray(payloads), HEAD.size, 0
    often = max(0.15, 1 / max(len(parts["data"]), 1))
    for i, stored in enumerate(parts["data"]):
        hit = chance.random() < often
        if isinstance(stored, str):
            if hit and stored:
                parts["data"][i] = change(bytes.fromhex(stored), chance).hex()
            continue
        if hit and stored:
            body[start : start + stored] = change(bytes(body[start : start + stored]), chance)
        parts["crc"][crc] = zlib.crc32(body[start : start + stored])
        start, crc = start + stored, crc + 1
    return closed(bytes(body), index)


def _edit(value: dict[str, Any] | list[Any], chance: random.Random) -> None:
    """Walk to a random place of a JSON value and change it."""
    place: Any = value  # a list or an object, whose keys differ in type
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = chance.choice(keys)
        if not (isinstance(place[key], dict | list) and place[key] and chance.random() < 0.9):
            break
        place = place[key]
    kind = chance.randrange(8)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, list):
        place.insert(key, place[key])
    elif isinstance(place[key], int) and kind < 6:
        place[key] = chance.choice(
            [place[key] + 1, place[key] - 1, place[key] * 2, 0, 1, -1, 2**31, 2**45, 10**30, 255]
        )
    elif isinstance(place[key], str) and kind < 6:
        other = chance.choice(["", "rans", "bits", "raw", "levels", "float64", "bool", "ff", "☃"])
        place[key] = other if kind < 4 else place[key][:-2] + "07"
    else:
        place[key] = chance.choice([None, True, 1.5, "x", [], {}, [[]], 7, float("inf")])


def _put(table: str, column: str, choices: list[Any]) -> Callable[[Index, random.Random], None]:
    """What replaces an element of a column by one of some choices."""

    def replace(index: Index, chance: random.Random) -> None:
        values = index[table][column]
        if values:
            values[chance.randrange(len(values))] = chance.choice(choices)

    return replace


def _shape(table: str) -> Callable[[Index, random.Random], None]:
    def replace(index: Index, chance: random.Random) -> None:
        shapes = index[table]["shape"]
        if not shapes:
            return
        place = chance.randrange(len(shapes))
        shape = shapes[place] if isinstance(shapes[place], list) else []
        ways = [[], [*shape, 1], [1, *shape], [*shape, 0], shape[::-1], [1] * 33, [2] * 46]
        ways += [[chance.choice(NUMBERS) for _ in shape], [*shape[:-1], chance.choice(NUMBERS)]]
        shapes[place] = chance.choice(ways)

    return replace


def _setting(index: Index, chance: random.Random) -> None:
    if index["formats"]:
        value = chance.choice([*NUMBERS, *ODD, *WORDS, *range(-3, 18)])
        chance.choice(index["formats"])[chance.choice(SETTINGS)] = value


def _alias(index: Index, chance: random.Random) -> None:
    names = [*index["tensors"]["name"], *NAMES]
    index.setdefault("aliases", {})[chance.choice(NAMES)] = chance.choice([*names, None, 3])


def _field(name: str, choices: list[Any]) -> Callable[[Index, random.Random], None]:
    def replace(index: Index, chance: random.Random) -> None:
        index[name] = chance.choice(choices)

    return replace


_FIELDS: dict[str, Callable[[Index, random.Random], None]] = {
    "tensor name": _put("tensors", "name", [*NAMES, *ODD]),
    "format": _put("tensors", "format", [*NUMBERS, *range(4), *ODD]),
    "dtype": _put("tensors", "dtype", [*DTYPES, "float128", *ODD]),
    "shape": _shape("tensors"),
    "parts": _put("tensors", "parts", [*NUMBERS, 3, 4, 64, 65, *ODD]),
    "part name": _put("parts", "name", ["levels", "zero", "scale", "values", *NAMES, *ODD]),
    "codec": _put("parts", "codec", [*CODECS, *ODD]),
    "part shape": _shape("parts"),
    "holds": _put("parts", "holds", [*NUMBERS, *DTYPES, *ODD]),
    "data": _put("parts", "data", [*NUMBERS, "", "00", "ff" * 40, "0", "zz", *ODD]),
    "crc": _put("parts", "crc", [*NUMBERS, *ODD]),
    "setting": _setting,
    "more settings": _setting,
    "alias": _alias,
    "metadata": _field("metadata", METADATA),
    "sites": _field("sites", SITES),
    "base": _field("base", [None, "", "abc", 0]),
}
