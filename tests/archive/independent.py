"""A second decoder of `.dither` files, written from docs/FORMAT.md alone.

It shares no code with the library, prefers clarity over speed, and is for small archives.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

SIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "complex64": 8, "complex128": 16, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "uint16": 2, "uint32": 4, "uint64": 8, "bool": 1,
}  # fmt: skip
FLOATING = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
COMPLEX = ("complex64", "complex128")
# Bits of the exponent and of the fraction, and the largest finite value.
SMALL_FLOATS = {
    "float16": (5, 10, 65504.0),
    "bfloat16": (8, 7, 2.0**127 * (2 - 2.0**-7)),
    "float8_e4m3fn": (4, 3, 448.0),
    "float8_e5m2": (5, 2, 57344.0),
}


def must(condition: object, what: str) -> None:
    if not condition:
        raise ValueError(what)


def is_int(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_type(value: object) -> bool:
    return isinstance(value, str) and value in SIZES


# Section 3: bits and numbers ----------------------------------------------------------------------


def width(alphabet: int) -> int:
    return (alphabet - 1).bit_length()


class Bytes:
    """Takes pieces off the front of a payload."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, count: int) -> bytes:
        must(count <= len(self.data), "payload too short")
        piece, self.data = self.data[:count], self.data[count:]
        return piece

    def packed(self, count: int, bits: int) -> Array:
        piece = np.frombuffer(self.take((count * bits + 7) // 8), np.uint8)
        string = np.unpackbits(piece, bitorder="little")
        must(not string[count * bits :].any(), "unused bits")
        weights = np.left_shift(1, np.arange(bits, dtype=np.int64))
        return string[: count * bits].reshape(count, bits).astype(np.int64) @ weights

    def end(self) -> None:
        must(not self.data, "bytes left over")


class Bits:
    """Reads a bit string at the front of a payload."""

    def __init__(self, data: bytes) -> None:
        self.bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").tobytes()
        self.at = 0

    def u(self, count: int) -> int:
        piece = self.bits[self.at : self.at + count]
        must(len(piece) == count, "payload too short")
        self.at += count
        return sum(bit << i for i, bit in enumerate(piece))

    def zeros(self) -> int:
        """The number of zero bits up to the next one bit, which is read, too."""
        one = self.bits.find(b"\1", self.at)
        must(one >= 0, "payload too short")
        count, self.at = one - self.at, one + 1
        return count

    def gamma(self) -> int:
        count = self.zeros()
        must(count <= 32, "gamma too long")
        return self.u(count) + (1 << count)

    def rice(self, k: int) -> int:
        high = self.zeros()
        return high << k | self.u(k)

    def finish(self) -> int:
        """The number of bytes of the string, of which the last bits must be zero."""
        count = (self.at + 7) // 8
        must(not any(self.bits[self.at : 8 * count]), "unused bits")
        return count


# Section 3: tables --------------------------------------------------------------------------------


def root_floor(m: int, j: int) -> int:
    """floor(2^(m / 2^j))"""
    value = 1 << m
    for _ in range(j):
        value = math.isqrt(value)
    return value


E = [root_floor(16 * 12 + i, 4) for i in range(16)]
F = [root_floor(64 * 15 + i, 6) for i in range(64)]

Levels = dict[int, int]  # symbol -> level, in the order of the symbols


def read_levels(head: Bits, size: int, escaped: bool, precision: int) -> Levels:
    kind = head.u(2)
    if kind < 2:
        levels = read_steps(head, size + escaped, gapped=kind == 1)
    else:
        must(size <= 4096 and size + escaped <= 1 << precision, "curve too wide")
        levels = read_curve(head, size, escaped, spiked=kind == 3)
    must(len(levels) <= 1 << precision, "too many symbols")
    return levels


def steps_settings(head: Bits) -> tuple[int, int, int]:
    r, g, k = head.u(3), head.u(2), head.u(3)
    must(r <= 4 and g <= 2, "settings of a table")
    return r, g, k


def read_steps(head: Bits, count: int, gapped: bool) -> Levels:
    r, g, k = steps_settings(head)
    limit = 16 * 2**r - 1
    symbol = head.gamma() - 1 if gapped else 0
    must(symbol < count, "table without symbols")
    v1 = v2 = head.u(4 + r)
    levels = {symbol: v1 << (4 - r)}
    symbol += 1
    while symbol < count:
        z = head.rice(k)
        if gapped and z == 0:
            symbol += head.gamma()
            must(symbol <= count, "run beyond the table")
            if symbol == count:
                break
            z = head.rice(k)
        elif gapped:
            z -= 1
        prediction = min(max(v1 + ((v1 - v2) * g >> 1), 0), limit)
        value = prediction + (-(z + 1) // 2 if z % 2 else z // 2)
        must(0 <= value <= limit, "value of a table")
        v1, v2 = value, v1
        levels[symbol] = value << (4 - r)
        symbol += 1
    return levels


def curve_settings(head: Bits, size: int, spiked: bool) -> tuple[int, int, int, int]:
    c = head.u(width(4 * size - 3))
    must(c <= 4 * (size - 1), "centre")
    s = head.u(7)
    b = (2, 3, 4, 5, 6, 7, 8, 10)[head.u(3)]
    return c, s, b, head.u(6) - 32 if spiked else 0


def read_curve(head: Bits, size: int, escaped: bool, spiked: bool) -> Levels:
    c, s, b, t = curve_settings(head, size, spiked)
    levels = {}
    for x in range(size):
        d = abs(4 * x - c)
        drop = 0
        if d:
            y = (b * ((d**64).bit_length() - 1 - 8 * s)) >> 2
            o = min(max(y >> 6, -16), 4)
            drop = (F[y & 63] << 4) >> (15 - o)
        levels[x] = 255 - min(drop, 255)
    if spiked:
        if t > 0:
            levels = {x: max(level - 4 * t, 0) for x, level in levels.items()}
        levels[(c + 2) >> 2] = 255 + min(4 * t, 0)
    if escaped:
        levels[size] = head.u(8)
    return levels


class Table:
    def __init__(self, levels: Levels, precision: int) -> None:
        total = 1 << precision
        self.symbols = list(levels)  # by rank
        self.frequencies = frequencies([E[v & 15] << (v >> 4) for v in levels.values()], total)
        self.starts = np.cumsum([0, *self.frequencies])[:-1].tolist()
        self.ranks = np.repeat(np.arange(len(levels)), self.frequencies).tolist()  # by slot


def frequencies(weights: list[int], total: int) -> list[int]:
    weight, count = sum(weights), len(weights)
    f = [max(w * total // weight, 1) for w in weights]
    if sum(f) > total:
        excess = sum(f) - count
        f = [1 + (x - 1) * (total - count) // excess for x in f]
    missing = total - sum(f)
    assert missing < count
    order = sorted(range(count), key=lambda i: (-(weights[i] * 2**17 // (2 * f[i] + 1)), i))
    for i in order[:missing]:
        f[i] += 1
    assert sum(f) == total
    return f


# Section 3: codecs --------------------------------------------------------------------------------


def decode_bits(payload: bytes, shape: Shape, alphabet: int) -> Array:
    data, n = Bytes(payload), math.prod(shape)
    codes = data.packed(n, width(alphabet)) if alphabet > 1 else np.zeros(n, np.int64)
    data.end()
    must((codes < alphabet).all(), "code beyond the alphabet")
    return codes


class Head(NamedTuple):
    precision: int
    lanes: int
    shift: int
    begin: int
    size: int
    escapes: int
    highs: int
    offset: int
    axes: list[tuple[int, int, int | None]]  # axis, number of classes, bytes if they are coded
    tables: list[Levels]
    nbytes: int
    machine: tuple[int, int] | None


def read_head(payload: bytes, shape: Shape, alphabet: int) -> Head:
    head = Bits(payload)
    windowed, contextual, laned = head.u(1), head.u(1), head.u(1)
    precision = head.u(3) + 8
    steered = head.u(1)
    must(head.u(1) == 0, "reserved bit")
    exponent = head.u(4) if laned else 0
    must(exponent >= 1 or not laned, "lanes")

    shift, begin, size, escapes = 0, 0, alphabet, 0
    if windowed:
        shift, begin, size, escapes = head.u(5), head.gamma() - 1, head.gamma(), head.gamma() - 1
    highs = -(-alphabet >> shift)
    must(shift < 24 and begin + size <= highs and escapes <= math.prod(shape), "window")

    machine = None
    if steered:
        machine = head.gamma(), head.gamma()
        must_be_machine(*machine)
        must(shift == escapes == 0 and 1 << exponent <= stride_of(shape), "machine")

    count, offset = 1, 0
    axes: list[tuple[int, int, int | None]] = []
    if contextual:
        count, offset = head.u(4) + 1, head.gamma() - 1
        must(len(shape) <= 8 and count >= 2 and offset <= 120, "contexts")
        for axis in range(len(shape)):
            if head.u(1):
                classes = head.u(4) + 1
                axes.append((axis, classes, head.gamma() if head.u(1) else None))
        must(axes, "contexts without classes")
    sets = 2 if steered else 1
    tables = [read_levels(head, size, escapes > 0, precision) for _ in range(sets * count)]
    nbytes = head.finish()
    return Head(
        *(precision, 1 << exponent, shift, begin, size, escapes, highs, offset, axes, tables),
        *(nbytes, machine),
    )


def must_be_machine(a: int, b: int) -> None:
    degree = a.bit_length() - 1
    must(a % 2 == 1 and 1 <= degree <= 8 and b % 2 == 0 and 0 < b < 2 ** (degree + 1), "machine")


def stride_of(shape: Shape) -> int:
    return shape[-1] if len(shape) > 1 else 1


class Machines:
    """For each element in turn, its quantizer, which depends on the parities before."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        self.a, self.b, self.stride = a, b, stride
        self.quantizers: list[int] = []
        self.parities: list[int] = []

    def quantizer(self) -> int:
        at, found = len(self.quantizers), 0
        for i in range(1, 9):
            if at - i * self.stride >= 0:
                found ^= self.a >> i & self.quantizers[at - i * self.stride]
                found ^= self.b >> i & self.parities[at - i * self.stride]
        return found & 1

    def take(self, parity: int) -> int:
        """The quantizer of the next element, whose parity is this."""
        found = self.quantizer()
        self.quantizers.append(found)
        self.parities.append(parity)
        return found


def decode_rans(
    payload: bytes, shape: Shape, alphabet: int, contextual_allowed: bool = True
) -> Array:
    n = math.prod(shape)
    must(1 <= n <= 2**31 and alphabet >= 2, "codec not allowed here")
    head = read_head(payload, shape, alphabet)
    must(contextual_allowed or not (head.axes or head.machine), "contexts not allowed here")

    data = Bytes(payload)
    data.take(head.nbytes)
    context = np.full(shape, -head.offset, np.int64)
    for axis, classes, coded in head.axes:
        length = shape[axis]
        if coded is None:
            of_axis = data.packed(length, width(classes))
        else:
            of_axis = decode_rans(data.take(coded), (length,), classes, contextual_allowed=False)
        must((of_axis < classes).all(), "class")
        context += of_axis.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    low = data.packed(n, head.shift)
    escaped = data.packed(head.escapes, width(head.highs))
    tables = [Table(levels, head.precision) for levels in head.tables]
    choices = len(tables) // (2 if head.machine else 1)
    machines = Machines(*head.machine, stride_of(shape)) if head.machine else None
    symbols = decode_stream(
        data.data,
        tables,
        np.clip(context, 0, choices - 1).reshape(-1).tolist(),
        head.precision,
        head.lanes,
        machines,
        head.begin,
    )

    begin, size = head.begin, head.size
    high = begin + symbols
    escapes_at = np.flatnonzero(symbols == size)
    must(len(escapes_at) == head.escapes, "number of escapes")
    must(((escaped < begin) | (escaped >= begin + size)).all(), "escape within the window")
    high[escapes_at] = escaped
    codes = (high << head.shift) | low
    must((codes < alphabet).all(), "code beyond the alphabet")
    return np.asarray(codes)


def decode_stream(
    stream: bytes,
    tables: list[Table],
    context: list[int],
    precision: int,
    lanes: int,
    machines: Machines | None = None,
    begin: int = 0,
) -> Array:
    n = len(context)

    def table_of(i: int) -> Table:
        second = machines.quantizer() * (len(tables) // 2) if machines else 0
        return tables[context[i] + second]

    most = max(len(table.symbols) for table in tables)
    if most == 1:
        must(machines is None, "machine without a stream")
        must(not stream and lanes == 1, "stream of single symbols")
        return np.array([tables[k].symbols[0] for k in context], np.int64)
    bits = width(most)
    rows = -(-n // lanes)
    tail = min(16 // bits, rows)
    must(rows <= 2**16 and lanes <= n, "lanes")

    data = Bytes(stream)
    if lanes == 1:
        count = 3 if len(stream) % 2 else 4
        states = [int.from_bytes(data.take(count), "little")]
        must(states[0] >= (2**16 if count == 3 else 2**24), "state")
    else:
        lows = data.packed(lanes, 16).tolist()
        lengths = data.packed(lanes, 4).tolist()
        string = Bits(data.data)
        states = [
            (string.u(b) + (1 << b)) << 16 | low for low, b in zip(lows, lengths, strict=True)
        ]
        data.take(string.finish())
    must(len(data.data) % 2 == 0, "half a word")
    words = np.frombuffer(data.data, "<u2").tolist()
    used = 0

    symbols = []
    mask = (1 << precision) - 1
    body = (rows - tail) * lanes
    for i in range(body):
        lane, table = i % lanes, table_of(i)
        state = states[lane]
        slot = state & mask
        rank = table.ranks[slot]
        symbols.append(table.symbols[rank])
        if machines:
            machines.take((symbols[-1] + begin) & 1)
        state = table.frequencies[rank] * (state >> precision) + slot - table.starts[rank]
        if state < 2**16:
            must(used < len(words), "payload too short")
            state = state << 16 | words[used]
            used += 1
        states[lane] = state
    must(used == len(words), "words left over")
    must(all(2**16 <= state < 2**17 for state in states), "last state")

    fields = [state & 0xFFFF for state in states]
    for i in range(body, n):
        lane, table = i % lanes, table_of(i)
        rank = fields[lane] & ((1 << bits) - 1)
        must(rank < len(table.symbols), "rank")
        symbols.append(table.symbols[rank])
        if machines:
            machines.take((symbols[-1] + begin) & 1)
        fields[lane] >>= bits
    must(not any(fields), "unused bits")
    return np.array(symbols, np.int64)


def read_planes(payload: bytes, size: int) -> tuple[int, list[int | None], int]:
    """Whether numbers are rotated, the bytes of each coded plane, and the bytes of the head."""
    head = Bits(payload)
    rotated = head.u(1)
    lengths = [head.gamma() if head.u(1) else None for _ in range(size)]
    return rotated, lengths, head.finish()


def decode_planes(payload: bytes, m: int, size: int) -> bytes:
    must(m >= 1, "codec not allowed here")
    rotated, lengths, nbytes = read_planes(payload, size)
    data = Bytes(payload)
    data.take(nbytes)
    planes: Array = np.empty((m, size), np.uint8)
    for j, length in enumerate(lengths):
        if length is None:
            planes[:, j] = np.frombuffer(data.take(m), np.uint8)
        else:
            coded = data.take(length)
            planes[:, j] = decode_rans(coded, (m,), 256, contextual_allowed=False)
    data.end()
    if rotated:
        bits = np.unpackbits(planes, axis=1, bitorder="little")
        planes = np.packbits(np.roll(bits, -1, axis=1), axis=1, bitorder="little")
    return bytes(planes.tobytes())


# Types of numbers ---------------------------------------------------------------------------------


def to_doubles(data: bytes, kind: str) -> Array:
    """The numbers of a floating type, exactly."""
    if kind == "bfloat16":
        data = (np.frombuffer(data, "<u2").astype("<u4") << 16).tobytes()
        kind = "float32"
    elif kind == "float8_e5m2":
        data = (np.frombuffer(data, "u1").astype("<u2") << 8).tobytes()
        kind = "float16"
    elif kind == "float8_e4m3fn":
        code = np.frombuffer(data, "u1").astype(np.int64)
        exponent, fraction = code >> 3 & 15, code & 7
        subnormal = exponent == 0
        number = np.ldexp(
            np.where(subnormal, fraction, fraction + 8.0), np.where(subnormal, 1, exponent) - 10
        )
        number[(code & 127) == 127] = math.nan
        return np.asarray(np.copysign(number, np.where(code & 128, -1.0, 1.0)))
    numbers = np.frombuffer(data, np.dtype(kind).newbyteorder("<"))
    return np.asarray(numbers.astype(np.float64))


def to_singles(data: bytes, kind: str) -> Array:
    return to_doubles(data, kind).astype(np.float32)


def restore(values: Array, kind: str, clamp: bool = True) -> bytes:
    """Floating-point numbers in a type, rounded to nearest even."""
    if kind not in SMALL_FLOATS:
        return bytes(values.astype(np.dtype(kind).newbyteorder("<")).tobytes())
    exponent_bits, fraction_bits, largest = SMALL_FLOATS[kind]
    lowest = 2 - 2 ** (exponent_bits - 1)  # the exponent of the smallest normal number
    doubles = values.astype(np.float64)
    magnitude = np.minimum(np.nan_to_num(np.abs(doubles), posinf=math.inf), 2 * largest)
    if clamp or kind == "float8_e4m3fn":  # which has no infinities
        magnitude = np.minimum(magnitude, largest)
    exponent = np.maximum(np.frexp(magnitude)[1].astype(np.int64) - 1, lowest)
    exponent[magnitude == 0] = lowest
    steps = np.rint(np.ldexp(magnitude, fraction_bits - exponent)).astype(np.int64)
    code = ((exponent - lowest) << fraction_bits) + steps
    if kind != "float8_e4m3fn":
        code = np.minimum(code, ((1 << exponent_bits) - 1) << fraction_bits)  # infinity
    code[np.isnan(doubles)] = (1 << (exponent_bits + fraction_bits)) - 1
    code |= np.signbit(doubles).astype(np.int64) << (exponent_bits + fraction_bits)
    return bytes(code.astype("<u2" if SIZES[kind] == 2 else "u1").tobytes())


# Section 4: formats -------------------------------------------------------------------------------


class Part(NamedTuple):
    shape: Shape
    holds: int | str
    values: Array  # int64 codes, or bytes of numbers (uint8)


class Parts:
    """The parts of one tensor; each is taken once, and at the end none may be left."""

    def __init__(self, parts: dict[str, Part]) -> None:
        self.parts = parts

    def take(self, name: str) -> Part:
        must(name in self.parts, f"no part {name}")
        return self.parts.pop(name)

    def shape(self, name: str, axes: int) -> Shape:
        must(name in self.parts and len(self.parts[name].shape) == axes, f"shape of {name}")
        return self.parts[name].shape

    def codes(self, name: str, shape: Shape | None, alphabet: int | None) -> Array:
        part = self.take(name)
        must(isinstance(part.holds, int), f"{name} are codes")
        must(alphabet in (None, part.holds), f"alphabet of {name}")
        must(shape in (None, part.shape), f"shape of {name}")
        return part.values

    def singles(self, name: str, shape: Shape, kind: str) -> Array:
        part = self.take(name)
        must(part.holds == kind and part.shape == shape, f"{name}: type or shape")
        return to_singles(part.values.tobytes(), kind)


class Settings:
    def __init__(self, given: dict[str, Any]) -> None:
        self.given = dict(given)
        must(is_int(self.given.pop("version", None), 1, 1), "version of a format")
        del self.given["format"]

    def optional(self, name: str, default: int | None, low: int, high: int) -> int | None:
        value = self.given.pop(name, default)
        must(value is None or is_int(value, low, high), f"setting {name}")
        return None if value is None else int(value)

    def integer(self, name: str, default: int | None, low: int, high: int) -> int:
        value = self.optional(name, default, low, high)
        if value is None:
            raise ValueError(f"setting {name}")
        return value

    def choice(self, name: str, default: str, *others: str) -> str:
        value = self.given.pop(name, default)
        must(isinstance(value, str) and value in (default, *others), f"setting {name}")
        return str(value)

    def flag(self, name: str) -> bool:
        value = self.given.pop(name, False)
        must(isinstance(value, bool), f"setting {name}")
        return bool(value)

    def end(self) -> None:
        must(not self.given, "unknown setting")


MANY = 2**46
GROUPS = 2**24
SCALES = ("float32", "float16", "bfloat16")


def runs(count: int, length: int) -> Array:
    return np.arange(count) // length


def rows_and_columns(shape: Shape) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def decode_raw(settings: Settings, parts: Parts, kind: str, shape: Shape) -> bytes:
    given = settings.given.pop("dtype", None)
    must(given is None or is_type(given), "setting dtype")
    stored: str = given or kind
    settings.end()
    part = parts.take("values")
    must(part.holds == stored and part.shape == shape, "values: type or shape")
    data = part.values.tobytes()
    if stored == kind:
        return data
    if kind in COMPLEX:
        must(stored in COMPLEX, "stored type")
        target = np.dtype(kind).newbyteorder("<")
        return np.frombuffer(data, np.dtype(stored).newbyteorder("<")).astype(target).tobytes()
    must(kind in FLOATING and stored in FLOATING, "stored type")
    return restore(to_doubles(data, stored), kind, clamp=False)


def decode_affine(settings: Settings, parts: Parts, kind: str, shape: Shape) -> Array:
    bits = settings.optional("bits", 8, 1, 16)
    axis = settings.optional("axis", None, -len(shape), len(shape) - 1)
    group = settings.optional("group", None, 1, GROUPS)
    grid = settings.choice("grid", "symmetric", "asymmetric", "endpoint")
    scale_dtype = settings.choice("scale_dtype", *SCALES)
    settings.end()
    must(axis is None or group is None, "both axis and group")
    must(bits is not None or grid == "symmetric", "grid")

    n = math.prod(shape)
    if axis is not None:
        axis %= len(shape)
        count = shape[axis]
        of = np.broadcast_to(
            np.arange(count).reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape
        ).reshape(-1)
    elif group is not None:
        rows, columns = rows_and_columns(shape)
        in_row = -(-columns // group)
        count = rows * in_row
        of = (np.arange(rows)[:, None] * in_row + runs(columns, group)).reshape(-1)
    else:
        count, of = 1, np.zeros(n, np.int64)

    levels = parts.codes("levels", shape, None if bits is None else 1 << bits)
    scale = parts.singles("scale", (count,), scale_dtype)[of]
    if grid == "endpoint":
        offset = parts.singles("offset", (count,), scale_dtype)[of]
        return levels.astype(np.float32) * scale + offset
    if bits is None:
        steps = levels - parts.codes("zero", (1,), 2**24)
    elif grid == "asymmetric":
        steps = levels - parts.codes("zero", (count,), 1 << bits)[of]
    elif bits == 1:
        steps = 2 * levels - 1
    else:
        steps = levels - (1 << (bits - 1))
    return steps.astype(np.float32) * scale


def decode_codebook(settings: Settings, parts: Parts, kind: str, shape: Shape) -> Array:
    most = settings.integer("points", None, 2, 65536)
    bucket = settings.optional("bucket", None, 1, GROUPS)
    shift = settings.flag("shift")
    dtype = settings.choice("dtype", "float16", "bfloat16", "float32")
    scale_dtype = settings.choice("scale_dtype", *SCALES)
    settings.end()
    must(bucket is not None or not shift, "shift without buckets")
    n = math.prod(shape)
    (count,) = parts.shape("points", 1)
    must(1 <= count <= most, "number of points")
    points = parts.singles("points", (count,), dtype)
    values = points[parts.codes("indices", shape, count)]
    if bucket is not None:
        of = runs(n, bucket)
        buckets = (-(-n // bucket),)
        values = values * parts.singles("scale", buckets, scale_dtype)[of]
        if shift:
            values = values + parts.singles("offset", buckets, scale_dtype)[of]
    return values


def decode_product(settings: Settings, parts: Parts, kind: str, shape: Shape) -> Array:
    block = settings.integer("block", None, 1, GROUPS)
    most = settings.integer("points", 256, 2, 65536)
    dtype = settings.choice("dtype", "float16", "bfloat16", "float32", "int8")
    settings.end()
    rows, columns = rows_and_columns(shape)
    blocks = -(-columns // block)
    count, _ = parts.shape("centroids", 2)
    must(1 <= count <= most, "number of centroids")
    if dtype == "int8":
        codes = parts.codes("centroids", (count, block), 256)
        centroids = (codes - 128).astype(np.float32) * parts.singles("scale", (1,), "float32")
    else:
        centroids = parts.singles("centroids", (count, block), dtype)
    indices = parts.codes("indices", (rows, blocks), count)
    values = centroids.reshape(count, block)[indices].reshape(rows, blocks * block)
    return values[:, :columns].reshape(-1)


def decode_mixed(settings: Settings, parts: Parts, kind: str, shape: Shape) -> Array:
    group = settings.integer("group", 8, 1, GROUPS)
    grid = settings.choice("grid", "endpoint", "symmetric")
    settings.end()
    n = math.prod(shape)
    widths = parts.codes("bits", (-(-n // group),), 17)
    width_of = widths[runs(n, group)]
    values = np.zeros(n, np.float32)
    if grid == "endpoint":
        low = parts.singles("low", (1,), "float32")
        span = parts.singles("high", (1,), "float32").astype(np.float64) - low
    else:
        span = 2 * parts.singles("range", (1,), "float32").astype(np.float64)
    for b in np.unique(widths[widths > 0]).tolist():
        chosen = width_of == b
        levels = parts.codes(f"levels{b}", (int(chosen.sum()),), 1 << b)
        step = (span / ((1 << b) - 1)).astype(np.float32)
        if grid == "endpoint":
            values[chosen] = levels.astype(np.float32) * step + low
        elif b > 1:
            values[chosen] = (levels - (1 << (b - 1))).astype(np.float32) * step
        else:
            values[chosen] = (2 * levels - 1).astype(np.float32) * (span / 4).astype(np.float32)
    return values


MACHINES = {
    4: (5, 2), 8: (11, 4), 16: (19, 4), 32: (37, 8), 64: (67, 20), 128: (157, 86), 256: (333, 242),
}  # fmt: skip


def decode_trellis(settings: Settings, parts: Parts, kind: str, shape: Shape) -> Array:
    states = settings.integer("states", 8, 4, 256)
    axis = settings.optional("axis", None, -len(shape), len(shape) - 1)
    scale_dtype = settings.choice("scale_dtype", *SCALES)
    settings.end()
    must(states in MACHINES, "states")
    count = 1 if axis is None else shape[axis]
    stored = (*shape[1:], *shape[:1])
    levels = parts.parts.get("levels")
    must(levels is None or not isinstance(levels.holds, int) or levels.holds <= 2**23, "alphabet")
    codes = parts.codes("levels", stored, None) - parts.codes("zero", (1,), 2**23)
    rows, columns = rows_and_columns(shape)
    machines = Machines(*MACHINES[states], rows)
    second = [machines.take(code & 1) for code in codes.tolist()]
    steps = (2 * codes + np.array(second, np.int64)).reshape(columns, rows).T.reshape(shape)
    scale = parts.singles("scale", (count,), scale_dtype)
    if axis is not None:
        scale = scale.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
    return np.asarray(steps.astype(np.float32) * scale).reshape(-1)


def decode_factors(settings: Settings, parts: Parts, kind: str, shape: Shape) -> Array:
    axis = settings.optional("axis", None, 0, 0)
    scale_dtype = settings.choice("scale_dtype", *SCALES)
    settings.end()
    rows, columns = rows_and_columns(shape)
    rank, _ = parts.shape("right", 2)
    must(rank <= min(rows, columns, 4096), "rank")
    alphabets = [parts.parts[name].holds for name in ("left", "right") if name in parts.parts]
    left, right = (
        parts.codes("left", (rows, rank), None),
        parts.codes("right", (rank, columns), None),
    )
    zeros = parts.codes("zero", (2,), 2**24).tolist()
    most = [max(z, int(a) - 1 - z) for z, a in zip(zeros, alphabets, strict=True)]
    must(most[0] * most[1] * rank < 2**53, "inexact sums")
    sums = (left.reshape(rows, rank) - zeros[0]) @ (right.reshape(rank, columns) - zeros[1])
    scale = parts.singles("scale", (1 if axis is None else rows,), scale_dtype)
    return np.asarray(sums.astype(np.float32) * scale[:, None]).reshape(-1)


FORMATS: dict[str, Callable[[Settings, Parts, str, Shape], Array]] = {
    "affine": decode_affine,
    "codebook": decode_codebook,
    "product": decode_product,
    "mixed": decode_mixed,
    "trellis": decode_trellis,
    "factors": decode_factors,
}


# Sections 1 and 2: the file and its index ---------------------------------------------------------


def columns(table: object, names: tuple[str, ...], shorter: str = "") -> list[dict[str, Any]]:
    """An object of arrays as an array of objects."""
    if not isinstance(table, dict) or set(table) != {*names, shorter} - {""}:
        raise ValueError("columns")
    must(all(isinstance(column, list) for column in table.values()), "columns")
    must(len({len(table[name]) for name in names}) == 1, "lengths of columns")
    return [dict(zip(names, row, strict=True)) for row in zip(*map(table.get, names), strict=True)]


def read_shape(value: object) -> Shape:
    if not isinstance(value, list) or len(value) > 32:
        raise ValueError("shape")
    must(all(is_int(length, 0, MANY) for length in value), "shape")
    must(math.prod(length or 1 for length in value) <= MANY, "shape")
    return tuple(value)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    must(len(dict(pairs)) == len(pairs), "field twice")
    return dict(pairs)


def no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def read_index(data: bytes) -> tuple[dict[str, Any], int]:
    """The index, and where it begins in the file."""
    must(len(data) >= 28, "too short for an archive")
    must(data[:8] == bytes.fromhex("8D 44 49 54 48 45 52 1A"), "magic")
    must(data[8:12] == b"\1\0\0\0", "version or features")
    must(data[-4:] == b"htid", "end mark")
    packed, unpacked, crc = (int.from_bytes(data[i : i + 4], "little") for i in (-16, -12, -8))
    begin = len(data) - 16 - packed
    must(begin >= 12 and unpacked <= 2**28, "lengths of the index")
    must(zlib.crc32(data[:12] + data[begin:-8]) == crc, "CRC of the index")
    unpack = zlib.decompressobj()
    try:
        text = unpack.decompress(data[begin:-16], unpacked + 1)
    except zlib.error as error:
        raise ValueError("index") from error
    must(unpack.eof and not unpack.unused_data and len(text) == unpacked, "length of the index")
    index = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=no_constant)
    required = {"formats", "tensors", "parts"}
    must(isinstance(index, dict) and required <= set(index), "fields of the index")
    must(set(index) <= required | {"aliases", "metadata", "sites", "base"}, "unknown field")
    must(isinstance(index["formats"], list), "formats")
    must(all(isinstance(item, dict) for item in index["formats"]), "format")
    must(isinstance(index.get("aliases", {}), dict), "aliases")
    must(isinstance(index.get("metadata", {}), dict), "metadata")
    must(isinstance(index.get("sites", {}), dict), "sites")
    must(all(isinstance(site, dict) for site in index.get("sites", {}).values()), "site")
    must(index.get("base") is None, "reserved field")
    return index, begin


def decode(data: bytes) -> dict[str, tuple[str, Shape, bytes]]:
    """Type, shape and little-endian bytes of every tensor of an archive, by name."""
    index, end = read_index(data)
    tensors = columns(index["tensors"], ("name", "format", "dtype", "shape", "parts"))
    parts = columns(index["parts"], ("name", "codec", "shape", "holds", "data"), "crc")
    names = [tensor["name"] for tensor in tensors]
    must(all(isinstance(name, str) for name in names), "name")
    must(len(set(names)) == len(names), "name twice")
    must(all(is_int(tensor["parts"], 0, 64) for tensor in tensors), "number of parts")
    must(sum(tensor["parts"] for tensor in tensors) == len(parts), "number of parts")

    lengths = [part["data"] for part in parts if not isinstance(part["data"], str)]
    must(all(is_int(length, 0, len(data)) for length in lengths), "length of a payload")
    must(len(index["parts"]["crc"]) == len(lengths), "number of CRCs")
    bounds = [12]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    must(bounds[-1] == end, "payloads and index")
    payloads = iter([data[a:b] for a, b in pairwise(bounds)])
    crcs = iter(index["parts"]["crc"])

    result: dict[str, tuple[str, Shape, bytes]] = {}
    rows = iter(parts)
    for tensor in tensors:
        shape, kind = read_shape(tensor["shape"]), tensor["dtype"]
        must(is_type(kind), "type of a tensor")
        of_tensor: dict[str, Part] = {}
        for _ in range(tensor["parts"]):
            part = next(rows)
            if isinstance(part["data"], str):
                must(re.fullmatch("([0-9a-fA-F]{2})*", part["data"]), "hexadecimal digits")
                payload = bytes.fromhex(part["data"])
            else:
                payload = next(payloads)
                must(zlib.crc32(payload) == next(crcs), "CRC of a payload")
            must(isinstance(part["name"], str), "name of a part")
            must(part["name"] not in of_tensor, "part twice")
            of_tensor[part["name"]] = decode_part(part, payload, shape)
        must(is_int(tensor["format"], 0, len(index["formats"]) - 1), "position of a format")
        values = decode_tensor(index["formats"][tensor["format"]], of_tensor, kind, shape)
        must(len(values) == math.prod(shape) * SIZES[kind], "size of a tensor")
        result[tensor["name"]] = kind, shape, values

    aliases = index.get("aliases", {})
    must(all(name in names and alias not in names for alias, name in aliases.items()), "alias")
    return result | {alias: result[name] for alias, name in aliases.items()}


def decode_part(row: dict[str, Any], payload: bytes, tensor_shape: Shape) -> Part:
    own = is_int(row["shape"], 0, 0)
    shape = tensor_shape if own else read_shape(row["shape"])
    holds, codec = row["holds"], row["codec"]
    if isinstance(holds, str):
        must(is_type(holds) and codec in ("raw", "rans"), "type or codec of a part")
        n, size = math.prod(shape), SIZES[holds]
        numbers = decode_planes(payload, n, size) if codec == "rans" else payload
        must(len(numbers) == n * size, "length of numbers")
        must(holds != "bool" or max(numbers, default=0) <= 1, "neither true nor false")
        return Part(shape, holds, np.frombuffer(numbers, np.uint8))
    must(is_int(holds, 1, 2**24) and codec in ("bits", "rans"), "alphabet or codec of a part")
    decoder = decode_rans if codec == "rans" else decode_bits
    return Part(shape, holds, decoder(payload, shape, holds))


def decode_tensor(settings: object, parts: dict[str, Part], kind: str, shape: Shape) -> bytes:
    if not isinstance(settings, dict):
        raise ValueError("format")
    name = str(settings.get("format"))
    left = Parts(parts)
    if name == "raw":
        values = decode_raw(Settings(settings), left, kind, shape)
    else:
        must(name in FORMATS and kind in FLOATING, "format, or a type that it cannot hold")
        with np.errstate(over="ignore", invalid="ignore"):  # infinite scales are allowed
            numbers = FORMATS[name](Settings(settings), left, kind, shape)
        assert numbers.dtype == np.float32
        values = restore(numbers, kind)
    must(not left.parts, "unknown part")
    return values
