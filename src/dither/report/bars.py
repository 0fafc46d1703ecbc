"""Pictures, readable in grey: panels of horizontal bars on one logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dither.core import DitherError, SpecError

KINDS = (".svg", ".png", ".pdf")
_GREYS = ("0.35", "0.72")
_BAR = 0.2  # inches
_LONGEST = 44

Panel = tuple[str, Sequence[tuple[str, float]], float]
"""Title, bars by name, and a value that a dashed line marks (NaN for none)."""


def draw(panels: Sequence[Panel], axis: str, path: Path) -> None:
    """Draw panels below each other into a file.

    Args:
        panels: bars are positive, the first stands on top.
        axis: label of the common axis.
        path: its suffix says what kind of picture.

    Raises:
        DitherError: matplotlib is not installed.
        SpecError: a kind of picture that is not drawn.
    """
    counts = [len(bars) for _, bars, _ in panels]
    ends = [v for _, bars, line in panels for v in (*(b for _, b in bars), line) if _positive(v)]
    with drawing(path, (7.5, _BAR * sum(counts) + 0.8 * len(panels))) as figure:
        found = figure.subplots(
            len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": counts}
        )
        for axes, (title, bars, line), grey in zip(found[:, 0], panels, _GREYS, strict=False):
            places = range(len(bars))
            values = [value for _, value in bars]
            axes.barh(places, values, color=grey, edgecolor="black", linewidth=0.5)
            axes.set_yticks(places, [_short(name) for name, _ in bars])
            axes.set_ylim(len(bars) - 0.4, -0.6)
            axes.set_xscale("log")
            axes.set_xlim(min(ends) / 2, max(ends) * 2)
            axes.set_title(title, loc="left", fontsize=10)
            axes.grid(axis="x", color="0.9")
            axes.set_axisbelow(True)
            if _positive(line):
                axes.axvline(line, color="black", linestyle="--", linewidth=1)
        found[-1, 0].set_xlabel(axis)


@contextmanager
def drawing(path: Path, inches: tuple[float, float]) -> Iterator[Any]:
    """An empty figure, written to a file at the end.

    Args:
        path: its suffix says what kind of picture.
        inches: width and height.

    Raises:
        DitherError: matplotlib is not installed.
        SpecError: a kind of picture that is not drawn.
    """
    check_picture(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure  # not pyplot: no window, nothing kept

    with mpl.rc_context({"svg.hashsalt": "dither", "font.size": 9}):
        figure = Figure(figsize=inches, layout="constrained")
        yield figure
        # Without a date, the same results give the same file.
        dated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        figure.savefig(path, dpi=160, metadata=dated.get(path.suffix.lower()))


def check_picture(path: Path) -> None:
    """Say early, before any work, that a picture cannot be drawn; raises as :func:`drawing`."""
    if path.suffix.lower() not in KINDS:
        raise SpecError(f"{str(path)!r} is no picture that is drawn: end it in {', '.join(KINDS)}")
    if find_spec("matplotlib") is None:
        raise DitherError('plots are drawn with matplotlib; run: pip install "dither[plots]"')


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _short(name: str) -> str:
    """A name that leaves room for its bar: its end says more than its beginning."""
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
