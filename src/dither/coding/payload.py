"""The payload of codec ``rans``: its head, its sections, and how they are read back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dither.coding.bits import (
    CHUNK,
    BitReader,
    BitWriter,
    code_dtype,
    packed_nbytes,
    unpack_bits,
    width_of,
)
from dither.coding.contexts import MAX_AXES, Contexts
from dither.coding.errors import CodingError
from dither.coding.parity_contexts import Machine, Steering
from dither.coding.rans import MAX_COUNT, decode_lanes
from dither.coding.tables import MIN_PRECISION, Curve, Steps, Table, read_table

WINDOWED, CONTEXTUAL, LANED, STEERED = 1, 2, 4, 0x40
"""Flags of the first byte. Bits 3 to 5 hold the precision less 8; bit 7 is reserved."""

RESERVED = 0x80
"""Kept for a longer head."""


@dataclass(frozen=True)
class Window:
    """Which part of a code a table sees.

    A code is split in ``high << shift | low``; ``high - begin`` is coded with a table if it lies in
    ``0 .. size - 1``, and otherwise an escape symbol is, with ``high`` itself at fixed width.

    Attributes:
        shift: low bits that are stored as they are.
        begin: first high value of the window.
        size: number of high values in the window.
        escapes: number of codes outside of it.
    """

    shift: int
    begin: int
    size: int
    escapes: int

    @property
    def symbols(self) -> int:
        """Symbols of the tables: the window's and, if there are escapes, one more."""
        return self.size + (self.escapes > 0)


@dataclass(frozen=True, eq=False)
class Head:
    """What the head of a payload says.

    Attributes:
        precision: frequencies sum to ``2**precision``.
        lanes_log2: the number of lanes is a power of two.
        window: which part of a code the tables see.
        contexts: which table codes which element, None with one table.
        descriptions: the tables.
        class_payloads: codec and payload of the classes of each axis that has some.
        machine: chooses between two sets of tables, None with one set.
    """

    precision: int
    lanes_log2: int
    window: Window
    contexts: Contexts | None
    descriptions: Sequence[Curve | Steps]
    class_payloads: Sequence[tuple[str, bytes]]
    machine: Machine | None = None

    def choices(self, codes: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
        """The table of every code, flat; None with one table."""
        chosen = None if self.contexts is None else self.contexts.of(shape)
        if self.machine is None:
            return chosen
        second = self.machine.run(codes & 1, stride_of(shape))
        if self.contexts is not None and chosen is not None:
            return np.asarray(chosen + np.uint8(self.contexts.tables) * second, np.uint8)
        return second

    def write(self, ndim: int, alphabet: int) -> bytes:
        """The head in bytes, the classes behind it."""
        window, contexts = self.window, self.contexts
        is_windowed = window != Window(0, 0, alphabet, 0)
        flags = (self.precision - MIN_PRECISION) << 3
        flags |= WINDOWED * is_windowed | CONTEXTUAL * (contexts is not None)
        head = BitWriter()
        flags |= LANED * (self.lanes_log2 > 0) | STEERED * (self.machine is not None)
        head.write(flags, 8)
        if self.lanes_log2:
            head.write(self.lanes_log2, 4)
        if is_windowed:
            head.write(window.shift, 5)
            for number in (window.begin + 1, window.size, window.escapes + 1):
                head.gamma(number)
        if self.machine is not None:
            head.gamma(self.machine.divisor)
            head.gamma(self.machine.factor)
        if contexts is not None:
            head.write(contexts.tables - 1, 4)
            head.gamma(contexts.offset + 1)
            payloads = iter(self.class_payloads)
            for axis in range(ndim):
                head.write(axis in contexts.classes, 1)
                if axis in contexts.classes:
                    codec, payload = next(payloads)
                    head.write(int(contexts.classes[axis].max()), 4)
                    head.write(codec == "rans", 1)
                    if codec == "rans":
                        head.gamma(len(payload))
        for description in self.descriptions:
            is_curve = isinstance(description, Curve)
            description.write(head, window.size if is_curve else window.symbols)
        return head.getvalue() + b"".join(payload for _, payload in self.class_payloads)


def stride_of(shape: tuple[int, ...]) -> int:
    """How many machines run side by side."""
    return shape[-1] if len(shape) > 1 else 1


def _take(rest: memoryview, nbytes: int, what: str) -> tuple[memoryview, memoryview]:
    if len(rest) < nbytes:
        raise CodingError(f"the payload ends within its {what}")
    return rest[:nbytes], rest[nbytes:]


def _read_window(head: BitReader, alphabet: int, count: int) -> Window:
    shift = head.read(5)
    window = Window(shift, head.gamma() - 1, head.gamma(), head.gamma() - 1)
    highs = -(-alphabet >> shift) if shift < 24 else 0
    outside = window.size < highs or not window.escapes  # an escape lies outside of the window
    if window.begin + window.size > highs or window.escapes > count or not outside:
        raise CodingError(f"{window} does not fit {count} codes of {alphabet} symbols")
    return window


def _read_machine(head: BitReader, shape: tuple[int, ...], window: Window, lanes: int) -> Machine:
    machine = Machine(head.gamma(), head.gamma())
    if lanes > stride_of(shape) or window.shift or window.escapes:
        raise CodingError("a machine with more lanes than rows, or with codes that are split")
    return machine


def _read_contexts(
    head: BitReader, shape: tuple[int, ...]
) -> tuple[int, int, list[tuple[int, int, int | None]]]:
    """Number of tables, offset, and (axis, classes, length of a rans payload) of each axis."""
    tables, offset = head.read(4) + 1, head.gamma() - 1
    axes: list[tuple[int, int, int | None]] = []
    for axis in range(len(shape)):
        if head.read(1):
            alphabet = head.read(4) + 1
            axes.append((axis, alphabet, head.gamma() if head.read(1) else None))
    if len(shape) > MAX_AXES or tables < 2 or not axes or offset > 15 * MAX_AXES:
        raise CodingError("contexts that no encoder chooses")
    return tables, offset, axes


def _read_classes(
    rest: memoryview, shape: tuple[int, ...], axes: list[tuple[int, int, int | None]]
) -> tuple[dict[int, NDArray[np.uint8]], memoryview]:
    classes = {}
    for axis, alphabet, nbytes in axes:
        length = shape[axis]
        width = width_of(alphabet)
        size = packed_nbytes(length, width) if nbytes is None else nbytes
        piece, rest = _take(rest, size, "classes")
        if nbytes is not None and alphabet == 1:
            raise CodingError("classes that are all 0 take no bytes")
        if nbytes is None:
            found = unpack_bits(piece, length, width)
            if int(found.max()) >= alphabet:
                raise CodingError("a class is out of range")
        else:
            found = decode_rans(piece, (length,), alphabet, is_nested=True)
        classes[axis] = found
    return classes, rest


def _decode_tokens(
    rest: memoryview,
    contexts: NDArray[np.uint8] | None,
    tables: Sequence[Table],
    precision: int,
    lanes_log2: int,
    out: NDArray[Any],
    steering: Steering | None = None,
) -> None:
    if any(len(table.symbols) > 1 for table in tables):
        decode_lanes(rest, contexts, tables, precision, 1 << lanes_log2, out, steering)
        return
    if len(rest) or lanes_log2 or steering is not None:
        raise CodingError("a stream follows tables of one symbol each")
    constants = np.array([table.symbols[0] for table in tables]).astype(out.dtype)
    out[:] = constants[0]
    if contexts is not None:
        for begin in range(0, len(out), CHUNK):
            out[begin : begin + CHUNK] = constants[contexts[begin : begin + CHUNK]]


def decode_rans(
    payload: bytes | memoryview, shape: tuple[int, ...], alphabet: int, *, is_nested: bool = False
) -> NDArray[Any]:
    """Decode a payload of codec ``rans`` to codes in their canonical type.

    Args:
        payload: all of it.
        shape: of the part; not empty.
        alphabet: at least 2.
        is_nested: for classes, which have no contexts of their own.

    Raises:
        CodingError: whatever is not exactly right.
    """
    count = math.prod(shape)
    if count > MAX_COUNT:
        raise CodingError(f"a payload holds at most 2**31 codes, not {count}")
    head = BitReader(memoryview(payload))
    flags = head.read(8)
    if flags & RESERVED:
        raise CodingError(f"unknown flags {flags & RESERVED:#x}; a newer version may read them")
    precision = MIN_PRECISION + (flags >> 3 & 7)
    lanes_log2 = head.read(4) if flags & LANED else 0
    if flags & LANED and lanes_log2 == 0:
        raise CodingError("one lane is written without a number")
    window = Window(0, 0, alphabet, 0)
    if flags & WINDOWED:
        window = _read_window(head, alphabet, count)
    machine = _read_machine(head, shape, window, 1 << lanes_log2) if flags & STEERED else None
    axes: list[tuple[int, int, int | None]] = []
    choices, offset = 1, 0
    if is_nested and machine is not None:
        raise CodingError("classes with contexts of their own")
    if flags & CONTEXTUAL:
        if is_nested:
            raise CodingError("classes with contexts of their own")
        choices, offset, axes = _read_contexts(head, shape)
    has_escape = window.escapes > 0
    sets = 1 if machine is None else 2
    tables = [
        read_table(head, window.size, precision, has_escape=has_escape)
        for _ in range(sets * choices)
    ]
    classes, rest = _read_classes(head.finish(), shape, axes)
    contexts = Contexts(classes, offset, choices).of(shape) if classes else None
    del classes
    lows, rest = _take(rest, packed_nbytes(count, window.shift), "low bits")
    high_width = width_of(-(-alphabet >> window.shift))
    escaped, rest = _take(rest, packed_nbytes(window.escapes, high_width), "escapes")
    out = np.empty(count, code_dtype(alphabet))  # holds all symbols, too: there are no more of them
    steering = None
    if machine is not None:
        odd = window.begin & 1
        steering = Steering(machine, stride_of(shape), odd, contexts, tables)
    _decode_tokens(rest, contexts, tables, precision, lanes_log2, out, steering)
    if flags & WINDOWED:
        _join(out, window, lows, _escapes(escaped, window, high_width), alphabet)
    return out.reshape(shape)


def coder_nbytes(shape: tuple[int, ...]) -> int:
    """Bytes that decoding a part takes at most, beside its codes, its payload and a few megabytes.

    They are the table of every code, the classes of every axis, and the machine of every row.
    """
    return math.prod(shape) + sum(shape) + stride_of(shape)


def _escapes(payload: memoryview, window: Window, width: int) -> Iterator[NDArray[Any]]:
    """The high values of codes outside of the window, in pieces."""
    for begin in range(0, window.escapes, CHUNK):
        count = min(CHUNK, window.escapes - begin)
        start = packed_nbytes(begin, width)
        found = unpack_bits(payload[start : start + packed_nbytes(count, width)], count, width)
        if ((found >= window.begin) & (found < window.begin + window.size)).any():
            raise CodingError("the escapes do not fit the symbols")
        yield found


def _join(
    out: NDArray[Any],
    window: Window,
    lows: memoryview,
    escapes: Iterator[NDArray[Any]],
    alphabet: int,
) -> None:
    """Codes from symbols, in place, escapes and low bits."""
    pool, escaped = np.zeros(0, np.int32), 0
    for begin in range(0, len(out), CHUNK):
        part = out[begin : begin + CHUNK]
        values = part.astype(np.int32)
        places = np.flatnonzero(values == window.size)
        values += np.int32(window.begin)
        escaped += len(places)
        if escaped > window.escapes:
            break
        while len(pool) < len(places):
            pool = np.concatenate([pool, next(escapes)])
        values[places], pool = pool[: len(places)], pool[len(places) :]
        if window.shift:
            start = packed_nbytes(begin, window.shift)
            low = lows[start : start + packed_nbytes(len(part), window.shift)]
            values <<= window.shift
            values |= unpack_bits(low, len(part), window.shift)
        if int(values.max()) >= alphabet:
            raise CodingError(f"a code is not below {alphabet}")
        part[:] = values
    if escaped != window.escapes:
        raise CodingError("the escapes do not fit the symbols")
