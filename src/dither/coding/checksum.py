"""Checksums of stored bytes."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


def crc32(data: bytes | bytearray | memoryview | NDArray[Any]) -> int:
    """CRC-32 (ISO-HDLC, as in zlib, gzip and PNG) of the bytes of ``data``, 0 to 2**32 - 1.

    >>> hex(crc32(b"123456789"))
    '0xcbf43926'
    """
    if isinstance(data, np.ndarray):
        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    return zlib.crc32(data)
