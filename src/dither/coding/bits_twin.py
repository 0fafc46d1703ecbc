"""Compiled twins of :mod:`dither.coding.bits`: one field after another."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dither.compiled import Twin

U8, U32, U64 = np.uint8, np.uint32, np.uint64


def pack_loop(values: NDArray[Any], width: int, out: NDArray[np.uint8]) -> None:
    """Fields of ``width`` bits, lowest bit first, into exactly as many bytes as they fill."""
    pending, bits, at, wide = U64(0), U64(0), U64(0), U64(width)
    for index in range(len(values)):
        pending |= U64(U32(values[index])) << bits
        bits += wide
        while bits >= U64(8):
            out[at] = U8(pending)
            pending >>= U64(8)
            bits -= U64(8)
            at += U64(1)
    if bits:
        out[at] = U8(pending)


def unpack_loop(source: NDArray[np.uint8], width: int, out: NDArray[Any]) -> None:
    """The inverse: a field reaches into four bytes at most, which are looked for near the end."""
    mask, wide, size, bit = U32((1 << width) - 1), U64(width), U64(len(source)), U64(0)
    for index in range(len(out)):
        byte, shift = bit >> U64(3), U32(bit & U64(7))
        if byte + U64(4) <= size:
            low = U32(source[byte]) | U32(U32(source[byte + U64(1)]) << U32(8))
            high = U32(source[byte + U64(2)]) | U32(U32(source[byte + U64(3)]) << U32(8))
            found = U32(low | U32(high << U32(16)))
        else:
            found = U32(0)
            for place in range(size - byte):
                found |= U32(U32(source[byte + U64(place)]) << U32(U64(8) * U64(place)))
        out[index] = U32(found >> shift) & mask
        bit += wide


PACK, UNPACK = Twin(pack_loop), Twin(unpack_loop)


def packed(values: NDArray[Any], width: int, nbytes: int) -> NDArray[np.uint8] | None:
    """Flat values in ``nbytes`` bytes, as many as they fill. None where plain code is to pack."""
    run = PACK.chosen(len(values) * 5e-9)
    if run is None:
        return None
    out = np.empty(nbytes, np.uint8)
    run(np.ascontiguousarray(values), width, out)
    return out


def unpacked(source: NDArray[np.uint8], width: int, out: NDArray[Any]) -> bool:
    """Fill ``out`` from exactly as many bytes as it takes; False where plain code is to do it."""
    run = UNPACK.chosen(len(out) * 5e-9)
    if run is not None:
        run(source, width, out)
    return run is not None
