"""Size against score: what a sweep found, one line for each method of each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from dither.report.bars import drawing

_MARKERS = "osD^vP"
_LINES = ("-", "--", ":", "-.")
_GREYS = ("0.0", "0.45", "0.65")


def draw_sweep(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the rows without an error: the mean over seeds as a line, each seed as a mark.

    The score is what the user's function says or, where nothing has one, the distance of outputs,
    or else bits per value.

    Args:
        rows: with ``source``, ``method``, ``nbytes``, ``values``, ``score`` and ``distance``.
        path: its suffix says what kind of picture.

    Raises:
        DitherError: matplotlib is not installed.
        SpecError: a kind of picture that is not drawn.
    """
    good = [row for row in rows if "error" not in row]
    key, label = _score_of(good)
    sources = list(dict.fromkeys(row["source"] for row in good))
    methods = list(dict.fromkeys(row["method"] for row in good))
    with drawing(path, (6.5, 0.6 + 2.8 * len(sources))) as figure:
        panels = figure.subplots(len(sources), 1, squeeze=False)[:, 0]
        for axes, source in zip(panels, sources, strict=True):
            for number, method in enumerate(methods):
                points = _points(good, source, method, key)
                style = {
                    "color": _GREYS[number % len(_GREYS)],
                    "marker": _MARKERS[number % len(_MARKERS)],
                }
                line = _LINES[number % len(_LINES)]
                sizes = sorted(points)
                means = [mean(points[size][1]) for size in sizes]
                middles = [mean(points[size][0]) for size in sizes]
                axes.plot(middles, means, linestyle=line, label=method, **style)
                for nbytes, values in points.values():
                    axes.plot(nbytes, values, linestyle="", markersize=3, alpha=0.5, **style)
            axes.set_xscale("log")
            if key == "distance":
                axes.set_yscale("log")
            axes.set_title(Path(source).name, loc="left", fontsize=10)
            axes.set_ylabel(label)
            axes.grid(color="0.9")
            axes.set_axisbelow(True)
        panels[-1].set_xlabel("bytes of the file")
        panels[0].legend(frameon=False)


def _score_of(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Under which key all rows have a number, and what it is."""
    if all(row["score"] is not None for row in rows):
        return "score", "score"
    if all(row["distance"] is not None for row in rows):
        return "distance", "distance of outputs, less is better"
    return "bits", "bits per value"


def _points(
    rows: Sequence[Mapping[str, Any]], source: str, method: str, key: str
) -> dict[int, tuple[list[int], list[float]]]:
    """Bytes and scores of all seeds, by the size that was asked for."""
    found: dict[int, tuple[list[int], list[float]]] = {}
    for row in rows:
        if (row["source"], row["method"]) == (source, method):
            bits = 8 * row["nbytes"] / max(row["values"], 1)
            nbytes, values = found.setdefault(row["budget"], ([], []))
            nbytes.append(row["nbytes"])
            values.append(bits if key == "bits" else row[key])
    return found
