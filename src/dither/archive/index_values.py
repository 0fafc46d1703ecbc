"""Values of an archive's index, which anyone may have written: each is checked as it is read."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from dither.core import DTYPES, ArchiveError, Format, SpecError
from dither.formats import format_from_json

T = TypeVar("T")

MAX_DIMENSIONS = 32
MAX_NUMEL = 1 << 46


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no field may stand twice."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a field stands twice")
    return table


def no_constant(text: str) -> None:
    """Refuse NaN and the infinities, which Python's reader takes."""
    raise ValueError(f"{text} is not JSON")


def table_of(value: object, what: str, names: tuple[str, ...]) -> dict[str, list[Any]]:
    """A table in columns: exactly those named, each a list."""
    table = expect(value, dict, what)
    if set(table) != set(names):
        raise ArchiveError(f"the archive's index has the columns {sorted(table)} of {what}")
    return {name: expect(table[name], list, f"column {name!r} of {what}") for name in names}


def equal(columns: dict[str, list[Any]], what: str) -> list[list[Any]]:
    """The columns, if they are of one length."""
    if len({len(column) for column in columns.values()}) != 1:
        raise ArchiveError(f"the archive's index has columns of unequal length for {what}")
    return list(columns.values())


def expect(value: object, kind: type[T], what: str) -> T:
    """A value of a kind, and no other."""
    if not isinstance(value, kind):
        raise ArchiveError(
            f"the archive's index is damaged: {what} is {type(value).__name__}, not {kind.__name__}"
        )
    return value


def integer(value: object, most: int, what: str, least: int = 0) -> int:
    """An integer within bounds."""
    if type(value) is not int or not least <= value <= most:
        raise ArchiveError(
            f"the archive's index is damaged: {what} is {value!r}, expected an integer from "
            f"{least} to {most}"
        )
    return value


def dtype_in(value: object, where: str) -> str:
    """The name of a known type."""
    if not isinstance(value, str) or value not in DTYPES:
        raise ArchiveError(f"{where} has the unknown type {value!r}; upgrade dither")
    return value


def shape_in(value: object, where: str) -> tuple[int, ...]:
    """Sizes of axes whose product is in bounds."""
    sizes = expect(value, list, f"shape of {where}")
    if len(sizes) > MAX_DIMENSIONS:
        raise ArchiveError(f"{where} has {len(sizes)} dimensions, more than {MAX_DIMENSIONS}")
    shape = tuple(integer(n, MAX_NUMEL, f"shape of {where}") for n in sizes)
    if math.prod(max(n, 1) for n in shape) > MAX_NUMEL:
        raise ArchiveError(f"{where} has the shape {shape}, more than {MAX_NUMEL} values")
    return shape


def format_in(item: object) -> Format:
    """A known format with settings in range."""
    settings = expect(item, dict, "format")
    try:
        return format_from_json(settings)
    except (SpecError, TypeError, ValueError) as error:
        raise ArchiveError(f"the archive uses a format that cannot be read: {error}") from error
