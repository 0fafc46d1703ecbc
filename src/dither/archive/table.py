"""The table that ``print(archive)`` and the command line show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dither.archive.layout import Entry
from dither.terminal import printable


def table(entries: Sequence[Entry], aliases: Mapping[str, str], nbytes: int) -> str:
    """One line for each tensor: name, shape, type, format, bytes and bits per value."""
    rows = [("tensor", "shape", "dtype", "format", "bytes", "bits/value")]
    rows += [
        (
            printable(entry.name),
            "x".join(map(str, entry.shape)) or "scalar",
            entry.dtype,
            describe(entry),
            f"{entry.nbytes:,}",
            f"{8 * entry.nbytes / entry.numel:.2f}" if entry.numel else "",
        )
        for entry in entries
    ]
    rows += [
        (printable(alias), "", "", f"= {printable(name)}", "", "")
        for alias, name in aliases.items()
    ]
    payload = sum(entry.nbytes for entry in entries)
    original = sum(entry.decoded_nbytes for entry in entries)
    rows.append(("names, shapes, checksums", "", "", "", f"{nbytes - payload:,}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = [
        "  ".join(
            cell.rjust(width) if i > 3 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    ratio = f", {original / nbytes:.2f}x smaller" if nbytes else ""
    lines.append(f"{nbytes:,} bytes for {original:,} bytes of tensors{ratio}")
    return "\n".join(lines)


def describe(entry: Entry) -> str:
    """A format and its settings, short: ``affine(bits=4, axis=0)``, or how it rests on a base."""
    if entry.on_base and not entry.parts:
        return "= base"
    settings = ", ".join(f"{key}={value}" for key, value in entry.format.to_json().items())
    return f"{'base + ' if entry.on_base else ''}{entry.format.name}({settings})"
