"""Code parts: integers of a known alphabet, as packed bits or as a rANS stream."""

from __future__ import annotations

import math
from typing import Any

from numpy.typing import NDArray

from dither.coding.bits import code_dtype, packed_nbytes, unpack_bits, width_of
from dither.coding.errors import CodingError
from dither.coding.parity_contexts import Machine
from dither.coding.part_plan import plan_part, smaller
from dither.coding.payload import decode_rans

MAX_ALPHABET = 1 << 24
"""The largest alphabet."""


def checked(values: NDArray[Any], alphabet: int) -> NDArray[Any]:
    """Flat codes in their canonical type; ValueError where they are no codes of the alphabet."""
    if not 1 <= alphabet <= MAX_ALPHABET:
        raise ValueError(f"an alphabet has 1 to {MAX_ALPHABET} symbols, not {alphabet}")
    if values.dtype.kind not in "iub":
        raise ValueError(f"codes are integers, not {values.dtype}")
    if values.size and (int(values.min()) < 0 or int(values.max()) >= alphabet):
        raise ValueError(
            f"codes lie in 0 to {alphabet - 1}; these reach from {values.min()} to {values.max()}"
        )
    return values.reshape(-1).astype(code_dtype(alphabet), copy=False)


def encode_codes(
    values: NDArray[Any], alphabet: int, machine: tuple[int, int] | None = None
) -> tuple[str, bytes]:
    """Compress integer codes without loss.

    Args:
        values: integers ``0 .. alphabet - 1`` of any shape and integer type. The shape guides the
            choice of contexts and must be given again to decode.
        alphabet: 1 to 2**24.
        machine: polynomials of a machine whose state says more about the codes; it is used where
            that saves bytes. See :mod:`dither.coding.parity_contexts`.

    Returns:
        Codec name, ``"bits"`` or ``"rans"``, and the payload, the smaller of the two; ``"bits"``
        and no bytes for an empty array or an alphabet of one symbol.

    Raises:
        ValueError: values outside the alphabet, or not integers.

    >>> import numpy as np
    >>> codec, payload = encode_codes(np.array([[0, 1, 1], [2, 1, 1]]), 3)
    >>> codec, payload.hex()
    ('bits', '9405')
    >>> decode_codes(codec, payload, (2, 3), 3)
    array([[0, 1, 1],
           [2, 1, 1]], dtype=uint8)
    """
    flat = checked(values, alphabet)
    if alphabet == 1 or flat.size == 0:
        return "bits", b""
    steering = None if machine is None else Machine(*machine)
    plan = plan_part(flat, values.shape, alphabet, steering, is_thorough=True)
    return smaller(plan, flat, values.shape, alphabet)


def decode_codes(
    codec: str, payload: bytes | memoryview, shape: tuple[int, ...], alphabet: int
) -> NDArray[Any]:
    """The inverse of :func:`encode_codes`.

    Args:
        codec: ``"bits"`` or ``"rans"``.
        payload: all of it and nothing else.
        shape: of the codes; the caller checks first that it can afford that much memory.
        alphabet: 1 to 2**24.

    Returns:
        Codes in the smallest of uint8 (up to 256 symbols), int16 (up to 32,768) and int32.

    Raises:
        CodingError: a payload that is not exactly right, or an impossible request.
    """
    if not 1 <= alphabet <= MAX_ALPHABET or any(length < 0 for length in shape):
        raise CodingError(f"no codes have the shape {shape} and {alphabet} symbols")
    count, width = math.prod(shape), width_of(alphabet)
    if codec == "rans" and count and width:
        return decode_rans(payload, shape, alphabet)
    if codec != "bits":
        raise CodingError(f"codec {codec!r} cannot hold {count} codes of {alphabet} symbols")
    if len(payload) != packed_nbytes(count, width):
        raise CodingError(
            f"{count} codes of {width} bits take {packed_nbytes(count, width)} bytes, "
            f"not {len(payload)}"
        )
    out = unpack_bits(payload, count, width)
    if count and int(out.max()) >= alphabet:
        raise CodingError(f"a code is not below {alphabet}")
    return out.astype(code_dtype(alphabet), copy=False).reshape(shape)
