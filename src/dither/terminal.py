"""Text that is safe to show; apart, because the command line shows it before torch loads."""

from __future__ import annotations

from collections.abc import Sequence


def printable(text: str) -> str:
    r"""Text on one line that does nothing to a terminal: names come from files that anyone made.

    >>> print(printable("a\nb\x1b[2J"))
    a\nb\x1b[2J
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def some_names(names: Sequence[str], most: int = 8) -> str:
    """A list for an error's text, cut where it is long.

    >>> some_names(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more
