"""An archive as HTML: a map of its bytes, and what a notebook shows of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from dither.archive.layout import Entry
from dither.archive.table import describe
from dither.archive.treemap import squarified

MOST_BOXES, LEAST_BOX = 120, 0.0015
"""Boxes of the map, and the least share of the file that one stands for; the rest share one."""
MOST_LINES = 16
"""Tensors in a notebook's table, the largest."""

_DARKEST = 8.0
_OVERHEAD = "names, shapes, checksums"
_WIDTH, _HEIGHT = 900.0, 300.0
_BOX = "position:absolute;overflow:hidden;padding:3px 5px;font-size:11px;line-height:1.3;"
_BOX += "box-sizing:border-box;border:1px solid #fff;text-align:left;"
_CELLS = "text-align:left;padding:1px 14px 1px 0;"

Box = tuple[str, int, float | None]
"""What it is called, its bytes, and bits per value, if it has values."""


def notebook(entries: Sequence[Entry], aliases: Mapping[str, str], nbytes: int) -> str:
    """What stands beneath a cell: one line, the map, and a table of the largest tensors.

    It needs no style sheet: what is not trusted may bring none.
    """
    original = sum(entry.decoded_nbytes for entry in entries)
    values = sum(entry.numel for entry in entries)
    bits = f", {8 * nbytes / values:.2f} bits per value" if values else ""
    boxes = gathered(((e.name, e.nbytes, e.numel) for e in entries), nbytes)
    ranked = sorted(entries, key=lambda entry: -entry.nbytes)
    rows = [
        (
            broken(entry.name),
            "&times;".join(map(str, entry.shape)) or "scalar",
            entry.dtype,
            text(describe(entry)),
            f"{entry.nbytes:,}",
            f"{8 * entry.nbytes / entry.numel:.2f}" if entry.numel else "",
        )
        for entry in ranked[:MOST_LINES]
    ]
    heads = ("tensor", "shape", "dtype", "format", "bytes", "bits/value")
    lines = [_line("th", heads), *(_line("td", row) for row in rows)]
    rest = [f"smaller tensors: {len(ranked) - len(rows):,}"] if len(ranked) > len(rows) else []
    rest += [f"tied names: {len(aliases):,}"] if aliases else []
    end = f"<p>{'; '.join(rest)}</p>" if rest else ""
    return (
        f'<div style="max-width:{_WIDTH:.0f}px"><p><b>{nbytes:,} bytes</b> for {len(entries):,} '
        f"tensors of {original:,} bytes, {original / nbytes:.2f}&times; smaller{bits}</p>"
        f'<div style="position:relative;width:100%;aspect-ratio:{_WIDTH:.0f}/{_HEIGHT:.0f}">'
        f"{drawn(boxes, nbytes, _WIDTH, _HEIGHT, _BOX)}</div>"
        f"<table>{''.join(lines)}</table>{end}</div>"
    )


def _line(kind: str, cells: Sequence[str]) -> str:
    parts = [f'<{kind} style="{_CELLS}">{cell}</{kind}>' for cell in cells]
    return f"<tr>{''.join(parts)}</tr>"


def gathered(tensors: Iterable[tuple[str, int, int]], total: int) -> list[Box]:
    """Boxes of a map, the largest first, of names, bytes and numbers of values.

    What is too small shares one, and what no tensor takes of the ``total`` has one, too.
    """
    ranked = sorted((t for t in tensors if t[1]), key=lambda t: -t[1])
    seen = [t for t in ranked[:MOST_BOXES] if t[1] >= LEAST_BOX * total]
    boxes: list[Box] = [(name, nbytes, _bits(nbytes, numel)) for name, nbytes, numel in seen]
    if rest := ranked[len(seen) :]:
        name = rest[0][0] if len(rest) == 1 else f"{len(rest):,} smaller tensors"
        nbytes = sum(t[1] for t in rest)
        boxes.append((name, nbytes, _bits(nbytes, sum(t[2] for t in rest))))
    overhead = total - sum(t[1] for t in ranked)
    if overhead > 0:
        boxes.append((_OVERHEAD, overhead, None))
    return sorted(boxes, key=lambda box: -box[1])


def _bits(nbytes: int, numel: int) -> float | None:
    return 8 * nbytes / numel if numel else None


def drawn(boxes: Sequence[Box], total: int, width: float, height: float, style: str = "") -> str:
    """The boxes of a map, placed within an element of ``width`` by ``height``.

    Args:
        boxes: of :func:`gathered`.
        total: bytes of the file.
        width: in pixels, about.
        height: likewise.
        style: of each box, where no style sheet has it.
    """
    places = squarified([nbytes for _, nbytes, _ in boxes], width, height)
    parts = []
    for (name, nbytes, bits), (left, top, wide, high) in zip(boxes, places, strict=True):
        back, ink = shade(bits)
        share = f"{100 * nbytes / total:.1f} %"
        title = f"{name}: {nbytes:,} bytes, {share}"
        if bits is not None:
            title += f", {bits:.2f} bits per value"
        # A box that is too small for its words has its title only.
        room = wide > 90 and high > 14.5 * (_lines(name, (wide - 12) / 6.8) + 1) + 8
        words = f"<b>{broken(name)}</b>{'<br>' if style else ''}{share}" if room else ""
        parts.append(
            f'<div title="{text(title)}" style="{style}left:{100 * left / width:.3f}%;'
            f"top:{100 * top / height:.3f}%;width:{100 * wide / width:.3f}%;"
            f"height:{100 * high / height:.3f}%;background:{back};color:{ink};"
            f'{"" if room else "padding:0"}">{words}</div>'
        )
    return "".join(parts)


def _lines(name: str, letters: float) -> int:
    """Lines that a name takes where so many letters fit into one, broken as ``broken`` does."""
    lines, used = 1, 0.0
    for piece in re.findall(r"[^._]*[._]?", name):
        if used and used + len(piece) > letters:
            lines, used = lines + 1, 0.0
        used += len(piece)
        lines, used = lines + int(used // (letters + 1)), used % (letters + 1)
    return lines


def shade(bits: float | None) -> tuple[str, str]:
    """Background and ink: the more bits, the darker, so that it reads in grey, too."""
    if bits is None:
        return "#d9d9d9", "#1b1f24"
    light = 92 - 62 * min(bits, _DARKEST) / _DARKEST
    return f"hsl(211 52% {light:.0f}%)", "#fff" if light < 58 else "#10243a"


def text(value: object) -> str:
    """Text for HTML; names come from files that anyone may have made."""
    shown = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in str(value))
    return escape(shown, quote=True)


def broken(name: str) -> str:
    """A name that may break after its dots and underscores."""
    return text(name).replace(".", ".<wbr>").replace("_", "_<wbr>")
