"""Lossless coding of integers: bit packing, rANS, checksums and cost estimates.

This room knows arrays, not models. The bytes it writes are part of the file format for ever;
``docs/FORMAT.md`` specifies them. Decoders use integer arithmetic only.
"""

from dither.coding.byte_planes import decode_array, encode_array
from dither.coding.checksum import crc32
from dither.coding.codes import decode_codes, encode_codes
from dither.coding.cost import code_lengths, estimate_from_counts, estimate_nbytes
from dither.coding.errors import CodingError
from dither.coding.payload import coder_nbytes

__all__ = [
    "CodingError",
    "code_lengths",
    "coder_nbytes",
    "crc32",
    "decode_array",
    "decode_codes",
    "encode_array",
    "encode_codes",
    "estimate_from_counts",
    "estimate_nbytes",
]
