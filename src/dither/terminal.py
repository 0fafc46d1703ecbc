"""Text that is safe to show; apart, because the command line shows it before torch loads."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Text on one line that does nothing to a terminal: names come from files that anyone made.

    >>> print(printable("a\nb\x1b[2J"))
    a\nb\x1b[2J
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
