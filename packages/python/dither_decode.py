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
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Stored = tuple[str, Shape, bytes]

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


# Section 3: bits and numbers ----------------------------------------------------------------------


def width(alphabet: int) -> int:
    return (alphabet - 1).bit_length()


class Bytes:
    """Takes pieces off the front of a payload."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = memoryview(data)

    def take(self, count: int) -> memoryview:
        must(count <= len(self.data), "payload too short")
        piece, self.data = self.data[:count], self.data[count:]
        return piece

    def packed(self, count: int, bits: int) -> Array:
        """Numbers of at most 24 bits, int32."""
        piece = np.frombuffer(bytes(self.take((count * bits + 7) // 8)) + bytes(4), np.uint8)
        must(not count * bits % 8 or not piece[-5] >> count * bits % 8, "unused bits")
        numbers = np.zeros(count, np.int32)
        for start in range(0, count if bits else 0, CHUNK):
            at = np.arange(start, min(start + CHUNK, count)) * bits
            word = sum(piece[(at >> 3) + i].astype(np.int64) << 8 * i for i in range(4))
            numbers[start : start + CHUNK] = word >> (at & 7) & ((1 << bits) - 1)
        return numbers


class Bits:
    """Reads a bit string at the front of a payload."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data, self.at = data, 0

    def u(self, count: int) -> int:
        begin, self.at = self.at, self.at + count
        must(self.at <= 8 * len(self.data), "payload too short")
        piece = int.from_bytes(self.data[begin >> 3 : (self.at + 7) >> 3], "little")
        return piece >> (begin & 7) & ((1 << count) - 1)

    def zeros(self) -> int:
        """The number of zero bits up to the next one bit, which is read, too."""
        begin = self.at
        while True:
            must(self.at < 8 * len(self.data), "payload too short")
            if rest := self.data[self.at >> 3] >> (self.at & 7):
                self.at += (rest & -rest).bit_length()
                return self.at - begin - 1
            self.at = (self.at | 7) + 1

    def gamma(self) -> int:
        count = self.zeros()
        must(count <= 32, "gamma too long")
        return self.u(count) + (1 << count)

    def rice(self, k: int) -> int:
        high = self.zeros()
        return high << k | self.u(k)

    def finish(self) -> int:
        """The number of bytes of the string, of which the last bits must be zero."""
        must(not self.u(-self.at % 8), "unused bits")
        return self.at // 8


# Section 3: tables --------------------------------------------------------------------------------


def root_floor(m: int, j: int) -> int:
    """The floor of 2^(m / 2^j)."""
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
            drop = (F[y & 63] << 4) >> (15 - min(max(y >> 6, -16), 4))
        levels[x] = 255 - min(drop, 255)
    if spiked:
        levels = {x: max(level - max(4 * t, 0), 0) for x, level in levels.items()}
        levels[(c + 2) >> 2] = 255 + min(4 * t, 0)
    if escaped:
        levels[size] = head.u(8)
    return levels


class Table:
    """By slot: `symbol`, `frequency` and `bias`, the slot less the symbol's start."""

    def __init__(self, levels: Levels, precision: int) -> None:
        f = frequencies([E[v & 15] << (v >> 4) for v in levels.values()], 1 << precision)
        self.symbols = list(levels)  # by rank
        self.symbol = np.repeat(np.array(self.symbols, np.int32), f)
        self.frequency = np.repeat(np.array(f), f)
        self.bias = np.arange(1 << precision) - np.repeat(np.cumsum([0, *f[:-1]]), f)


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


# Section 3: codecs --------------------------------------------------------------------------------


def decode_bits(payload: bytes | memoryview, shape: Shape, alphabet: int) -> Array:
    data = Bytes(payload)
    codes = data.packed(math.prod(shape), width(alphabet))
    must(not data.data, "bytes left over")
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


def read_head(payload: bytes | memoryview, shape: Shape, alphabet: int) -> Head:
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
        machine = a, b = head.gamma(), head.gamma()
        must(a % 2 == 1 and 1 <= (degree := a.bit_length() - 1) <= 8, "machine")
        must(b % 2 == 0 and 0 < b < 2 ** (degree + 1), "machine")
        must(shift == escapes == 0 and 1 << exponent <= stride_of(shape), "machine")

    count, offset = 1, 0
    axes: list[tuple[int, int, int | None]] = []
    if contextual:
        count, offset = head.u(4) + 1, head.gamma() - 1
        must(len(shape) <= 8 and count >= 2 and offset <= 120, "contexts")
        axes = [
            (axis, head.u(4) + 1, head.gamma() if head.u(1) else None)
            for axis in range(len(shape))
            if head.u(1)
        ]
        must(axes, "contexts without classes")
    tables = [
        read_levels(head, size, escapes > 0, precision)
        for _ in range(2 * count if machine else count)
    ]
    window = shift, begin, size, escapes, highs
    return Head(precision, 1 << exponent, *window, offset, axes, tables, head.finish(), machine)


def stride_of(shape: Shape) -> int:
    return shape[-1] if len(shape) > 1 else 1


def decode_rans(
    payload: bytes | memoryview, shape: Shape, alphabet: int, contextual_allowed: bool = True
) -> Array:
    n = math.prod(shape)
    must(1 <= n <= 2**31 and alphabet >= 2, "codec not allowed here")
    head = read_head(payload, shape, alphabet)
    must(contextual_allowed or not (head.axes or head.machine), "contexts not allowed here")

    data = Bytes(payload)
    data.take(head.nbytes)
    context = np.full(shape, -head.offset, np.int16)
    for axis, classes, coded in head.axes:
        length = shape[axis]
        if coded is None:
            of_axis = data.packed(length, width(classes))
        else:
            of_axis = decode_rans(data.take(coded), (length,), classes, contextual_allowed=False)
        must((of_axis < classes).all(), "class")
        context += along(of_axis.astype(np.int16), axis, shape)
    low = data.packed(n, head.shift) if head.shift else 0
    escaped = data.packed(head.escapes, width(head.highs))
    tables = [Table(levels, head.precision) for levels in head.tables]
    choices = len(tables) // (2 if head.machine else 1)
    context = np.clip(context.reshape(-1), 0, choices - 1)
    high = decode_stream(bytes(data.data), tables, context, head, stride_of(shape))

    begin, size = head.begin, head.size
    escapes_at = np.flatnonzero(high == size)
    must(len(escapes_at) == head.escapes, "number of escapes")
    must(((escaped < begin) | (escaped >= begin + size)).all(), "escape within the window")
    high += np.int32(begin)
    high[escapes_at] = escaped
    codes = (high << head.shift) | low
    must((codes < alphabet).all(), "code beyond the alphabet")
    return np.asarray(codes)


def read_states(data: Bytes, lanes: int) -> list[int]:
    if lanes == 1:
        count = 3 if len(data.data) % 2 else 4
        states = [int.from_bytes(data.take(count), "little")]
        must(states[0] >= (2**16 if count == 3 else 2**24), "state")
        return states
    lows, lengths = data.packed(lanes, 16).tolist(), data.packed(lanes, 4).tolist()
    string = Bits(data.data)
    highs = [string.u(b) + (1 << b) for b in lengths]
    data.take(string.finish())
    return [high << 16 | low for high, low in zip(highs, lows, strict=True)]


def decode_stream(
    stream: bytes, tables: list[Table], context: Array, head: Head, stride: int
) -> Array:
    """The symbol of every element, int32."""
    n, lanes, most = len(context), head.lanes, max(len(table.symbols) for table in tables)
    if most == 1:
        must(not stream and lanes == 1 and not head.machine, "stream of single symbols")
        return np.array([table.symbols[0] for table in tables], np.int32)[context]
    bits = width(most)
    rows = -(-n // lanes)
    tail = min(16 // bits, rows)
    must(rows <= 2**16 and lanes <= n, "lanes")
    data = Bytes(stream)
    states = read_states(data, lanes)
    must(len(data.data) % 2 == 0, "half a word")
    words = np.frombuffer(data.data, "<u2").astype(np.int64)
    machine = Machine(head.machine, stride, head.begin, len(tables)) if head.machine else None
    out = np.empty(n, np.int32)
    body = (rows - tail) * lanes
    turn = single_turns if lanes < 64 else rows_of_turns
    states = turn(out[:body], states, words, tables, context, head.precision, machine)
    must(all(2**16 <= state < 2**17 for state in states), "last state")

    fields = [state & 0xFFFF for state in states]
    for i, choice in enumerate(context[body:].tolist(), body):
        symbols = tables[choice + machine.table(i) if machine else choice].symbols
        rank = fields[i % lanes] & ((1 << bits) - 1)
        must(rank < len(symbols), "rank")
        out[i] = symbols[rank]
        if machine:
            machine.take(i, symbols[rank])
        fields[i % lanes] >>= bits
    must(not any(fields), "unused bits")
    return out


class Machine:
    """Registers, one for each of the `stride` trellises; bit `j - 1` is what `j` steps bring."""

    def __init__(self, polynomials: tuple[int, int], stride: int, begin: int, tables: int) -> None:
        self.a, self.b = polynomials[0] >> 1, polynomials[1] >> 1
        self.stride, self.begin, self.second = stride, begin, tables // 2
        self.registers = np.zeros(stride, np.int64)

    def table(self, at: Any) -> Any:
        """What is added to the context of an element, or of several of different trellises."""
        return (self.registers[at % self.stride] & 1) * self.second

    def take(self, at: Any, symbol: Any) -> None:
        register = self.registers[at % self.stride]
        moved = register >> 1 ^ (register & 1) * self.a ^ ((symbol + self.begin) & 1) * self.b
        self.registers[at % self.stride] = moved


def single_turns(
    out: Array, states: list[int], words: Array, tables: list[Table], context: Array,
    precision: int, machine: Machine | None,
) -> list[int]:  # fmt: skip
    """Element by element: the words left over are none, and the states are those of the end."""
    lanes, mask, ahead, lane = len(states), (1 << precision) - 1, iter(words.tolist()), 0
    sides = [(t.symbol.tolist(), t.frequency.tolist(), t.bias.tolist()) for t in tables]
    for start in range(0, len(out), CHUNK):
        found = []
        for i, choice in enumerate(context[start : min(start + CHUNK, len(out))].tolist(), start):
            symbol, frequency, bias = sides[choice + machine.table(i) if machine else choice]
            state = states[lane]
            slot = state & mask
            found.append(symbol[slot])
            state = frequency[slot] * (state >> precision) + bias[slot]
            if state < 65536:
                word = next(ahead, -1)
                must(word >= 0, "payload too short")
                state = state << 16 | word
            states[lane] = state
            lane = lane + 1 if lane + 1 < lanes else 0
            if machine:
                machine.take(i, found[-1])
        out[start : start + CHUNK] = found
    must(next(ahead, -1) < 0, "words left over")
    return states


def rows_of_turns(
    out: Array, states: list[int], words: Array, tables: list[Table], context: Array,
    precision: int, machine: Machine | None,
) -> list[int]:  # fmt: skip
    """The same for the lanes of a row at once."""
    lanes, used, state, at = len(states), 0, np.array(states, np.int64), np.arange(len(states))
    symbol, frequency, bias = (
        np.concatenate([getattr(t, name) for t in tables])
        for name in ("symbol", "frequency", "bias")
    )
    for start in range(0, len(out), lanes):
        choice = context[start : start + lanes].astype(np.int64)
        if machine:
            choice += machine.table(at + start)
        slot = state & ((1 << precision) - 1) | choice << precision
        found = symbol[slot]
        state = frequency[slot] * (state >> precision) + bias[slot]
        low = np.flatnonzero(state < 65536)
        must(used + len(low) <= len(words), "payload too short")
        state[low] = state[low] << 16 | words[used : used + len(low)]
        used += len(low)
        out[start : start + lanes] = found
        if machine:
            machine.take(at + start, found)
    must(used == len(words), "words left over")
    return [int(s) for s in state]


def read_planes(payload: bytes | memoryview, size: int) -> tuple[int, list[int | None], int]:
    """Whether numbers are rotated, the bytes of each coded plane, and the bytes of the head."""
    head = Bits(payload)
    rotated = head.u(1)
    lengths = [head.gamma() if head.u(1) else None for _ in range(size)]
    return rotated, lengths, head.finish()


def decode_planes(payload: bytes | memoryview, m: int, size: int) -> bytes:
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
    must(not data.data, "bytes left over")
    if rotated:
        planes = planes >> 1 | np.roll(planes, -1, axis=1) << 7
    return planes.tobytes()


# Types of numbers ---------------------------------------------------------------------------------


def to_singles(data: bytes, kind: str) -> Array:
    """The numbers of a floating type other than float64, exactly."""
    if kind == "float8_e5m2":
        data, kind = (np.frombuffer(data, "u1").astype("<u2") << 8).tobytes(), "float16"
    if kind == "bfloat16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float32)
    if kind != "float8_e4m3fn":
        return np.frombuffer(data, np.dtype(kind).newbyteorder("<")).astype(np.float32)
    code = np.arange(256)
    exponent, fraction = code >> 3 & 15, code & 7
    low = exponent == 0  # subnormal
    number = np.ldexp(np.where(low, fraction, fraction + 8.0), np.where(low, 1, exponent) - 10)
    number[(code & 127) == 127] = math.nan
    table = np.copysign(number, np.where(code & 128, -1.0, 1.0)).astype(np.float32)
    return np.asarray(table[np.frombuffer(data, "u1")])


def to_doubles(data: bytes, kind: str) -> Array:
    if kind == "float64":
        return np.frombuffer(data, "<f8").astype(np.float64)
    return to_singles(data, kind).astype(np.float64)


def restore(values: Array, kind: str, clamp: bool = True) -> bytes:
    """Floating-point numbers in a type, rounded to nearest even."""
    if kind not in SMALL_FLOATS:
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(np.dtype(kind).newbyteorder("<")).tobytes()
    pieces = (values[i : i + CHUNK] for i in range(0, len(values), CHUNK))
    return b"".join(restore_small(piece.astype(np.float64), kind, clamp) for piece in pieces)


def restore_small(doubles: Array, kind: str, clamp: bool) -> bytes:
    exponent_bits, fraction_bits, largest = SMALL_FLOATS[kind]
    lowest = 2 - 2 ** (exponent_bits - 1)  # the exponent of the smallest normal number
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
    values: Any  # int32 codes, or bytes of numbers


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

    def alphabet(self, name: str) -> int:
        holds = self.parts[name].holds if name in self.parts else None
        must(type(holds) is int, f"{name} are codes")
        return int(holds or 0)

    def codes(self, name: str, shape: Shape, alphabet: int | None) -> Array:
        must(alphabet in (None, self.alphabet(name)), f"alphabet of {name}")
        part = self.take(name)
        must(shape == part.shape, f"shape of {name}")
        return np.asarray(part.values)

    def singles(self, name: str, shape: Shape, kind: str) -> Array:
        part = self.take(name)
        must(part.holds == kind and part.shape == shape, f"{name}: type or shape")
        return to_singles(part.values, kind)


def along(values: Array, axis: int | None, shape: Shape) -> Array:
    """One number for each index of an axis (or one for all), as it broadcasts to the shape."""
    at = None if axis is None else axis % len(shape)
    return values.reshape([-1 if i == at else 1 for i in range(len(shape))])


def spread(values: Array, rows: int, columns: int, run: int) -> Array:
    """One number for each run of columns of each row, repeated for each column."""
    run = min(run, max(columns, 1))
    in_row = -(-columns // run)
    return np.repeat(values.reshape(rows, in_row), run, axis=1)[:, :columns].reshape(-1)


def rows_and_columns(shape: Shape) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def decode_raw(given: dict[str, Any], parts: Parts, kind: str, shape: Shape) -> bytes:
    stored: str = given["dtype"] or kind
    part = parts.take("values")
    must(part.holds == stored and part.shape == shape, "values: type or shape")
    data = bytes(part.values)
    if stored == kind:
        return data
    if kind in COMPLEX:
        must(stored in COMPLEX, "stored type")
        halves = np.frombuffer(data, "<f8" if stored == "complex128" else "<f4")
        return restore(halves, "float64" if kind == "complex128" else "float32")
    must(kind in FLOATING and stored in FLOATING, "stored type")
    return restore(to_doubles(data, stored), kind, clamp=False)


def decode_affine(given: dict[str, Any], parts: Parts, kind: str, shape: Shape) -> Array:
    bits, axis, group, grid = given["bits"], given["axis"], given["group"], given["grid"]
    rows, columns = rows_and_columns(shape)
    count = 1
    if axis is not None:
        must(-len(shape) <= axis < len(shape), "setting axis")
        count = shape[axis]
    if group is not None:
        count = rows * -(-columns // group)

    def each(values: Array) -> Array:
        if group is not None:
            return spread(values, rows, columns, group).reshape(shape)
        return along(values, axis, shape)

    levels = parts.codes("levels", shape, 1 << bits if bits else None).reshape(shape)
    scale = each(parts.singles("scale", (count,), given["scale_dtype"]))
    if grid == "endpoint":
        offset = each(parts.singles("offset", (count,), given["scale_dtype"]))
        return (levels.astype(np.float32) * scale + offset).reshape(-1)
    if bits is None:
        steps = levels - parts.codes("zero", (1,), 2**24)[0]
    elif grid == "asymmetric":
        steps = levels - each(parts.codes("zero", (count,), 1 << bits))
    else:
        steps = 2 * levels - 1 if bits == 1 else levels - (1 << (bits - 1))
    return np.asarray(steps.astype(np.float32) * scale).reshape(-1)


def decode_codebook(given: dict[str, Any], parts: Parts, kind: str, shape: Shape) -> Array:
    n, bucket = math.prod(shape), given["bucket"]
    (count,) = parts.shape("points", 1)
    must(1 <= count <= given["points"], "number of points")
    points = parts.singles("points", (count,), given["dtype"])
    values = points[parts.codes("indices", shape, count)]
    if bucket is not None:
        buckets = (-(-n // bucket),)
        values *= spread(parts.singles("scale", buckets, given["scale_dtype"]), 1, n, bucket)
        if given["shift"]:
            values += spread(parts.singles("offset", buckets, given["scale_dtype"]), 1, n, bucket)
    return values


def decode_product(given: dict[str, Any], parts: Parts, kind: str, shape: Shape) -> Array:
    block, dtype = given["block"], given["dtype"]
    rows, columns = rows_and_columns(shape)
    blocks = -(-columns // block)
    count, _ = parts.shape("centroids", 2)
    must(1 <= count <= given["points"], "number of centroids")
    if dtype == "int8":
        codes = parts.codes("centroids", (count, block), 256)
        centroids = (codes - 128).astype(np.float32) * parts.singles("scale", (1,), "float32")
    else:
        centroids = parts.singles("centroids", (count, block), dtype)
    indices = parts.codes("indices", (rows, blocks), count)
    within = min(block, max(columns, 1))
    values = centroids.reshape(count, block)[:, :within][indices].reshape(rows, blocks * within)
    return values[:, :columns].reshape(-1)


def decode_mixed(given: dict[str, Any], parts: Parts, kind: str, shape: Shape) -> Array:
    n, group, endpoint = math.prod(shape), given["group"], given["grid"] == "endpoint"
    widths = parts.codes("bits", (-(-n // group),), 17)
    width_of = spread(widths, 1, n, group)
    values = np.zeros(n, np.float32)
    if endpoint:
        low = parts.singles("low", (1,), "float32")
        span = parts.singles("high", (1,), "float32").astype(np.float64) - low
    else:
        span = 2 * parts.singles("range", (1,), "float32").astype(np.float64)
    for b in np.unique(widths[widths > 0]).tolist():
        chosen = width_of == b
        levels = parts.codes(f"levels{b}", (int(chosen.sum()),), 1 << b)
        step = (span / ((1 << b) - 1)).astype(np.float32)
        if endpoint:
            values[chosen] = levels.astype(np.float32) * step + low
        elif b > 1:
            values[chosen] = (levels - (1 << (b - 1))).astype(np.float32) * step
        else:
            values[chosen] = (2 * levels - 1).astype(np.float32) * (span / 4).astype(np.float32)
    return values


MACHINES = {
    4: (5, 2), 8: (11, 4), 16: (19, 4), 32: (37, 8), 64: (67, 20), 128: (157, 86), 256: (333, 242),
}  # fmt: skip


def decode_trellis(given: dict[str, Any], parts: Parts, kind: str, shape: Shape) -> Array:
    axis = given["axis"]
    must(axis is None or -len(shape) <= axis < len(shape), "setting axis")
    must(parts.alphabet("levels") <= 2**23, "alphabet of levels")
    codes = parts.codes("levels", (*shape[1:], *shape[:1]), None)
    codes = codes - parts.codes("zero", (1,), 2**23)
    scale = parts.singles("scale", (1 if axis is None else shape[axis],), given["scale_dtype"])
    rows, columns = rows_and_columns(shape)
    if not codes.size:
        return np.zeros(0, np.float32)
    codes = codes.reshape(columns, rows)
    machine, every = Machine(MACHINES[given["states"]], rows, 0, 2), np.arange(rows)
    for column in codes:
        second = machine.table(every)
        machine.take(every, column)
        column += column + second.astype(np.int32)
    return np.asarray(
        codes.T.reshape(shape).astype(np.float32) * along(scale, axis, shape)
    ).reshape(-1)


def decode_factors(given: dict[str, Any], parts: Parts, kind: str, shape: Shape) -> Array:
    rows, columns = rows_and_columns(shape)
    rank, _ = parts.shape("right", 2)
    must(rank <= min(rows, columns, 4096), "rank")
    alphabets = parts.alphabet("left"), parts.alphabet("right")
    left = parts.codes("left", (rows, rank), None).reshape(rows, rank)
    right = parts.codes("right", (rank, columns), None).reshape(rank, columns)
    zeros = parts.codes("zero", (2,), 2**24).tolist()
    most = [max(z, a - 1 - z) for z, a in zip(zeros, alphabets, strict=True)]
    must(most[0] * most[1] * rank < 2**53, "inexact sums")
    scale = parts.singles("scale", (rows if given["axis"] == 0 else 1,), given["scale_dtype"])
    values = np.empty((rows, columns), np.float32)
    factor, step = (right - zeros[1]).astype(np.float64), max(1, CHUNK // max(rank, columns, 1))
    for start in range(0, rows if values.size else 0, step):  # sums that doubles hold are exact
        values[start : start + step] = (left[start : start + step] - float(zeros[0])) @ factor
    return (np.where(values == 0, np.float32(0), values) * scale[:, None]).reshape(-1)


COUNT, SCALES = range(1, 2**24 + 1), ("float32", "float16", "bfloat16")
AXIS = ("axis", None, (None, range(-64, 64)))
# Of each format: its decoder, and the name, default and allowed values of its settings.
FORMATS: dict[str, tuple[Callable[..., Any], list[tuple[str, Any, tuple[Any, ...]]]]] = {
    "raw": (decode_raw, [("dtype", None, (None, *SIZES))]),
    "affine": (decode_affine, [
        ("bits", 8, (None, range(1, 17))), AXIS, ("group", None, (None, COUNT)),
        ("grid", "symmetric", ("symmetric", "asymmetric", "endpoint")),
        ("scale_dtype", "float32", SCALES),
    ]),
    "codebook": (decode_codebook, [
        ("points", None, (range(2, 65537),)), ("bucket", None, (None, COUNT)),
        ("shift", False, (False, True)), ("dtype", "float16", SCALES),
        ("scale_dtype", "float32", SCALES),
    ]),
    "product": (decode_product, [
        ("block", None, (COUNT,)), ("points", 256, (range(2, 65537),)),
        ("dtype", "float16", (*SCALES, "int8")),
    ]),
    "mixed": (decode_mixed, [
        ("group", 8, (COUNT,)), ("grid", "endpoint", ("endpoint", "symmetric")),
    ]),
    "trellis": (decode_trellis, [
        ("states", 8, tuple(range(s, s + 1) for s in MACHINES)), AXIS,
        ("scale_dtype", "float32", SCALES),
    ]),
    "factors": (decode_factors, [
        ("axis", None, (None, range(1))), ("scale_dtype", "float32", SCALES),
    ]),
}  # fmt: skip


def is_one_of(value: object, allowed: tuple[Any, ...]) -> bool:
    values = [a for a in allowed if not isinstance(a, range)]
    ranges = [a for a in allowed if isinstance(a, range)]
    if type(value) is int:
        return any(value in a for a in ranges)
    return any(value is a or (isinstance(value, str) and value == a) for a in values)


def read_format(given: object) -> tuple[str, dict[str, Any]]:
    """Name and settings of a format, defaults included."""
    must(isinstance(given, dict), "format")
    left: dict[str, Any] = dict(given)  # type: ignore[call-overload]
    name, version = left.pop("format", None), left.pop("version", None)
    must(isinstance(name, str) and name in FORMATS and is_int(version, 1, 1), "unknown format")
    found = {key: left.pop(key, default) for key, default, _ in FORMATS[name][1]}
    for key, _, allowed in FORMATS[name][1]:
        must(is_one_of(found[key], allowed), f"setting {key} of a format")
    must(not left, "unknown setting")
    if name == "affine":
        must(found["axis"] is None or found["group"] is None, "both axis and group")
        must(found["bits"] is not None or found["grid"] == "symmetric", "grid")
    must(name != "codebook" or found["bucket"] is not None or not found["shift"], "shift")
    return name, found


# Sections 1 and 2: the file and its index ---------------------------------------------------------


def columns_of(table: object, names: tuple[str, ...], shorter: str = "") -> list[dict[str, Any]]:
    """An object of arrays as an array of objects."""
    if not isinstance(table, dict) or set(table) != {*names, shorter} - {""}:
        raise DecodeError("columns")
    must(all(isinstance(column, list) for column in table.values()), "columns")
    must(len({len(table[name]) for name in names}) == 1, "lengths of columns")
    return [dict(zip(names, row, strict=True)) for row in zip(*map(table.get, names), strict=True)]


def read_shape(value: object) -> Shape:
    if not isinstance(value, list) or len(value) > 32:
        raise DecodeError("shape")
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
    must(data[8:12] == b"\1\0\0\0", "version or features")
    must(data[-4:] == b"htid", "end mark: the file is cut off")
    packed, unpacked, crc = (int.from_bytes(data[i : i + 4], "little") for i in (-16, -12, -8))
    begin = len(data) - 16 - packed
    must(begin >= 12 and unpacked <= 2**28, "lengths of the index")
    must(unpacked <= 2**20 + 64 * len(data), "index out of proportion", LimitError)
    must(zlib.crc32(data[:12] + data[begin:-8]) == crc, "CRC of the index")
    unpack = zlib.decompressobj()
    try:
        text = unpack.decompress(data[begin:-16], unpacked + 1)
        must(unpack.eof and not unpack.unused_data and len(text) == unpacked, "length of the index")
        index = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=no_constant)
    except (zlib.error, ValueError, RecursionError) as error:
        raise DecodeError(f"index: {error}") from error
    required = {"formats", "tensors", "parts"}
    must(isinstance(index, dict) and required <= set(index), "fields of the index")
    must(set(index) <= required | {"aliases", "metadata", "sites", "base"}, "unknown field")
    must(isinstance(index["formats"], list), "formats")
    for name in ("aliases", "metadata", "sites"):
        must(isinstance(index.get(name, {}), dict), name)
    must(all(isinstance(site, dict) for site in index.get("sites", {}).values()), "site")
    must(index.get("base") is None, "reserved field")
    return index, begin


class Tensor(NamedTuple):
    dtype: str
    shape: Shape
    format: tuple[str, dict[str, Any]]
    parts: dict[str, dict[str, Any]]  # the index's row of each, and its `payload`


class Archive(Mapping[str, Array]):
    """The tensors of a file by name, aliases included; each is decoded when it is asked for."""

    def __init__(self, file: str | os.PathLike[str] | bytes, max_nbytes: int | None = None) -> None:
        """Read the index. Codes, numbers and values count 16 bytes each against `max_nbytes`."""
        data = file if isinstance(file, bytes) else Path(file).read_bytes()
        self.max_nbytes = max(2**32, 256 * len(data)) if max_nbytes is None else max_nbytes
        index, end = read_index(data)
        formats = [read_format(item) for item in index["formats"]]
        rows = columns_of(index["tensors"], ("name", "format", "dtype", "shape", "parts"))
        parts = columns_of(index["parts"], ("name", "codec", "shape", "holds", "data"), "crc")
        crcs, at, left = iter(index["parts"]["crc"]), 12, iter(parts)
        no_part: dict[str, Any] = {"name": None}
        self.tensors: dict[str, Tensor] = {}
        for row in rows:
            must(isinstance(row["name"], str) and row["name"] not in self.tensors, "name")
            must(is_int(row["format"], 0, len(formats) - 1), "position of a format")
            must(isinstance(row["dtype"], str) and row["dtype"] in SIZES, "type of a tensor")
            must(is_int(row["parts"], 0, 64), "number of parts")
            shape, own = read_shape(row["shape"]), dict[str, dict[str, Any]]()
            for _ in range(row["parts"]):
                part = next(left, no_part)
                must(isinstance(part["name"], str) and part["name"] not in own, "name of a part")
                own[part["name"]] = part
                part["shape"] = shape if is_int(part["shape"], 0, 0) else read_shape(part["shape"])
                holds = part["holds"]
                must(holds in SIZES if isinstance(holds, str) else is_int(holds, 1, 2**24), "holds")
                must(isinstance(part["codec"], str), "codec")
                if isinstance(part["data"], str):
                    must(re.fullmatch("([0-9a-fA-F]{2})*", part["data"]), "hexadecimal digits")
                    part["payload"], part["crc"] = bytes.fromhex(part["data"]), None
                else:
                    must(is_int(part["data"], 0, end - at), "length of a payload")
                    part["payload"] = memoryview(data)[at : at + part["data"]]
                    part["crc"] = next(crcs, None)
                    must(is_int(part["crc"], 0, 2**32 - 1), "CRC of a payload")
                    at += part["data"]
            self.tensors[row["name"]] = Tensor(row["dtype"], shape, formats[row["format"]], own)
        must(not any(True for rest in (left, crcs) for _ in rest), "parts of no tensor")
        must(at == end, "payloads and index")
        self.aliases: dict[str, str] = index.get("aliases", {})
        for alias, name in self.aliases.items():
            must(isinstance(name, str) and name in self.tensors, "alias")
            must(alias not in self.tensors, "alias")
        self.metadata: dict[str, Any] = index.get("metadata", {})
        self.sites: dict[str, Any] = index.get("sites", {})

    def __iter__(self) -> Iterator[str]:
        yield from self.tensors
        yield from self.aliases

    def __len__(self) -> int:
        return len(self.tensors) + len(self.aliases)

    def __getitem__(self, name: str) -> Array:
        kind, shape, data = self.stored(name)
        if kind in SMALL_FLOATS and kind != "float16":
            return to_singles(data, kind).reshape(shape)
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
        if tensor.format[0] == "factors" and "right" in tensor.parts:
            products = counts["right"] * rows_and_columns(tensor.shape)[0]
        if 16 * count > self.max_nbytes or products > 128 * self.max_nbytes:
            raise LimitError(
                f"a tensor of shape {tensor.shape} takes {16 * count} bytes and {products} "
                f"products; if you trust the file, give more than max_nbytes={self.max_nbytes}"
            )


def decode_tensor(tensor: Tensor) -> bytes:
    parts = Parts({name: decode_part(part) for name, part in tensor.parts.items()})
    name, settings = tensor.format
    decoder = FORMATS[name][0]
    must(name == "raw" or tensor.dtype in FLOATING, "a type that the format cannot hold")
    with np.errstate(over="ignore", invalid="ignore"):  # infinite scales are allowed
        values = decoder(settings, parts, tensor.dtype, tensor.shape)
    must(not parts.parts, "unknown part")
    return values if isinstance(values, bytes) else restore(values, tensor.dtype)


def decode_part(row: dict[str, Any]) -> Part:
    payload, shape, holds, codec = row["payload"], row["shape"], row["holds"], row["codec"]
    must(row["crc"] is None or zlib.crc32(payload) == row["crc"], "CRC of a payload")
    if isinstance(holds, str):
        must(codec in ("raw", "rans"), "codec of a part")
        n, size = math.prod(shape), SIZES[holds]
        numbers = decode_planes(payload, n, size) if codec == "rans" else bytes(payload)
        must(len(numbers) == n * size, "length of numbers")
        must(holds != "bool" or max(numbers, default=0) <= 1, "neither true nor false")
        return Part(shape, holds, numbers)
    must(codec in ("bits", "rans"), "codec of a part")
    decoder = decode_rans if codec == "rans" else decode_bits
    return Part(shape, holds, decoder(payload, shape, holds))


def decode(data: bytes, max_nbytes: int | None = None) -> dict[str, Stored]:
    """Type, shape and little-endian bytes of every tensor of a file, by name."""
    archive = Archive(data, max_nbytes)
    found = {name: archive.stored(name) for name in archive.tensors}
    return found | {alias: found[name] for alias, name in archive.aliases.items()}


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python dither_decode.py FILE.dither [TENSORS.npz]")
    try:
        archive = Archive(sys.argv[1])
        for name, tensor in archive.tensors.items():
            print(f"{tensor.dtype:14} {'x'.join(map(str, tensor.shape)):20} {name!r}")
        if len(sys.argv) == 3:
            np.savez(sys.argv[2], **dict(archive.items()))  # type: ignore[arg-type]
    except (DecodeError, OSError) as error:
        sys.exit(f"{sys.argv[1]}: {error}")


if __name__ == "__main__":
    main()
