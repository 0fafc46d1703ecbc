"""One HTML page about two archives, side by side: bytes, bits and errors, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor

from dither.archive import Archive, atomic_write
from dither.archive.picture import broken, drawn, gathered, text
from dither.report.contents import Contents, Stored, contents
from dither.report.page import BEST_SQNR, MOST_ROWS, NOTHING, cell, document, quality

Pair = tuple[Contents, Contents]


def save_pair(
    path: str | os.PathLike[str],
    archives: tuple[Archive, Archive],
    titles: tuple[str, str],
    against: tuple[str, Mapping[str, Tensor]] | None = None,
) -> Pair:
    """Write a page about two archives, whole or not at all.

    Args:
        path: of the page, ``.html``.
        archives: both, open.
        titles: what to call each.
        against: name and tensors of what was compressed, for errors.

    Returns:
        What the page shows of each.

    Raises:
        ArchiveError: a file is damaged.
    """
    one, other = archives
    found = contents(one, titles[0], against), contents(other, titles[1], against)
    with atomic_write(path) as file:
        file.write(pair_page(found).encode("utf-8", "backslashreplace"))
    return found


def pair_page(found: Pair) -> str:
    """The page as text."""
    title = f"{found[0].title} and {found[1].title}"
    return document(title, [_head(found, title), _maps(found), _table(found)])


def _head(found: Pair, title: str) -> str:
    one, other = found
    tiles = []
    for each in found:
        values = sum(tensor.numel for tensor in each.tensors)
        bits = f"{8 * each.nbytes / values:.2f} bits per value" if values else "no values"
        noise = "" if each.sqnr is None else f", {quality(each.sqnr)} signal to noise"
        ratio = f"{each.original_nbytes / each.nbytes:.2f}&times; smaller"
        tiles.append((f"{each.nbytes:,}", f"bytes in {text(each.title)}: {ratio}, {bits}{noise}"))
    change = f"{100 * (other.nbytes / one.nbytes - 1):+.1f} %"
    tiles.append((change, f"bytes from {text(one.title)} to {text(other.title)}"))
    boxes = "".join(f'<div class="tile"><b>{a}</b><span>{b}</span></div>' for a, b in tiles)
    against = f"<p>Compared with {text(one.against)}.</p>" if one.against else ""
    return f'<h1>{text(title)}</h1>{against}<div class="tiles">{boxes}</div>'


def _maps(found: Pair) -> str:
    parts = []
    for each in found:
        boxes = gathered(((t.name, t.nbytes, t.numel) for t in each.tensors), each.nbytes)
        if boxes:
            parts.append(f'<p>{text(each.title)}</p><div class="map">')
            parts.append(f"{drawn(boxes, each.nbytes, 1120, 448)}</div>")
            parts.append(f'<div class="map tall">{drawn(boxes, each.nbytes, 360, 450)}</div>')
    area = "Area: share of its file. Shade: bits per value."
    return f"<h2>Where the bytes go</h2><p>{area}</p>{''.join(parts)}"


def _table(found: Pair) -> str:
    sides = [{tensor.name: tensor for tensor in each.tensors} for each in found]
    names = list(dict.fromkeys([*sides[0], *sides[1]]))
    rows = [(name, sides[0].get(name), sides[1].get(name)) for name in names]
    rows.sort(key=lambda row: -max(t.nbytes for t in row[1:] if t))
    most = max((t.nbytes for each in found for t in each.tensors), default=0)
    has_noise = any(t.sqnr is not None for each in found for t in each.tensors)
    # Narrow screens have no heads: each number names its file there.
    titles = text(found[0].title), text(found[1].title)
    lines = [_row(*row, titles, most, has_noise=has_noise) for row in rows[:MOST_ROWS]]
    left = len(rows) - len(lines)
    more = f"<p>And {left:,} smaller ones.</p>" if left else ""
    heads = ["tensor", "bytes", "bytes", "change", *(["SQNR", "SQNR"] if has_noise else [])]
    first, second = (f"<br><small>{text(each.title)}</small>" for each in found)
    notes = ["", first, second, "", *([first, second] if has_noise else [])]
    line = "".join(f"<th>{a}{b}</th>" for a, b in zip(heads, notes, strict=True))
    return (
        "<h2>Every tensor, the largest first</h2>"
        f"<table><thead><tr>{line}</tr></thead><tbody>{''.join(lines)}</tbody></table>{more}"
    )


def _row(
    name: str,
    one: Stored | None,
    other: Stored | None,
    titles: tuple[str, str],
    most: int,
    *,
    has_noise: bool,
) -> str:
    specs = list(dict.fromkeys(_spec(tensor) for tensor in (one, other)))
    sides = list(zip(titles, (one, other), strict=True))
    cells = [_bytes(f"bytes, {title}", tensor, most) for title, tensor in sides]
    change = NOTHING
    if one is not None and other is not None and one.nbytes:
        change = f"{100 * (other.nbytes / one.nbytes - 1):+.1f} %"
    cells.append(f'<td data-name="change">{change}</td>')
    for title, tensor in sides if has_noise else ():
        sqnr = None if tensor is None else tensor.sqnr
        shown = NOTHING if sqnr is None else quality(sqnr)
        cells.append(cell(f"SQNR, {title}", shown, sqnr, BEST_SQNR))
    return f"<tr><td>{broken(name)}<small>{' | '.join(specs)}</small></td>{''.join(cells)}</tr>"


def _spec(tensor: Stored | None) -> str:
    if tensor is None:
        return "not there"
    shape = "&times;".join(map(str, tensor.shape)) or "scalar"
    return f"{shape} {text(tensor.dtype)}, {text(tensor.spec)}"


def _bytes(name: str, tensor: Stored | None, most: int) -> str:
    if tensor is None:
        return cell(name, NOTHING, None, most)
    bits = "" if tensor.bits is None else f" ({tensor.bits:.2f} bits)"
    return cell(name, f"{tensor.nbytes:,}{bits}", tensor.nbytes, most)
