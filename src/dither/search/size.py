"""Sizes as people write them."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import numpy as np

from dither.core import BudgetError

LEAST_SHARE = 0.985
SLACK_NBYTES = 64
"""A file that meets its budget fills this share of it, or all but this many bytes."""

ENOUGH = 0.995
"""A file that fills this share of its budget needs no more passes."""

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_PATTERN = re.compile(
    r"\s*([0-9][0-9_]{0,30}\.?[0-9]{0,30}|\.[0-9]{1,30})\s*([a-z%]*)\s*", re.IGNORECASE
)


def parse_size(size: float | str, original_nbytes: int, values: int | None = None) -> int:
    """Bytes that ``size`` allows.

    Args:
        size: a number of bytes, or a text: ``"9MB"`` (10^6), ``"9MiB"`` (2^20), ``"25%"`` or
            ``"12x"`` of the source tensors' own bytes, ``"3.2 bits"`` for each value.
        original_nbytes: those bytes.
        values: how many values there are; without, a size in bits is refused.

    Raises:
        BudgetError: the text means no size, or none of at least one byte.

    >>> parse_size("9.5MB", 0), parse_size("2 KiB", 0), parse_size("25%", 4000)
    (9500000, 2048, 1000)
    >>> parse_size(9e6, 0)
    9000000
    >>> parse_size("12x", 4800), parse_size("3.2 bits", 4000, values=1000)
    (400, 400)
    """
    given: object = size.item() if isinstance(size, np.generic) else size
    if isinstance(given, str):
        nbytes = _parse(given, original_nbytes, values)
    elif isinstance(given, int | float) and not isinstance(given, bool) and given == given // 1:
        nbytes = int(given)
    else:
        raise BudgetError(f"a size is a number of bytes or a text, not {size!r}; {_EXAMPLES}")
    if nbytes < 1:
        raise BudgetError(f"the size {size!r} leaves {nbytes} bytes; {_EXAMPLES}")
    return nbytes


_EXAMPLES = 'write for example 9_000_000, "9MB", "9MiB", "25%", "12x" or "3.2 bits"'


def _parse(text: str, original_nbytes: int, values: int | None) -> int:
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise BudgetError(f"{text!r} is no size; {_EXAMPLES}")
    number, unit = Fraction(match[1].replace("_", "").rstrip(".")), match[2].lower()
    if unit == "%":
        return int(number / 100 * original_nbytes)
    if unit == "x":
        if number <= 0:
            raise BudgetError(f"{text!r} is no ratio; {_EXAMPLES}")
        return int(original_nbytes / number)
    if unit in {"bit", "bits"} and values is not None:
        return math.ceil(number * values / 8)
    if unit not in _UNITS:
        raise BudgetError(f"{text!r} has the unknown unit {match[2]!r}; {_EXAMPLES}")
    return int(number * _UNITS[unit])


def fills(size: int, budget: int) -> bool:
    """Whether a file meets its budget so well that more passes are not worth their time.

    >>> fills(995, 1000), fills(1001, 1000), fills(80_000, 90_000)
    (True, False, False)
    """
    return size <= budget and (size >= ENOUGH * budget or size >= budget - SLACK_NBYTES)
