"""Payloads written once, which decode for ever.

A test that fails here means that files in the world cannot be read any more. Encoders may choose
other bytes; decoders may not read these ones differently.
"""

import zlib

import numpy as np
import pytest

from dither.coding import decode_array, decode_codes
from tests.coding import reference

# name: codec, shape, alphabet, CRC-32 of the codes as little-endian int32, payload
PAYLOADS: dict[str, tuple[str, tuple[int, ...], int, int, str]] = {
    "packed bits": (
        "bits",
        (5, 7),
        11,
        0x27F7E62B,
        "1158660715a40615a86a4951743a19837205",
    ),
    "a curve": (
        "rans",
        (90,),
        40,
        0x238F62B6,
        (
            "003679062f020d909ee9d2efeda7ca9f5c3ea18443362ce57249cb41e0bb7f51b2a3a4b6ed48cd95"
            "1eac8ac9a367b2dd06f57578da"
        ),
    ),
    "a constant": (
        "rans",
        (30,),
        300,
        0xBF135FB3,
        "0100f032011f",
    ),
    "five far symbols": (
        "rans",
        (40,),
        1048576,
        0x4CECA020,
        "0001000008eac00340b61a0080fdd80d0070778e010084803a0080283f01603b0161f3e5ac56f6a5ee6777",
    ),
    "a curve with a spike": (
        "rans",
        (8, 20),
        24,
        0x8D42C657,
        "108354f701b0ce09859e0085b862919e5c504f9f6709",
    ),
    "single levels": (
        "rans",
        (8, 20),
        14,
        0x3DF52B81,
        (
            "2000e8844c8d440de105f005c143b0699b2c56d46480707c927c91bc5a4107555523f6914919d8f5"
            "860d8f0f9470539ce6667253ba949ac7aecd5175650a9bbbef21d652"
        ),
    ),
    "single levels with gaps": (
        "rans",
        (160,),
        40,
        0x3AA83158,
        (
            "1081902d117ebfa8ad6f17fd5ecbe45e163cf19e18365efd2fe7d95df16c63586877edd16e5f53df"
            "98b7f8d0bd93d872956f64402d74fa4e20cc6c57a9c3ea6ebd63e6e0577e5f8309b92c8cac14cef8"
            "d3d2d0b60d5e94bf8a650bbb0f072afb06823a257c2a8e74d0090d81"
        ),
    ),
    "sixteen lanes": (
        "rans",
        (200,),
        14,
        0x2A5259F6,
        (
            "3c64c708ac7744b5defbe80996c448407aefef936a67b8b4e27363b7a248ea65767f802593d3cfd6"
            "4b80087b211a9857ea7f00ff0da5f1afb2e32502f57ca015c7b8fb1aeb6bcb9a64c3322ec39ecbe6"
            "ba3c4a0c1537025362b1c984240c788b50f93f0d"
        ),
    ),
    "low bits and escapes": (
        "rans",
        (300,),
        6000,
        0x23130CD4,
        (
            "1103e01c8a282d7a0af616340e883cc87b5437b295618e10cd90a383d03dd1db86de80c0420007b1"
            "5773d3f1fc180bc7850aa948b924738e0d7b82102abc343546dcb98624350f48b1ef9c082ab21a3a"
            "d5b21419355e74711eb97d890c7360f5630203f163a76e1ff896fcaa8e9efeda1918ae3f4087aec1"
            "e50200b46b0739f11bf46388c1baeb53ca09ce1fe46c8ec7b54942ddfaa75d7ab2eda3a3273190da"
            "27ddade69b5c6c723f210fcf7fb654e6bd33748aa423e7"
        ),
    ),
    "contexts of rows and columns": (
        "rans",
        (10, 24),
        31,
        0xB99D5423,
        (
            "12a2a29097a03cccbd6d068a1502a200002020001ede150f9cd1a0175cf0c5a57388cc93a6b70a2b"
            "7ef852b12bffb7bf49dce33ff69ad55cb241c1f36bc46f3d900ba271db35b7996fcb37e3241aaedf"
            "4fe8c9b6bb95f9ba"
        ),
    ),
}

ARRAY = (
    "9244e801e0047c01e0047c2018100800f0e0d0c0b0a0908060402000c08000000080c00020406080"
    "90a0b0c0d0e0f0000810182028303840485058606870788084888c9094989c0081d4c04eec803db3"
    "023ff4d607f9b7deb1c7efab3b09764246333759db"
)


@pytest.mark.parametrize("name", PAYLOADS)
def test_codes(name: str) -> None:
    codec, shape, alphabet, checksum, payload = PAYLOADS[name]
    codes = decode_codes(codec, bytes.fromhex(payload), shape, alphabet)
    assert codes.shape == shape
    assert zlib.crc32(codes.astype("<i4").tobytes()) == checksum
    if codec == "rans":
        by_the_book = reference.decode_rans(bytes.fromhex(payload), shape, alphabet)
        assert by_the_book == codes.reshape(-1).tolist()


def test_an_array_of_numbers() -> None:
    numbers = decode_array("rans", bytes.fromhex(ARRAY), 240, 4).view("<f4")
    assert np.array_equal(numbers, (np.arange(60, dtype="<f4") - 20) / 8)
