"""Where the bytes would go at several sizes: one bar each."""

from __future__ import annotations

from pathlib import Path

from dither.report.bars import drawing
from dither.search import Outlook

_GREYS = ("0.25", "0.85", "0.55", "0.95", "0.4", "0.7")
_HATCHES = ("", "", "", "//", "..", "xx")


def draw_sizes(outlook: Outlook, path: Path) -> None:
    """Draw shares of the file by kind of tensor into a file.

    Args:
        outlook: of at least one size.
        path: its suffix says what kind of picture.

    Raises:
        DitherError: matplotlib is not installed.
        SpecError: a kind of picture that is not drawn.
    """
    rows = outlook.sizes
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.kinds))
    with drawing(path, (7.5, 0.45 * len(rows) + 1.4)) as figure:
        axes = figure.subplots()
        left = [0.0] * len(rows)
        for kind, grey, hatch in zip(kinds, _GREYS, _HATCHES, strict=False):
            shares = [100 * row.kinds.get(kind, 0) / max(row.nbytes, 1) for row in rows]
            axes.barh(
                range(len(rows)), shares, left=left, label=kind,
                color=grey, hatch=hatch, edgecolor="black", linewidth=0.5,
            )  # fmt: skip
            left = [a + b for a, b in zip(left, shares, strict=True)]
        labels = [f"{row.size}: {row.nbytes:,} bytes, {row.snr:.1f} dB" for row in rows]
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of the file, %")
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
