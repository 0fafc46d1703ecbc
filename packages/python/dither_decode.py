"""Reads `.dither` files, version 1: one file, NumPy and the standard library, nothing else.

Written from docs/FORMAT.md alone, whose words it uses; it shares no code with the library.

    python dither_decode.py model.dither              # what is in it
    python dither_decode.py model.dither weights.npz  # the tensors, for numpy.load

    archive = dither_decode.Archive("model.dither")   # or its bytes
    weight = archive["encoder.weight"]                # one tensor, an array

NumPy has no bfloat16 and no float8: such tensors come as float32, exactly. `Archive.stored` gives
the bytes of every type as they are. What the page does not allow raises `DecodeError`.
"""

from __future__ import annotations

import json
import math
import re
import sys
import zlib
from collections import namedtuple
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Stored = tuple[str, Shape, bytes]
Payload = bytes | memoryview

SIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "complex64": 8, "complex128": 16, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "uint16": 2, "uint32": 4, "uint64": 8, "bool": 1}  # fmt: skip
FLOATING = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
COMPLEX = {"complex64": "float32", "complex128": "float64"}
# Bits of the exponent and of the fraction, and the largest finite value.
SMALL_FLOATS = {
    "float16": (5, 10, 65504.0), "bfloat16": (8, 7, 2.0**127 * (2 - 2.0**-7)),
    "float8_e4m3fn": (4, 3, 448.0), "float8_e5m2": (5, 2, 57344.0)}  # fmt: skip
CHUNK = 1 << 18  # values handled at once; a multiple of 8


class DecodeError(ValueError):
    """The file is damaged, or is none of this version."""


class LimitError(DecodeError):
    """Reading would take more memory or time than `max_nbytes` allows."""


def must(condition: object, what: str, error: type[DecodeError] = DecodeError) -> None:
    if not condition:
        raise error(what)


def is_int(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def is_type(value: object) -> bool:
    return isinstance(value, str) and value in SIZES


# Section 3: bits and numbers ----------------------------------------------------------------------


def width(alphabet: int) -> int:
    return (alphabet - 1).bit_length()


class Reader:
    """Takes bits off the front of a payload, from the lowest of each byte, and whole bytes."""

    def __init__(self, data: Payload) -> None:
        self.data, self.at = memoryview(data), 0

    def left(self) -> int:
        return len(self.data) - self.at // 8

    def u(self, count: int) -> int:
        begin, self.at = self.at, self.at + count
        must(self.at <= 8 * len(self.data), "payload too short")
        piece = int.from_bytes(self.data[begin // 8 : (self.at + 7) // 8], "little")
        return piece >> begin % 8 & ((1 << count) - 1)

    def zeros(self) -> int:
        """The number of zero bits up to the next one bit, which is read, too."""
        begin = self.at
        while True:
            must(self.left() > 0, "payload too short")
            if rest := self.data[self.at // 8] >> self.at % 8:
                self.at += (rest & -rest).bit_length()
                return self.at - begin - 1
            self.at = (self.at | 7) + 1

    def gamma(self) -> int:
        count = self.zeros()
        must(count <= 32, "gamma too long")
        return self.u(count) + (1 << count)

    def rice(self, k: int) -> int:
        return self.zeros() << k | self.u(k)

    def take(self, count: int | None = None) -> memoryview:
        """Bytes, up to the end by default; bits of a byte that was begun must be 0."""
        must(not self.u(-self.at % 8), "unused bits")
        count = self.left() if count is None else count
        must(count <= self.left(), "payload too short")
        self.at += 8 * count
        return self.data[self.at // 8 - count : self.at // 8]

    def packed(self, count: int, bits: int) -> Array:
        """Numbers of at most 24 bits, int32, which begin and end at a whole byte."""
        piece = np.frombuffer(bytes(self.take((count * bits + 7) // 8)) + bytes(4), np.uint8)
        must(not count * bits % 8 or not piece[-5] >> count * bits % 8, "unused bits")
        numbers = np.zeros(count, np.int32)
        for start in range(0, count if bits else 0, CHUNK):
            at = np.arange(start, min(start + CHUNK, count)) * bits
            word = sum(piece[(at >> 3) + i].astype(np.int64) << 8 * i for i in range(4))
            numbers[start : start + CHUNK] = word >> (at & 7) & ((1 << bits) - 1)
        return numbers


# Section 3: tables --------------------------------------------------------------------------------

E = [int(2 ** (12 + i / 16)) for i in range(16)]
F = [int(2 ** (15 + i / 64)) for i in range(64)]

Levels = dict[int, int]  # symbol -> level, in the order of the symbols
Described = namedtuple("Described", "kind settings levels")


def read_table(head: Reader, size: int, escaped: bool, precision: int) -> Described:
    kind, settings, levels = head.u(2), tuple[int, ...](), Levels()
    if kind < 2:
        settings = r, g, k = head.u(3), head.u(2), head.u(3)
        levels = read_steps(head, size + escaped, kind == 1, r, g, k)
    else:
        must(size <= 4096 and size + escaped <= 1 << precision, "curve too wide")
        c, s, f = head.u(width(4 * size - 3)), head.u(7), head.u(3)
        settings = (t := head.u(6) - 32 if kind == 3 else 0,)
        levels = curve(size, kind == 3, c, s, (2, 3, 4, 5, 6, 7, 8, 10)[f], t)
        levels |= {size: head.u(8)} if escaped else {}
    must(len(levels) <= 1 << precision, "too many symbols")
    return Described(kind, settings, levels)


def read_steps(head: Reader, count: int, gapped: bool, r: int, g: int, k: int) -> Levels:
    limit, symbol = 16 * 2**r - 1, head.gamma() - 1 if gapped else 0
    must(r <= 4 and g <= 2 and symbol < count, "settings of a table")
    v1 = v2 = head.u(4 + r)
    levels = {symbol: v1 << (4 - r)}
    while (symbol := symbol + 1) < count:
        z = head.rice(k)
        if gapped and z == 0:
            symbol += head.gamma()
            must(symbol <= count, "run beyond the table")
            if symbol == count:
                break
            z = head.rice(k) + 1
        z -= gapped
        prediction = min(max(v1 + ((v1 - v2) * g >> 1), 0), limit)
        v1, v2 = prediction + (-(z + 1) // 2 if z % 2 else z // 2), v1
        must(0 <= v1 <= limit, "value of a table")
        levels[symbol] = v1 << (4 - r)
    return levels


def curve(size: int, spiked: bool, c: int, s: int, b: int, t: int) -> Levels:
    must(c <= 4 * (size - 1), "centre")
    levels = {}
    for x in range(size):
        d, drop = abs(4 * x - c), 0
        if d:
            y = (b * ((d**64).bit_length() - 1 - 8 * s)) >> 2
            drop = (F[y & 63] << 4) >> (15 - min(max(y >> 6, -16), 4))
        levels[x] = max(255 - min(drop, 255) - max(4 * t, 0), 0)
    return levels | ({(c + 2) >> 2: 255 + min(4 * t, 0)} if spiked else {})


def frequencies(weights: list[int], total: int) -> list[int]:
    weight, count = sum(weights), len(weights)
    f = [max(w * total // weight, 1) for w in weights]
    if sum(f) > total:
        excess = sum(f) - count
        f = [1 + (x - 1) * (total - count) // excess for x in f]
    order = sorted(range(count), key=lambda i: (-(weights[i] * 2**17 // (2 * f[i] + 1)), i))
    for i in order[: total - sum(f)]:
        f[i] += 1
    return f


def slots(levels: Levels, precision: int) -> tuple[Array, Array, Array, Array]:
    """Symbols by rank; and by slot the symbol, its frequency, and the slot less its start."""
    f = frequencies([E[v & 15] << (v >> 4) for v in levels.values()], 1 << precision)
    symbols, bias = np.array(list(levels), np.int32), np.arange(1 << precision)
    bias -= np.repeat(np.cumsum([0, *f[:-1]]), f)
    return symbols, np.repeat(symbols, f), np.repeat(np.array(f), f), bias


# Section 3: codecs --------------------------------------------------------------------------------

Head = namedtuple("Head", "precision lanes window stride machine contexts offset axes tables")
Window = namedtuple("Window", "shift begin size escapes highs")
Axis = namedtuple("Axis", "axis classes coded")  # bytes if they are coded, or None


def read_head(head: Reader, shape: Shape, alphabet: int) -> Head:
    windowed, contextual, laned = head.u(1), head.u(1), head.u(1)
    precision, steered, reserved = head.u(3) + 8, head.u(1), head.u(1)
    exponent = head.u(4) if laned else 0
    must(not reserved and exponent >= laned, "reserved bit, or lanes")
    shift, begin, size, escapes = 0, 0, alphabet, 0
    if windowed:
        shift, begin, size, escapes = head.u(5), head.gamma() - 1, head.gamma(), head.gamma() - 1
    window = Window(shift, begin, size, escapes, highs := -(-alphabet >> shift))
    must(shift < 24 and begin + size <= highs and escapes <= math.prod(shape), "window")
    machine, stride = None, shape[-1] if len(shape) > 1 else 1
    if steered:
        machine = a, b = head.gamma(), head.gamma()
        must(a % 2 == 1 and 3 <= a < 512, "machine")
        must(b % 2 == 0 and 0 < b < 1 << a.bit_length(), "machine")
        must(shift == escapes == 0 and 1 << exponent <= stride, "machine")
    contexts, offset, axes = 1, 0, []
    if contextual:
        contexts, offset = head.u(4) + 1, head.gamma() - 1
        must(len(shape) <= 8 and contexts >= 2 and offset <= 120, "contexts")
        for axis in range(len(shape)):
            if head.u(1):
                axes.append(Axis(axis, head.u(4) + 1, head.gamma() if head.u(1) else None))
        must(axes, "contexts without classes")
    tables = [read_table(head, size, escapes > 0, precision) for _ in range(contexts << steered)]
    return Head(precision, 1 << exponent, window, stride, machine, contexts, offset, axes, tables)


def decode_rans(payload: Payload, shape: Shape, alphabet: int, plain: bool = False) -> Array:
    n, data = math.prod(shape), Reader(payload)
    must(1 <= n <= 2**31 and alphabet >= 2, "codec not allowed here")
    head = read_head(data, shape, alphabet)
    must(not plain or not (head.axes or head.machine), "contexts not allowed here")
    context = np.full(shape, -head.offset, np.int16)
    for axis, classes, coded in head.axes:
        if coded is None:
            of_axis = data.packed(shape[axis], width(classes))
        else:
            of_axis = decode_rans(data.take(coded), (shape[axis],), classes, plain=True)
        must((of_axis < classes).all(), "class")
        context += along(of_axis.astype(np.int16), axis, shape)
    shift, begin, size, escapes, highs = head.window
    low = data.packed(n, shift) if shift else 0
    escaped = data.packed(escapes, width(highs))
    must(((escaped < begin) | (escaped >= begin + size)).all(), "escape within the window")
    context = np.clip(context.reshape(-1), 0, head.contexts - 1)
    tables = [slots(table.levels, head.precision) for table in head.tables]
    high = decode_stream(data, tables, context, head)
    escapes_at = np.flatnonzero(high == size)
    must(len(escapes_at) == escapes, "number of escapes")
    high += np.int32(begin)
    high[escapes_at] = escaped
    codes = (high << shift) | low
    must((codes < alphabet).all(), "code beyond the alphabet")
    return np.asarray(codes)


def read_states(data: Reader, lanes: int) -> Array:
    if lanes == 1:
        state = int.from_bytes(data.take(count := 3 if data.left() % 2 else 4), "little")
        must(state >= (2**16 if count == 3 else 2**24), "state")
        return np.array([state])
    lows, lengths = data.packed(lanes, 16), data.packed(lanes, 4).tolist()
    highs = np.array([data.u(b) + (1 << b) for b in lengths])
    data.take(0)
    return highs << 16 | lows


def step(register: Any, code: Any, a: int, b: int) -> Any:
    """A machine's register, whose bit `j - 1` is what `j` steps bring, after another code."""
    return register >> 1 ^ (register & 1) * (a >> 1) ^ (code & 1) * (b >> 1)


def decode_stream(data: Reader, tables: Any, context: Array, head: Head) -> Array:
    """The symbol of every element, int32."""
    n, lanes, most = len(context), head.lanes, max(len(table[0]) for table in tables)
    if most == 1:
        must(not data.left() and lanes == 1 and not head.machine, "stream of single symbols")
        return np.concatenate([table[0] for table in tables])[context]
    bits, rows = width(most), -(-n // lanes)
    must(rows <= 2**16 and lanes <= n, "lanes")
    body = (rows - min(16 // bits, rows)) * lanes
    state = read_states(data, lanes)
    must(data.left() % 2 == 0, "half a word")
    words, used = np.frombuffer(data.take(), "<u2").astype(np.int64), 0
    symbol, frequency, bias = (np.concatenate(c) for c in list(zip(*tables, strict=True))[1:])
    by_rank = np.full((len(tables), 1 << bits), -1, np.int32)
    for row, table in zip(by_rank, tables, strict=True):
        row[: len(table[0])] = table[0]
    registers, out = np.zeros(head.stride, np.int64), np.empty(n, np.int32)
    tables_at = context.astype(np.int32) << head.precision
    for start in range(0, n, lanes):
        slot = tables_at[start : start + lanes]
        if head.machine:
            at = np.arange(start, start + len(slot)) % head.stride
            slot = slot + ((registers[at] & 1) * head.contexts << head.precision)
        if start < body:
            slot = state & ((1 << head.precision) - 1) | slot
            found = symbol[slot]
            state = frequency[slot] * (state >> head.precision) + bias[slot]
            low = (state < 65536).nonzero()[0]
            must(used + len(low) <= len(words), "payload too short")
            state[low] = state[low] << 16 | words[used : used + len(low)]
            used += len(low)
        else:
            if start == body:
                must(used == len(words) and (state >> 16 == 1).all(), "words left over, or state")
                state = state & 0xFFFF
            found = by_rank[slot >> head.precision, state[: len(slot)] & ((1 << bits) - 1)]
            must((found >= 0).all(), "rank")
            state[: len(slot)] >>= bits
        out[start : start + lanes] = found
        if head.machine:
            registers[at] = step(registers[at], found + head.window.begin, *head.machine)
    must(not state.any(), "unused bits")
    return out


def read_planes(head: Reader, size: int) -> tuple[int, list[int | None]]:
    """Whether numbers are rotated, and the bytes of each coded plane."""
    return head.u(1), [head.gamma() if head.u(1) else None for _ in range(size)]


def decode_planes(payload: Payload, m: int, size: int) -> Any:
    must(m >= 1, "codec not allowed here")
    data, planes = Reader(payload), np.empty((m, size), np.uint8)
    rotated, lengths = read_planes(data, size)
    for j, length in enumerate(lengths):
        if length is None:
            planes[:, j] = np.frombuffer(data.take(m), np.uint8)
        else:
            planes[:, j] = decode_rans(data.take(length), (m,), 256, plain=True)
    must(not data.left(), "bytes left over")
    return (planes >> 1 | np.roll(planes, -1, axis=1) << 7 if rotated else planes).tobytes()


# Types of numbers ---------------------------------------------------------------------------------


def to_numbers(data: bytes, kind: str) -> Array:
    """The numbers of a floating type, exactly: float64 of that, float32 of the others."""
    if kind not in SMALL_FLOATS:
        return np.frombuffer(data, np.dtype(kind).newbyteorder("<")).astype(kind)
    exponent_bits, fraction_bits, _ = SMALL_FLOATS[kind]
    code = np.arange(1 << (exponent_bits + fraction_bits))
    exponent, fraction = code >> fraction_bits, (code & ((1 << fraction_bits) - 1)) * 1.0
    fraction[exponent > 0] += 1 << fraction_bits
    lowest = 2 - 2 ** (exponent_bits - 1) - fraction_bits
    table = np.ldexp(fraction, np.maximum(exponent, 1) - 1 + lowest)
    table[-1] = math.nan
    if kind != "float8_e4m3fn":  # which has no infinities
        table[-(1 << fraction_bits) :], table[-(1 << fraction_bits)] = math.nan, math.inf
    both = np.concatenate([table, -table]).astype(np.float32)
    return np.asarray(both[np.frombuffer(data, f"<u{SIZES[kind]}")])


def restore(values: Array, kind: str, clamp: bool = True) -> bytes:
    """Floating-point numbers in a type, rounded to nearest even."""
    if kind not in SMALL_FLOATS:
        return values.astype(np.dtype(kind).newbyteorder("<")).tobytes()
    if len(values) > CHUNK:
        pieces = (values[i : i + CHUNK] for i in range(0, len(values), CHUNK))
        return b"".join(restore(piece, kind, clamp) for piece in pieces)
    doubles = values.astype(np.float64)
    exponent_bits, fraction_bits, largest = SMALL_FLOATS[kind]
    lowest = 2 - 2 ** (exponent_bits - 1)  # the exponent of the smallest normal number
    magnitude = np.nan_to_num(np.abs(doubles), posinf=math.inf)
    if not clamp and kind != "float8_e4m3fn":  # which has no infinities
        largest *= 2
    magnitude = np.minimum(magnitude, largest)
    exponent = np.maximum(np.frexp(magnitude)[1].astype(np.int64) - 1, lowest)
    exponent[magnitude == 0] = lowest
    steps = np.rint(np.ldexp(magnitude, fraction_bits - exponent)).astype(np.int64)
    code = ((exponent - lowest) << fraction_bits) + steps
    if kind != "float8_e4m3fn":
        code = np.minimum(code, ((1 << exponent_bits) - 1) << fraction_bits)  # infinity
    code[np.isnan(doubles)] = (1 << (exponent_bits + fraction_bits)) - 1
    code |= np.signbit(doubles).astype(np.int64) << (exponent_bits + fraction_bits)
    return bytes(code.astype(f"<u{SIZES[kind]}").tobytes())


# Section 4: formats -------------------------------------------------------------------------------

Part = namedtuple("Part", "shape holds values")  # int32 codes, or the bytes of numbers


class Parts:
    """The parts of one tensor; each is taken once, and at the end none may be left."""

    def __init__(self, parts: dict[str, Part]) -> None:
        self.parts = parts

    def peek(self, name: str, axes: int) -> Part:
        must(name in self.parts and len(self.parts[name].shape) == axes, f"part {name}: shape")
        return self.parts[name]

    def take(self, name: str, shape: Shape, holds: int | str) -> Any:
        part = self.peek(name, len(shape))
        must(part.shape == shape and part.holds == holds, f"part {name}: shape or what it holds")
        return self.parts.pop(name).values

    def codes(self, name: str, shape: Shape, alphabet: int | None = None) -> Array:
        own = self.peek(name, len(shape)).holds
        must(type(own) is int, f"part {name}: codes")
        return np.asarray(self.take(name, shape, own if alphabet is None else alphabet))

    def singles(self, name: str, shape: Shape, kind: str) -> Array:
        return to_numbers(self.take(name, shape, kind), kind)


def along(values: Array, axis: int | None, shape: Shape) -> Array:
    """One number for each index of an axis (or one for all), as it broadcasts to the shape."""
    at = None if axis is None else axis % len(shape)
    return values.reshape([-1 if i == at else 1 for i in range(len(shape))])


def spread(values: Array, rows: int, columns: int, run: int) -> Array:
    """One number for each run of columns of each row, repeated for each column."""
    values = values.reshape(rows, -(-columns // (run := min(run, max(columns, 1)))))
    return np.repeat(values, run, axis=1)[:, :columns].reshape(-1)


def rows_and_columns(shape: Shape) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def scales_of(given: Any, shape: Shape) -> int:
    """How many scales there are, by the settings `axis` and `group`."""
    axis, (rows, columns) = given["axis"], rows_and_columns(shape)
    must(axis is None or -len(shape) <= axis < len(shape), "setting axis")
    if given.get("group"):
        return rows * -(-columns // int(given["group"]))
    return 1 if axis is None else shape[axis]


def decode_raw(given: Any, parts: Parts, kind: str, shape: Shape) -> bytes:
    stored: str = given["dtype"] or kind
    data = bytes(parts.take("values", shape, stored))
    if stored == kind:
        return data
    if kind in COMPLEX:
        kind, stored = COMPLEX[kind], COMPLEX.get(stored, stored + " is not complex")
    must(kind in FLOATING and stored in FLOATING, "stored type")
    return restore(to_numbers(data, stored), kind, clamp=False)


def decode_affine(given: Any, parts: Parts, kind: str, shape: Shape) -> Array:
    bits, group, grid, scale_dtype = (given[k] for k in ("bits", "group", "grid", "scale_dtype"))
    count = (scales_of(given, shape),)

    def each(values: Array) -> Array:
        if group is not None:
            return spread(values, *rows_and_columns(shape), group).reshape(shape)
        return along(values, given["axis"], shape)

    levels = parts.codes("levels", shape, 1 << bits if bits else None).reshape(shape)
    scale = each(parts.singles("scale", count, scale_dtype))
    if grid == "endpoint":
        offset = each(parts.singles("offset", count, scale_dtype))
        return (levels.astype(np.float32) * scale + offset).reshape(-1)
    if bits is None:
        steps = levels - parts.codes("zero", (1,), 2**24)[0]
    elif grid == "asymmetric":
        steps = levels - each(parts.codes("zero", count, 1 << bits))
    else:
        steps = 2 * levels - 1 if bits == 1 else levels - (1 << (bits - 1))
    return np.asarray(steps.astype(np.float32) * scale).reshape(-1)


def decode_codebook(given: Any, parts: Parts, kind: str, shape: Shape) -> Array:
    n, bucket, scale_dtype = math.prod(shape), given["bucket"], given["scale_dtype"]
    (count,) = parts.peek("points", 1).shape
    must(1 <= count <= given["points"], "number of points")
    points = parts.singles("points", (count,), given["dtype"])
    values = points[parts.codes("indices", shape, count)]
    if bucket is not None:
        values *= spread(parts.singles("scale", (-(-n // bucket),), scale_dtype), 1, n, bucket)
    if given["shift"]:
        values += spread(parts.singles("offset", (-(-n // bucket),), scale_dtype), 1, n, bucket)
    return values


def decode_product(given: Any, parts: Parts, kind: str, shape: Shape) -> Array:
    block, dtype, (rows, columns) = given["block"], given["dtype"], rows_and_columns(shape)
    count, _ = parts.peek("centroids", 2).shape
    must(1 <= count <= given["points"], "number of centroids")
    if dtype == "int8":
        codes = parts.codes("centroids", (count, block), 256)
        centroids = (codes - 128).astype(np.float32) * parts.singles("scale", (1,), "float32")
    else:
        centroids = parts.singles("centroids", (count, block), dtype)
    indices = parts.codes("indices", (rows, -(-columns // block)), count)
    within = centroids.reshape(count, block)[:, : max(columns, 1)]
    values = within[indices].reshape(rows, -(-columns // block) * within.shape[1])
    return values[:, :columns].reshape(-1)


def decode_mixed(given: Any, parts: Parts, kind: str, shape: Shape) -> Array:
    n, group, endpoint = math.prod(shape), given["group"], given["grid"] == "endpoint"
    widths = parts.codes("bits", (-(-n // group),), 17)
    width_of, values = spread(widths, 1, n, group), np.zeros(n, np.float32)
    if endpoint:
        low = parts.singles("low", (1,), "float32")
        span = parts.singles("high", (1,), "float32").astype(np.float64) - low
    else:
        span = 2 * parts.singles("range", (1,), "float32").astype(np.float64)
    for b in np.unique(widths[widths > 0]).tolist():
        chosen = width_of == b
        levels = parts.codes(f"levels{b}", (int(chosen.sum()),), 1 << b)
        if not endpoint:
            levels = levels - (1 << (b - 1)) if b > 1 else 2 * levels - 1
        step = span / 4 if b == 1 and not endpoint else span / ((1 << b) - 1)
        levels = levels.astype(np.float32) * step.astype(np.float32)
        values[chosen] = levels + low if endpoint else levels
    return values


MACHINES = {4: (5, 2), 8: (11, 4), 16: (19, 4), 32: (37, 8),
            64: (67, 20), 128: (157, 86), 256: (333, 242)}  # fmt: skip


def decode_trellis(given: Any, parts: Parts, kind: str, shape: Shape) -> Array:
    alphabet = parts.peek("levels", len(shape)).holds
    codes = parts.codes("levels", (*shape[1:], *shape[:1]))
    must(alphabet <= 2**23, "alphabet of levels")
    codes = codes - parts.codes("zero", (1,), 2**23)
    scale = parts.singles("scale", (scales_of(given, shape),), given["scale_dtype"])
    rows, columns = rows_and_columns(shape)
    codes, registers = codes.reshape(columns, rows), np.zeros(rows, np.int32)
    for column in codes if codes.size else ():
        second = registers & 1
        registers = step(registers, column, *MACHINES[given["states"]])
        column += column + second
    values = codes.T.reshape(shape).astype(np.float32)
    return np.asarray(values * along(scale, given["axis"], shape)).reshape(-1)


def decode_factors(given: Any, parts: Parts, kind: str, shape: Shape) -> Array:
    rows, columns = rows_and_columns(shape)
    alphabets = [parts.peek(name, 2).holds for name in ("left", "right")]
    rank, _ = parts.peek("right", 2).shape
    must(rank <= min(rows, columns, 4096), "rank")
    left = parts.codes("left", (rows, rank)).reshape(rows, rank)
    right = parts.codes("right", (rank, columns)).reshape(rank, columns)
    zeros = parts.codes("zero", (2,), 2**24).tolist()
    most = [max(z, a - 1 - z) for z, a in zip(zeros, alphabets, strict=True)]
    must(most[0] * most[1] * rank < 2**53, "inexact sums")
    scale = parts.singles("scale", (rows if given["axis"] == 0 else 1,), given["scale_dtype"])
    values = np.empty((rows, columns), np.float32)
    factor, size = (right - zeros[1]).astype(np.float64), max(1, CHUNK // max(rank, columns, 1))
    for start in range(0, rows if values.size else 0, size):  # sums that doubles hold are exact
        values[start : start + size] = (left[start : start + size] - float(zeros[0])) @ factor
    return (np.where(values == 0, np.float32(0), values) * scale[:, None]).reshape(-1)


COUNT, SCALES = range(1, 2**24 + 1), ("float32", "float16", "bfloat16")
AXIS, SCALE = ("axis", None, (None, range(-64, 64))), ("scale_dtype", "float32", SCALES)
# Of each format: its decoder, and the name, default and allowed values of its settings.
FORMATS: dict[str, tuple[Any, list[tuple[str, Any, tuple[Any, ...]]]]] = {
    "raw": (decode_raw, [("dtype", None, (None, *SIZES))]),
    "affine": (decode_affine, [
        ("bits", 8, (None, range(1, 17))), AXIS, ("group", None, (None, COUNT)), SCALE,
        ("grid", "symmetric", ("symmetric", "asymmetric", "endpoint"))]),
    "codebook": (decode_codebook, [
        ("points", None, (range(2, 65537),)), ("bucket", None, (None, COUNT)), SCALE,
        ("shift", False, (False, True)), ("dtype", "float16", SCALES)]),
    "product": (decode_product, [
        ("block", None, (COUNT,)), ("points", 256, (range(2, 65537),)),
        ("dtype", "float16", (*SCALES, "int8"))]),
    "mixed": (decode_mixed, [
        ("group", 8, (COUNT,)), ("grid", "endpoint", ("endpoint", "symmetric"))]),
    "trellis": (decode_trellis, [
        ("states", 8, tuple(range(s, s + 1) for s in MACHINES)), AXIS, SCALE]),
    "factors": (decode_factors, [("axis", None, (None, range(1))), SCALE])}  # fmt: skip


def is_one_of(value: object, allowed: tuple[Any, ...]) -> bool:
    if type(value) is int:
        return any(isinstance(a, range) and value in a for a in allowed)
    return any(value is a or (isinstance(value, str) and value == a) for a in allowed)


def read_format(given: object) -> tuple[str, dict[str, Any]]:
    """Name and settings of a format, defaults included."""
    left: dict[str, Any] = dict(given) if isinstance(given, dict) else {}
    name, version = left.pop("format", None), left.pop("version", None)
    must(isinstance(name, str) and name in FORMATS and is_int(version, 1, 1), "unknown format")
    found = {key: left.pop(key, default) for key, default, _ in FORMATS[name][1]}
    for key, _, allowed in FORMATS[name][1]:
        must(is_one_of(found[key], allowed), f"setting {key} of a format")
    if name == "affine":
        must(found["axis"] is None or found["group"] is None, "both axis and group")
        must(found["bits"] is not None or found["grid"] == "symmetric", "grid")
    must(not left and (found.get("bucket") or not found.get("shift")), "settings of a format")
    return name, found


# Sections 1 and 2: the file and its index ---------------------------------------------------------


def columns_of(table: Any, names: tuple[str, ...], shorter: str = "") -> list[dict[str, Any]]:
    """An object of arrays as an array of objects."""
    must(isinstance(table, dict) and set(table) == {*names, shorter} - {""}, "columns")
    must(all(isinstance(column, list) for column in table.values()), "columns")
    must(len({len(table[name]) for name in names}) == 1, "lengths of columns")
    return [dict(zip(names, row, strict=True)) for row in zip(*map(table.get, names), strict=True)]


def read_shape(value: Any) -> Shape:
    must(isinstance(value, list) and len(value) <= 32, "shape")
    must(all(is_int(length, 0, 2**46) for length in value), "shape")
    must(math.prod(length or 1 for length in value) <= 2**46, "shape")
    return tuple(value)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    must(len(dict(pairs)) == len(pairs), "field twice")
    return dict(pairs)


def no_constant(text: str) -> None:
    raise DecodeError(f"{text} is not JSON")


def read_index(data: bytes) -> tuple[dict[str, Any], int]:
    """The index, and where it begins in the file."""
    must(len(data) >= 28 and data[:8] == b"\x8dDITHER\x1a", "no .dither file")
    must(data[8:12] == b"\1\0\0\0", "version or features, such as differences to a base")
    must(data[-4:] == b"htid", "end mark: the file is cut off")
    packed, unpacked, crc = (int.from_bytes(data[i : i + 4], "little") for i in (-16, -12, -8))
    begin, unpack = len(data) - 16 - packed, zlib.decompressobj()
    must(begin >= 12 and unpacked <= 2**28, "lengths of the index")
    must(unpacked <= 2**20 + 64 * len(data), "index out of proportion", LimitError)
    must(zlib.crc32(data[:12] + data[begin:-8]) == crc, "CRC of the index")
    try:
        text = unpack.decompress(data[begin:-16], unpacked + 1)
        must(unpack.eof and not unpack.unused_data and len(text) == unpacked, "length of the index")
        index = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=no_constant)
    except (zlib.error, ValueError, RecursionError) as error:
        raise DecodeError(f"index: {error}") from error
    required, optional = {"formats", "tensors", "parts"}, ("aliases", "metadata", "sites")
    allowed = required | {*optional, "base"}
    must(isinstance(index, dict) and required <= set(index) <= allowed, "fields of the index")
    must(isinstance(index["formats"], list) and index.get("base") is None, "formats or base")
    must(all(isinstance(index.setdefault(name, {}), dict) for name in optional), "fields")
    must(all(isinstance(site, dict) for site in index["sites"].values()), "site")
    return index, begin


Tensor = namedtuple("Tensor", "dtype shape format parts")  # parts: rows of the index by name


class Archive(Mapping[str, Array]):
    """The tensors of a file by name, aliases included; each is decoded when it is asked for."""

    def __init__(self, file: str | Path | bytes, max_nbytes: int | None = None) -> None:
        """Read the index. Codes, numbers and values count 16 bytes each against `max_nbytes`."""
        data = file if isinstance(file, bytes) else Path(file).read_bytes()
        self.max_nbytes = max(2**32, 256 * len(data)) if max_nbytes is None else max_nbytes
        index, end = read_index(data)
        formats, at = [read_format(item) for item in index["formats"]], 12
        rows = columns_of(index["tensors"], ("name", "format", "dtype", "shape", "parts"))
        parts = columns_of(index["parts"], ("name", "codec", "shape", "holds", "data"), "crc")
        crcs, left = iter(index["parts"]["crc"]), iter(parts)
        self.tensors: dict[str, Tensor] = {}
        for row in rows:
            name, kind, which, count = (row[k] for k in ("name", "dtype", "format", "parts"))
            must(isinstance(name, str) and name not in self.tensors, "name")
            must(is_type(kind) and is_int(count, 0, 64), "type, or number of parts")
            must(is_int(which, 0, len(formats) - 1), "position of a format")
            shape, own = read_shape(row["shape"]), {}
            for part in islice(left, count):
                must(isinstance(part["name"], str) and isinstance(part["codec"], str), "part")
                must(is_type(part["holds"]) or is_int(part["holds"], 1, 2**24), "holds")
                part["shape"] = shape if is_int(part["shape"], 0, 0) else read_shape(part["shape"])
                own[part["name"]], part["crc"] = part, None
                if isinstance(part["data"], str):
                    must(re.fullmatch("([0-9a-fA-F]{2})*", part["data"]), "hexadecimal digits")
                    part["payload"] = bytes.fromhex(part["data"])
                    continue
                part["crc"] = next(crcs, None)
                must(is_int(part["data"], 0, end - at), "length of a payload")
                must(is_int(part["crc"], 0, 2**32 - 1), "CRC of a payload")
                part["payload"] = memoryview(data)[at : at + part["data"]]
                at += part["data"]
            must(len(own) == count, "number or names of parts")
            self.tensors[name] = Tensor(kind, shape, formats[which], own)
        must(at == end and not any(True for rest in (left, crcs) for _ in rest), "parts")
        self.aliases: dict[str, str] = index["aliases"]
        must(not self.aliases.keys() & self.tensors.keys(), "alias of a tensor's name")
        must(all(isinstance(n, str) and n in self.tensors for n in self.aliases.values()), "alias")
        self.metadata, self.sites = index["metadata"], index["sites"]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.tensors, *self.aliases])

    def __len__(self) -> int:
        return len(self.tensors) + len(self.aliases)

    def __getitem__(self, name: str) -> Array:
        kind, shape, data = self.stored(name)
        if kind in SMALL_FLOATS and kind != "float16":
            return to_numbers(data, kind).reshape(shape)
        return np.frombuffer(data, np.dtype(kind).newbyteorder("<")).astype(kind).reshape(shape)

    def stored(self, name: str) -> Stored:
        """Type, shape and little-endian bytes of a tensor, whose parts are checked."""
        tensor = self.tensors[self.aliases.get(name, name)]
        self.check_limit(tensor)
        try:
            return tensor.dtype, tensor.shape, decode_tensor(tensor)
        except DecodeError as error:
            raise DecodeError(f"tensor {name!r}: {error}") from error

    def check_limit(self, tensor: Tensor) -> None:
        counts = {name: math.prod(part["shape"]) for name, part in tensor.parts.items()}
        count, products = math.prod(tensor.shape) + sum(counts.values()), 0
        if tensor.format[0] == "factors":
            products = counts.get("right", 0) * rows_and_columns(tensor.shape)[0]
        what = f"{16 * count} bytes and {products} products, more than max_nbytes={self.max_nbytes}"
        fits = 16 * count <= self.max_nbytes and products <= 128 * self.max_nbytes
        must(fits, f"a tensor takes {what}; if you trust the file, give more", LimitError)


def decode_tensor(tensor: Tensor) -> bytes:
    (name, settings), parts = tensor.format, {n: decode_part(p) for n, p in tensor.parts.items()}
    must(name == "raw" or tensor.dtype in FLOATING, "a type that the format cannot hold")
    with np.errstate(over="ignore", invalid="ignore"):  # infinite scales are allowed
        values = FORMATS[name][0](settings, Parts(parts), tensor.dtype, tensor.shape)
        must(not parts, "unknown part")
        return values if isinstance(values, bytes) else restore(values, tensor.dtype)


def decode_part(row: dict[str, Any]) -> Part:
    payload, shape, holds, codec = (row[k] for k in ("payload", "shape", "holds", "codec"))
    must(row["crc"] is None or zlib.crc32(payload) == row["crc"], "CRC of a payload")
    must(codec in ("raw" if isinstance(holds, str) else "bits", "rans"), "codec of a part")
    n, data = math.prod(shape), Reader(payload)
    if isinstance(holds, str):
        size = SIZES[holds]
        values = decode_planes(payload, n, size) if codec == "rans" else bytes(payload)
        must(len(values) == n * size, "length of numbers")
        must(holds != "bool" or max(values, default=0) <= 1, "neither true nor false")
    elif codec == "rans":
        values = decode_rans(payload, shape, holds)
    else:
        values = data.packed(n, width(holds))
        must(not data.left() and (values < holds).all(), "bytes left over, or codes too large")
    return Part(shape, holds, values)


def decode(data: bytes, max_nbytes: int | None = None) -> dict[str, Stored]:
    """Type, shape and little-endian bytes of every tensor of a file, by name."""
    archive = Archive(data, max_nbytes)
    return {name: archive.stored(name) for name in archive}


def main() -> None:
    file, *out = sys.argv[1:] or sys.exit("usage: python dither_decode.py FILE [TENSORS.npz]")
    try:
        archive = Archive(file)
        for name, tensor in archive.tensors.items():
            print(f"{tensor.dtype:14} {'x'.join(map(str, tensor.shape)):20} {name!r}")
        if out:
            np.savez(out[0], **dict(archive.items()))  # type: ignore[arg-type]
    except (DecodeError, OSError) as error:
        sys.exit(f"{file}: {error}")


if __name__ == "__main__":
    main()
