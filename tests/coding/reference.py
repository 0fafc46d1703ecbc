"""A decoder of ``rans`` code payloads written from docs/parts/coding.md alone, in plain Python.

Slow, without checks, and sharing nothing with the library: if it agrees with the library, the
specification is enough to write a decoder.
"""

from __future__ import annotations

import itertools
import math

CURVES = (2, 3, 4, 5, 6, 7, 8, 10)


def width(alphabet: int) -> int:
    return (alphabet - 1).bit_length()


def root(exponent: int, times: int) -> int:
    value: int = 1 << exponent
    for _ in range(times):
        value = math.isqrt(value)
    return value


E = [root(12 * 16 + i, 4) for i in range(16)]
F = [root(15 * 64 + i, 6) for i in range(64)]


class Bits:
    def __init__(self, data: bytes) -> None:
        self.bits = [byte >> i & 1 for byte in data for i in range(8)]
        self.at = 0

    def u(self, count: int) -> int:
        piece = self.bits[self.at : self.at + count]
        self.at += count
        return sum(bit << i for i, bit in enumerate(piece))

    def zeros(self) -> int:
        begin = self.at
        while self.bits[self.at] == 0:
            self.at += 1
        self.at += 1
        return self.at - begin - 1

    def gamma(self) -> int:
        low = self.zeros()
        return (1 << low) + self.u(low)

    def rice(self, k: int) -> int:
        return (self.zeros() << k) + self.u(k)


def stepped_levels(bits: Bits, size: int, gapped: bool) -> dict[int, int]:
    r, g, k = bits.u(3), bits.u(2), bits.u(3)
    limit = 16 * 2**r - 1
    at = bits.gamma() - 1 if gapped else 0
    older = newest = bits.u(4 + r)
    values = {at: newest}
    at += 1
    while at < size:
        z = bits.rice(k)
        if gapped and z == 0:
            at += bits.gamma()
            if at == size:
                break
            z = bits.rice(k)
        elif gapped:
            z -= 1
        guess = min(max(newest + ((newest - older) * g >> 1), 0), limit)
        older, newest = newest, guess + (z // 2 if z % 2 == 0 else -(z + 1) // 2)
        values[at] = newest
        at += 1
    return {symbol: value << (4 - r) for symbol, value in values.items()}


def curve_levels(bits: Bits, size: int, spiked: bool, escapes: int) -> dict[int, int]:
    c, s, f = bits.u(width(4 * size - 3)), bits.u(7), bits.u(3)
    t = bits.u(6) - 32 if spiked else 0
    levels = {}
    for x in range(size):
        d = abs(4 * x - c)
        drop = 0
        if d:
            y = CURVES[f] * ((d**64).bit_length() - 1 - 8 * s) >> 2
            drop = (F[y & 63] << 4) >> (15 - min(max(y >> 6, -16), 4))
        levels[x] = max(255 - min(drop, 255) - max(4 * t, 0), 0)
    if spiked:
        levels[(c + 2) >> 2] = 255 + min(4 * t, 0)
    if escapes:
        levels[size] = bits.u(8)
    return levels


def frequencies(levels: dict[int, int], precision: int) -> dict[int, int]:
    total, count = 2**precision, len(levels)
    weights = {x: E[level & 15] << (level >> 4) for x, level in levels.items()}
    everything = sum(weights.values())
    found = {x: max(w * total // everything, 1) for x, w in weights.items()}
    if sum(found.values()) > total:
        excess = sum(found.values()) - count
        found = {x: 1 + (f - 1) * (total - count) // excess for x, f in found.items()}
    spare = total - sum(found.values())
    need = sorted(found, key=lambda x: (-((weights[x] << 17) // (2 * found[x] + 1)), x))
    for x in need[:spare]:
        found[x] += 1
    return found


def tail_and_states(stream: bytes, lanes: int) -> tuple[list[int], list[int]]:
    """States and words."""
    if lanes == 1:
        at = 3 if len(stream) % 2 else 4
        states = [int.from_bytes(stream[:at], "little")]
    else:
        low = [int.from_bytes(stream[2 * i : 2 * i + 2], "little") for i in range(lanes)]
        at = 2 * lanes + math.ceil(lanes / 2)
        lengths = Bits(stream[2 * lanes : at])
        counts = [lengths.u(4) for _ in range(lanes)]
        end = at + math.ceil(sum(counts) / 8)
        rest = Bits(stream[at:end])
        states = [((2**b + rest.u(b)) << 16) + x for b, x in zip(counts, low, strict=True)]
        at = end
    words = [int.from_bytes(stream[i : i + 2], "little") for i in range(at, len(stream), 2)]
    return states, words


def decode_stream(
    stream: bytes, which: list[int], tables: list[dict[int, int]], precision: int, lanes: int
) -> list[int]:
    if all(len(table) == 1 for table in tables):
        return [next(iter(tables[k])) for k in which]
    w = width(max(len(table) for table in tables))
    rows = math.ceil(len(which) / lanes)
    tail = min(16 // w, rows)
    states, words = tail_and_states(stream, lanes)
    source = iter(words)
    out = []
    for i, k in enumerate(which):
        lane, table = i % lanes, tables[k]
        state = states[lane]
        if i // lanes >= rows - tail:
            shift = w * (i // lanes - rows + tail)
            out.append(list(table)[(state & 0xFFFF) >> shift & (2**w - 1)])
            continue
        slot, start = state % 2**precision, 0
        for symbol, frequency in table.items():  # noqa: B007
            if slot < start + frequency:
                break
            start += frequency
        state = frequency * (state >> precision) + slot - start
        if state < 2**16:
            state = (state << 16) + next(source)
        states[lane] = state
        out.append(symbol)
    assert next(source, None) is None
    return out


def decode_rans(payload: bytes, shape: tuple[int, ...], alphabet: int) -> list[int]:
    count = math.prod(shape)
    bits = Bits(payload)
    windowed, contextual, laned = bits.u(1), bits.u(1), bits.u(1)
    precision = 8 + bits.u(3)
    assert bits.u(2) == 0
    lanes = 2 ** bits.u(4) if laned else 1
    shift, begin, size, escapes = 0, 0, alphabet, 0
    if windowed:
        shift, begin, size, escapes = bits.u(5), bits.gamma() - 1, bits.gamma(), bits.gamma() - 1
    choices, offset, axes = 1, 0, []
    if contextual:
        choices, offset = bits.u(4) + 1, bits.gamma() - 1
        for axis in range(len(shape)):
            if bits.u(1):
                axes.append((axis, bits.u(4) + 1, bits.gamma() if bits.u(1) else None))
    tables = []
    for _ in range(choices):
        kind = bits.u(2)
        if kind < 2:
            levels = stepped_levels(bits, size + (escapes > 0), kind == 1)
        else:
            levels = curve_levels(bits, size, kind == 3, escapes)
        tables.append(frequencies(levels, precision))
    rest = payload[math.ceil(bits.at / 8) :]

    def packed(number: int, field: int) -> list[int]:
        nonlocal rest
        nbytes = math.ceil(number * field / 8)
        source, rest = Bits(rest[:nbytes]), rest[nbytes:]
        return [source.u(field) for _ in range(number)]

    classes = {}
    for axis, kinds, nbytes in axes:
        if nbytes is None:
            classes[axis] = packed(shape[axis], width(kinds))
        else:
            classes[axis] = decode_rans(rest[:nbytes], (shape[axis],), kinds)
            rest = rest[nbytes:]
    which = [
        min(max(sum(c[place[axis]] for axis, c in classes.items()) - offset, 0), choices - 1)
        for place in itertools.product(*map(range, shape))
    ]
    lows = packed(count, shift)
    escaped = iter(packed(escapes, width(-(-alphabet // 2**shift))))
    symbols = decode_stream(rest, which, tables, precision, lanes)
    highs = [next(escaped) if escapes and x == size else begin + x for x in symbols]
    return [(high << shift) + low for high, low in zip(highs, lows, strict=True)]
