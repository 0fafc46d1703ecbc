"""One HTML page about an archive: no scripts, nothing from the network, readable on a telephone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from dither.archive import Archive, atomic_write
from dither.archive.picture import broken, drawn, gathered, shade, text
from dither.progress import hooked
from dither.report.contents import BINS, Contents, Histogram, Stored, contents
from dither.report.style import STYLE

MOST_ROWS = 400
"""Tensors in the table, the largest; a page of thousands is no summary."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
BEST_SQNR = 60.0
"""Decibels at which a bar is full."""
NOTHING = "&ndash;"


def save_page(
    path: str | os.PathLike[str],
    archive: Archive | str | os.PathLike[str],
    *,
    title: str | None = None,
    against: Mapping[str, Tensor] | None = None,
    checkpoint: str = "the checkpoint",
    progress: Callable[[str, float], None] | None = None,
) -> Contents:
    """Write a page about an archive, whole or not at all.

    Where its bytes go; bits and, against a checkpoint, error of each tensor; how the values of the
    largest are distributed before and after; sensitivities that the metadata gives. The same input
    gives the same bytes.

    Args:
        path: of the page, ``.html``.
        archive: what it is about, open or by its path.
        title: heading; by default the archive's name.
        against: the tensors that were compressed, by name.
        checkpoint: what to call them.
        progress: called with what is read, and the share that is done.

    Returns:
        What the page shows.

    Raises:
        ArchiveError: the file is no archive or is damaged.
    """
    if not isinstance(archive, Archive):
        name = os.path.basename(os.fspath(archive))  # noqa: PTH119 - any kind of path
        with Archive.open(archive) as opened:
            return save_page(
                path, opened, title=title or name, against=against, checkpoint=checkpoint,
                progress=progress,
            )  # fmt: skip
    source = None if against is None else (checkpoint, against)
    with hooked(progress):
        found = contents(archive, title or "archive", source)
    with atomic_write(path) as file:
        # Names come from files: even what is no text must give a page.
        file.write(page(found).encode("utf-8", "backslashreplace"))
    return found


def page(found: Contents) -> str:
    """The page as text."""
    parts = [
        _head(found),
        _spending(found),
        _by_order(found),
        _histograms(found),
        _table(found),
        _rest(found),
    ]
    return document(found.title, parts)


def document(title: str, parts: Sequence[str]) -> str:
    """A page of parts, which may be empty."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _head(found: Contents) -> str:
    values = sum(tensor.numel for tensor in found.tensors)
    budget = found.metadata.get("budget")
    spent = ""
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        spent = f", {100 * found.nbytes / budget:.1f} % of the budget of {budget:,}"
    ratio = found.original_nbytes / found.nbytes
    tiles = [
        (f"{found.nbytes:,}", f"bytes in the file{spent}"),
        (f"{ratio:.2f}&times;", f"smaller than {found.original_nbytes:,} bytes of tensors"),
        (f"{8 * found.nbytes / values:.2f}" if values else NOTHING, "bits per value, all told"),
        (f"{len(found.tensors):,}", f"tensors, {values:,} values"),
    ]
    if found.sqnr is not None:
        tiles.append((quality(found.sqnr), "signal to noise, all weights"))
    boxes = "".join(f'<div class="tile"><b>{a}</b><span>{b}</span></div>' for a, b in tiles)
    against = f"<p>Compared with {text(found.against)}.</p>" if found.against else ""
    lacking = ""
    if found.lacking:
        names = ", ".join(map(text, found.lacking[:8]))
        more = f" and {len(found.lacking) - 8} more" if len(found.lacking) > 8 else ""
        lacking = f"<p><b>Not in it, or of another shape:</b> {names}{more}.</p>"
    return f'<h1>{text(found.title)}</h1>{against}{lacking}<div class="tiles">{boxes}</div>'


# --- where the bytes go --------------------------------------------------------------------------


def _spending(found: Contents) -> str:
    boxes = gathered(((t.name, t.nbytes, t.numel) for t in found.tensors), found.nbytes)
    if not boxes:
        return ""
    maps = [
        f'<div class="map{kind}">{drawn(boxes, found.nbytes, width, height)}</div>'
        for kind, width, height in (("", 1120, 448), (" tall", 360, 450))
    ]
    key = "".join(
        f'<span><i style="background:{shade(bits)[0]}"></i>{name}</span>'
        for bits, name in [
            *((float(b), f"{b}") for b in (1, 2, 3, 4, 6)),
            (8.0, "8 bits and more"),
            (None, "index"),
        ]
    )
    return (
        "<h2>Where the bytes go</h2><p>Area: share of the file. Shade: bits per value.</p>"
        f'{"".join(maps)}<div class="key">{key}</div>'
    )


# --- layer by layer ------------------------------------------------------------------------------


def _by_order(found: Contents) -> str:
    matrices = [
        t for t in found.tensors if len(t.shape) > 1 and t.bits is not None and "float" in t.dtype
    ]
    if len(matrices) < 3:
        return ""
    bits = [t.bits or 0.0 for t in matrices]
    charts = [_chart(matrices, bits, max(*bits, 1.0), "bits per value", "bits")]
    if any(t.sqnr is not None for t in matrices):
        noise = [min(max(t.sqnr or 0.0, 0.0), BEST_SQNR) for t in matrices]
        charts.append(_chart(matrices, noise, max(*noise, 1.0), "SQNR in dB", "dB"))
    return (
        "<h2>Layer by layer</h2><p>Tensors of two or more dimensions, in the order of the file.</p>"
        + "".join(charts)
    )


def _chart(
    tensors: Sequence[Stored], values: Sequence[float], top: float, title: str, unit: str
) -> str:
    step = 1000 / len(values)
    bars = "".join(
        f'<rect class="bar" x="{i * step + 0.1 * step:.2f}" y="{100 - 100 * value / top:.2f}" '
        f'width="{0.8 * step:.2f}" height="{100 * value / top:.2f}">'
        f"<title>{text(tensor.name)}: {value:.2f} {unit}</title></rect>"
        for i, (tensor, value) in enumerate(zip(tensors, values, strict=True))
    )
    return (
        f'<div class="chart"><small><span>{top:.3g}</span><span>0</span></small>'
        f'<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{title} of {len(values)} tensors">{bars}</svg><em>{title}</em></div>'
    )


# --- distributions -------------------------------------------------------------------------------


def _histograms(found: Contents) -> str:
    shown = sorted((t for t in found.tensors if t.histogram), key=lambda t: -t.nbytes)
    if not shown:
        return ""
    both = any(t.histogram and t.histogram.before for t in shown)
    legend = (
        "Grey: before; line: in the file. Each is scaled to its own highest bin."
        if both
        else "As in the file."
    )
    figures = "".join(_figure(t, t.histogram) for t in shown if t.histogram)
    return f'<h2>Values of the largest tensors</h2><p>{legend}</p><div class="many">{figures}</div>'


def _figure(tensor: Stored, histogram: Histogram) -> str:
    shapes = ""
    if histogram.before:
        shapes += f'<path class="before" d="{_outline(histogram.before)}"/>'
    shapes += f'<path class="after" d="{_outline(histogram.after)}"/>'
    noise = "" if tensor.sqnr is None else f", {quality(tensor.sqnr)}"
    beyond = f"{100 * histogram.outside:.2g} % beyond" if histogram.outside else ""
    return (
        f"<figure><figcaption>{broken(tensor.name)}<br><span>{text(tensor.spec)}{noise}</span>"
        f'</figcaption><svg viewBox="0 0 {BINS} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="distribution of values">{shapes}</svg>'
        f'<div class="ends"><span>{histogram.low:.3g}</span><span>{beyond}</span>'
        f"<span>{histogram.high:.3g}</span></div></figure>"
    )


def _outline(shares: Sequence[float]) -> str:
    """Steps from the ground to the highest bin."""
    top = max(*shares, 1e-30)
    levels = [100 - 96 * share / top for share in shares]
    steps = "".join(f"V{level:.1f}H{place + 1}" for place, level in enumerate(levels))
    return f"M0,100{steps}V100Z"


# --- the table -----------------------------------------------------------------------------------


def _table(found: Contents) -> str:
    ranked = sorted(found.tensors, key=lambda t: -t.nbytes)
    has_noise = any(t.sqnr is not None for t in ranked)
    has_cost = any(t.sensitivity is not None for t in ranked)
    columns = ["bytes", "bits per value"]
    columns += ["SQNR"] if has_noise else []
    columns += ["sensitivity"] if has_cost else []
    most = max((t.nbytes for t in ranked), default=0)
    widest = max((min(t.bits or 0.0, 32.0) for t in ranked), default=0.0)
    steepest = max((t.sensitivity or 0.0 for t in ranked), default=0.0)
    rows = []
    for t in ranked[:MOST_ROWS]:
        cells = [cell("bytes", f"{t.nbytes:,}", t.nbytes, most)]
        cells.append(
            cell("bits per value", NOTHING if t.bits is None else f"{t.bits:.2f}", t.bits, widest)
        )
        if has_noise:
            shown = NOTHING if t.sqnr is None else quality(t.sqnr)
            cells.append(cell("SQNR", shown, t.sqnr, BEST_SQNR))
        if has_cost:
            shown = NOTHING if t.sensitivity is None else f"{t.sensitivity:.3g}"
            cells.append(cell("sensitivity", shown, t.sensitivity, steepest))
        shape = "&times;".join(map(str, t.shape)) or "scalar"
        rows.append(
            f"<tr><td>{broken(t.name)}<small>{shape} {text(t.dtype)}, {text(t.spec)}</small>"
            f"</td>{''.join(cells)}</tr>"
        )
    left = len(ranked) - len(rows)
    more = f"<p>And {left:,} smaller ones.</p>" if left else ""
    heads = "".join(f"<th>{column}</th>" for column in ("tensor", *columns))
    return (
        "<h2>Every tensor, the largest first</h2>"
        f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>{more}"
    )


def cell(name: str, shown: str, value: float | None, most: float) -> str:
    """A number with a bar beneath."""
    share = 0.0
    if value is not None and most > 0 and not math.isnan(value):
        share = 100 * min(max(value / most, 0.0), 1.0)
    return f'<td data-name="{name}">{shown}<u><i style="width:{share:.1f}%"></i></u></td>'


def _rest(found: Contents) -> str:
    parts = []
    if found.aliases:
        lines = "".join(f"<li>{text(a)} = {text(b)}</li>" for a, b in found.aliases.items())
        parts.append(_folded(f"Tied weights: {len(found.aliases):,}", f"<ul>{lines}</ul>"))
    if found.sites:
        lines = "".join(
            f"<li>{text(site)}: {NOTHING if bits is None else bits} bits</li>"
            for site, bits in found.sites.items()
        )
        parts.append(_folded(f"Quantized activations: {len(found.sites):,}", f"<ul>{lines}</ul>"))
    if found.metadata:
        parts.append(_folded("Metadata", f"<pre>{text(_indented(found.metadata))}</pre>"))
    return f"<h2>Also in the file</h2>{''.join(parts)}" if parts else ""


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>"


def _indented(values: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(values), indent=1, ensure_ascii=False)
    except RecursionError:
        return "nested too deeply to be shown"


def quality(value: float) -> str:
    """A ratio in words: all may be equal, or nothing."""
    if value == math.inf:
        return "exact"
    return "none" if value == -math.inf else f"{value:.1f} dB"
