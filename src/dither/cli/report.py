"""Results as JSON documents and as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dither.archive import Archive, Entry, describe
from dither.cli.compare import Comparison
from dither.cli.console import Printer
from dither.core import DTYPES, code_width
from dither.search import Outlook
from dither.terminal import some_names

_MOST_EXACT = 5
_DEEPEST = 64
"""Modules within modules in a tree; names of files that anyone may have made can be deeper."""
_ITSELF = "(itself)"
"""A tensor whose name is that of a module, too."""


def archive_document(archive: Archive, budget: object = None) -> dict[str, Any]:
    """An archive for machines; ``bits`` is the exact payload before entropy coding."""
    original = archive.original_nbytes
    return {
        "nbytes": archive.nbytes,
        "budget": budget,
        "original_nbytes": original,
        "ratio": original / archive.nbytes,
        "tensors": [_entry_document(entry) for entry in archive.entries.values()],
        "aliases": dict(archive.aliases),
        "metadata": dict(archive.metadata),
        "base": archive.base,
    }


def _entry_document(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "shape": list(entry.shape),
        "dtype": entry.dtype,
        "format": entry.format.name,
        "on_base": entry.on_base,
        "settings": entry.format.to_json(),
        "nbytes": entry.nbytes,
        "bits": _fixed_bits(entry),
        "bits_per_value": 8 * entry.nbytes / entry.numel if entry.numel else None,
        "codecs": {part.name: part.codec for part in entry.parts},
    }


def _fixed_bits(entry: Entry) -> int:
    """Bits of all parts at fixed width, from the index alone."""
    total = 0
    for part in entry.parts:
        width = code_width(part.alphabet) if part.alphabet else 0
        width = 8 * DTYPES[part.dtype].itemsize if part.dtype else width
        total += math.prod(part.shape) * width
    return total


def print_summary(printer: Printer, archive: Archive) -> None:
    """An archive for people: one line for each format."""
    groups: dict[str, list[Entry]] = {}
    for entry in archive.entries.values():
        groups.setdefault(describe(entry).partition("(")[0], []).append(entry)
    rows = [
        (
            name,
            f"{len(entries):,}",
            f"{sum(entry.numel for entry in entries):,}",
            *_sizes(sum(e.nbytes for e in entries), sum(e.numel for e in entries)),
        )
        for name, entries in groups.items()
    ]
    rows.append(("names, shapes, checksums", "", "", *_sizes(_overhead(archive), 0)))
    printer.table(("format", "tensors", "values", "bytes", "bits/value"), rows)
    _print_total(printer, archive)


def print_tensors(printer: Printer, archive: Archive) -> None:
    """An archive for people: one line for each tensor."""
    rows = [
        (
            entry.name,
            _shape(entry.shape),
            entry.dtype,
            describe(entry),
            *_sizes(entry.nbytes, entry.numel),
        )
        for entry in archive.entries.values()
    ]
    rows += [(alias, "", "", f"= {name}", "", "") for alias, name in archive.aliases.items()]
    rows.append(("names, shapes, checksums", "", "", "", *_sizes(_overhead(archive), 0)))
    columns = ("tensor", "shape", "dtype", "format", "bytes", "bits/value")
    printer.table(columns, rows, left=4)
    if archive.base is not None:
        printer.text(f"base: {archive.base}")
    for key, value in archive.metadata.items():
        printer.text(f"{key}: {value}")
    _print_total(printer, archive)


def print_tree(printer: Printer, archive: Archive) -> None:
    """An archive for people: one line for each module and tensor, with the bytes beneath it."""
    rows = [
        ("  " * depth + label, what, *_sizes(nbytes, numel), _share(nbytes, archive))
        for depth, label, nbytes, numel, what in _tree(archive.entries)
    ]
    rest = _overhead(archive)
    rows.append(("names, shapes, checksums", "", *_sizes(rest, 0), _share(rest, archive)))
    printer.table(("module", "format", "bytes", "bits/value", "share"), rows, left=2)
    _print_total(printer, archive)


class _Line(NamedTuple):
    """One line of a tree: a module, or a tensor, of which ``what`` says more."""

    depth: int
    label: str
    nbytes: int
    numel: int
    what: str = ""


def _tree(named: Mapping[str, Entry], depth: int = 0) -> list[_Line]:
    """Lines of modules and what is in them, in the file's order, of entries by name.

    A module with nothing but one module or tensor shares a line with it.
    """
    groups: dict[str, dict[str, Entry]] = {}
    for name, entry in named.items():
        first, _, rest = name.partition(".")
        if not rest or depth == _DEEPEST:
            first, rest = name, ""
        groups.setdefault(first, {})[rest] = entry
    lines: list[_Line] = []
    for label, within in groups.items():
        entries = within.values()
        sums = sum(e.nbytes for e in entries), sum(e.numel for e in entries)
        if len(within) == 1:
            rest, entry = next(iter(within.items()))
            what = f"{_shape(entry.shape)} {entry.dtype}, {describe(entry)}"
            lines.append(_Line(depth, f"{label}.{rest}" if rest else label or _ITSELF, *sums, what))
            continue
        below = _tree(within, depth + 1)
        if sum(line.depth == depth + 1 for line in below) == 1:  # a chain of modules
            lines.append(_Line(depth, f"{label}.{below[0].label}", *sums))
            lines += [line._replace(depth=line.depth - 1) for line in below[1:]]
        else:
            lines += [_Line(depth, label, *sums), *below]
    return lines


def _print_total(printer: Printer, archive: Archive) -> None:
    original = archive.original_nbytes
    printer.text(
        f"{archive.nbytes:,} bytes for {original:,} bytes of tensors, "
        f"{original / archive.nbytes:.2f}x smaller"
    )


def _share(nbytes: int, archive: Archive) -> str:
    return f"{100 * nbytes / archive.nbytes:.1f} %"


def _overhead(archive: Archive) -> int:
    return archive.nbytes - sum(entry.nbytes for entry in archive.entries.values())


def _sizes(nbytes: int, numel: int) -> tuple[str, str]:
    return f"{nbytes:,}", f"{8 * nbytes / numel:.2f}" if numel else ""


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def print_outlook(printer: Printer, found: Outlook) -> None:
    """What is predicted of several sizes, for people."""
    kinds = list(dict.fromkeys(kind for row in found.sizes for kind in row.kinds))
    first = max(found.sizes, key=lambda row: row.nbytes)
    rows = [
        (
            row.size,
            f"{row.nbytes:,}" if row.is_reachable else "out of reach",
            f"{row.bits:.2f}",
            f"{row.snr:.1f}",
            f"{row.loss / first.loss:,.0f}x" if first.loss else "",
            f"{len(row.erased)}",
            *(f"{row.kinds.get(kind, 0):,}" for kind in kinds),
        )
        for row in found.sizes
    ]
    columns = ("size", "bytes", "bits/value", "SNR dB", "loss", "erased")
    printer.table((*columns, *kinds), rows)
    printer.text(
        f"predicted, for {found.values:,} values in {found.original_nbytes:,} bytes; the smallest "
        f"file takes about {found.smallest:,} bytes; compressing takes about {found.seconds:.0f} s"
    )
    lost = max(found.sizes, key=lambda row: len(row.erased)).erased
    if lost:
        printer.text(f"erased at the smallest size (nothing but error is left): {some_names(lost)}")
    for name, why in list(found.exact.items())[:_MOST_EXACT]:
        printer.text(f"kept exactly: {name} ({why})")
    if len(found.exact) > _MOST_EXACT:
        printer.text(f"and {len(found.exact) - _MOST_EXACT} more tensors")


def comparison_document(found: Comparison, below: list[str]) -> dict[str, Any]:
    """A comparison for machines; where ``sqnr_db`` is null, ``equal`` says which infinity."""
    return {
        "same_names": found.same_names,
        "only_a": list(found.only_a),
        "only_b": list(found.only_b),
        "reshaped": {name: list(shapes) for name, shapes in found.reshaped.items()},
        "below_min_sqnr": below,
        "tensors": [
            {
                "name": item.name,
                "shape": list(item.shape),
                "dtypes": list(item.dtypes),
                "sqnr_db": item.sqnr,
                "max_abs_error": item.largest,
                "equal": item.equal,
            }
            for item in found.differences
        ],
        "total": {
            "tensors": len(found.differences),
            "equal": found.equal,
            "sqnr_db": found.sqnr,
            "max_abs_error": found.largest,
        },
    }


def print_comparison(
    printer: Printer, found: Comparison, below: list[str], min_sqnr: float | None
) -> None:
    """A comparison for people."""
    rows = [
        (
            item.name,
            _shape(item.shape),
            " / ".join(dict.fromkeys(item.dtypes)),
            f"{item.sqnr:.2f}",
            f"{item.largest:.4g}",
        )
        for item in found.differences
    ]
    count = len(found.differences)
    equal = f"{found.equal} of {count} equal"
    rows.append((f"all {count}", equal, "", f"{found.sqnr:.2f}", f"{found.largest:.4g}"))
    printer.table(("tensor", "shape", "dtype", "SQNR dB", "largest error"), rows, left=3)
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        if names:
            printer.text(f"only in {side}: {some_names(names)}")
    for name, (left, right) in found.reshaped.items():
        printer.text(f"of another shape: {name} is {_shape(left)} in A, {_shape(right)} in B")
    if below:
        printer.text(f"below {min_sqnr:g} dB: {some_names(below)}")


def print_demo(printer: Printer, results: Mapping[str, Any], out: Path) -> None:
    """What the demo found, for people."""
    original = results["original"]
    rows = [("float32", "", f"{original['nbytes']:,}", "1.0x", f"{original['accuracy']:.2%}", "")]
    rows += [
        (
            row["method"],
            row["setting"],
            f"{row['nbytes']:,}",
            f"{original['nbytes'] / row['nbytes']:.1f}x",
            f"{row['accuracy']:.2%}",
            "yes" if row["bit_equal"] else "NO",
        )
        for row in results["rows"]
    ]
    columns = ("method", "setting", "bytes", "smaller", "accuracy", "bit-equal in a fresh process")
    printer.table(columns, rows)
    printer.text("")
    printer.text(results["finding"])
    printer.text(f"table, plot and files: {out}")
