"""Sizes as people write them."""

from __future__ import annotations

import contextlib
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dither.core import BudgetError
from dither.search import parse_size

SCALES = {
    "": 1,
    "B": 1,
    "kB": 1000,
    "KB": 1000,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 1024,
    "MiB": 2**20,
    "GiB": 2**30,
}


@pytest.mark.parametrize("unit", SCALES)
def test_units(unit: str) -> None:
    scale = SCALES[unit]
    for text in (f"3{unit}", f" 3 {unit} ", f"3.0{unit}", f"3.{unit}", f"3{unit.lower()}"):
        assert parse_size(text, 0) == 3 * scale


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, 1),
        (9_000_000, 9_000_000),
        ("9_000_000", 9_000_000),
        (".5kB", 500),
        ("100%", 4800),
        ("25 %", 1200),
        ("12.5%", 600),
        ("250%", 12_000),
        ("12x", 400),
        ("1.5X", 3200),
        ("0.5x", 9600),
        ("7x", 685),
    ],
)
def test_sizes(size: int | str, expected: int) -> None:
    assert parse_size(size, 4800) == expected


@given(st.integers(1, 10**6), st.integers(0, 4), st.sampled_from(sorted(SCALES)))
def test_a_decimal_number_means_what_it_says(number: int, digits: int, unit: str) -> None:
    written = Decimal(number).scaleb(-digits)
    exact = int(written * SCALES[unit])
    if exact > 1:
        assert abs(parse_size(f"{written:f}{unit}", 0) - exact) <= 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [("4.1MB", 4_100_000), ("8.2MB", 8_200_000), ("0.7%", 7000), ("1.4%", 14_000)],
)
def test_decimals_mean_what_they_say(size: str, expected: int) -> None:
    assert parse_size(size, 1_000_000) == expected


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("", "is no size"),
        ("MB", "is no size"),
        ("nine", "is no size"),
        ("1e6", "is no size|unknown unit"),
        ("-3MB", "is no size"),
        ("+3", "is no size"),
        ("1.2.3MB", "is no size"),
        ("3 MB MB", "is no size"),
        ("_3", "is no size"),
        ("inf", "is no size"),
        ("nan", "is no size"),
        ("٣MB", "is no size"),
        ("9" * 400, "is no size"),
        ("3TB", "unknown unit 'TB'"),
        ("3Mb/s", "is no size"),
        ("3%%", "unknown unit '%%'"),
        ("0", "leaves 0 bytes"),
        ("0.4B", "leaves 0 bytes"),
        ("0%", "leaves 0 bytes"),
        ("0x", "is no ratio"),
        ("10000x", "leaves 0 bytes"),
        (0, "leaves 0 bytes"),
        (-5, "leaves -5 bytes"),
        (1.5, "a number of bytes or a text"),
        (True, "a number of bytes or a text"),
        (None, "a number of bytes or a text"),
    ],
)
def test_what_is_no_size(size: object, message: str) -> None:
    with pytest.raises(BudgetError, match=message) as caught:
        parse_size(size, 4800)  # type: ignore[arg-type]
    assert '"9MB"' in str(caught.value)  # what to write instead


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    with contextlib.suppress(BudgetError):
        assert parse_size(text, 1000) >= 1
