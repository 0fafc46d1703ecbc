"""Parts of tensors as they are read: bytes with their checksums, codes, numbers."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from dither.archive.base import wide
from dither.archive.layout import Entry, Part
from dither.archive.source import Source
from dither.coding import CodingError, crc32, decode_array, decode_codes
from dither.core import DTYPES, ArchiveError, Codes, Encoded, SpecError


def read_encoded(source: Source, entry: Entry) -> Encoded:
    """A tensor's codes and parameters; of one that rests on a base, those of the difference.

    Raises:
        ArchiveError: a part is damaged.
    """
    codes: dict[str, Codes] = {}
    params: dict[str, Tensor] = {}
    with source.bringing(*span([entry])):
        for part in entry.parts:
            if part.alphabet is not None:
                codes[part.name] = _codes(source, entry, part, part.alphabet)
            elif part.dtype is not None:
                params[part.name] = _numbers(source, entry, part, DTYPES[part.dtype])
    dtype = wide(entry.dtype) if entry.on_base else DTYPES[entry.dtype]
    try:
        return Encoded(entry.format, entry.shape, dtype, codes, params)
    except SpecError as error:
        raise ArchiveError(f"tensor {entry.name!r} is damaged: {error}") from error


def read_payload(source: Source, entry: Entry, part: Part) -> bytes:
    """The bytes of a part, whose checksum holds."""
    if part.inline is not None:
        return part.inline
    payload = source.read(part.offset, part.length)
    if crc32(payload) != part.crc:
        source.check_unchanged()
        raise _damaged(entry, part, "its checksum does not match")
    return payload


def span(entries: Collection[Entry]) -> tuple[int, int]:
    """From where to where what is stored of some tensors lies."""
    parts = [p for entry in entries for p in entry.parts if p.inline is None and p.length]
    begin = min((part.offset for part in parts), default=0)
    return begin, max((part.offset + part.length for part in parts), default=0)


def _codes(source: Source, entry: Entry, part: Part, alphabet: int) -> Codes:
    try:
        payload = read_payload(source, entry, part)
        values = decode_codes(part.codec, payload, part.shape, alphabet)
    except CodingError as error:
        raise _damaged(entry, part, str(error)) from error
    return Codes(torch.from_numpy(values).reshape(part.shape), alphabet)


def _numbers(source: Source, entry: Entry, part: Part, dtype: torch.dtype) -> Tensor:
    nbytes = math.prod(part.shape) * dtype.itemsize
    try:
        data = decode_array(part.codec, read_payload(source, entry, part), nbytes, dtype.itemsize)
    except CodingError as error:
        raise _damaged(entry, part, str(error)) from error
    if dtype == torch.bool and data.size and int(data.max()) > 1:
        raise _damaged(entry, part, "a truth value is neither 0 nor 1")
    if not nbytes:
        return torch.empty(part.shape, dtype=dtype)
    return torch.from_numpy(data).view(dtype).reshape(part.shape)


def _damaged(entry: Entry, part: Part, why: str) -> ArchiveError:
    return ArchiveError(f"tensor {entry.name!r}, part {part.name!r} is damaged: {why}")
