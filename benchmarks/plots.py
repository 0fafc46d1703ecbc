"""Plots of the results, PNG and SVG, readable in grey: lines and marks differ without colour."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods import TASKS
from benchmarks.rows import Group, Row, groups

GAUSSIAN = "1024x1024"
OURS = {
    "dither": ("o", "-", "#005fa8"),
    "dither-data": ("s", "-", "#002b4d"),
    "dither-train": ("D", "-", "#000000"),
    "dither-noise": ("^", "none", "#005fa8"),
    "dither-diffq": ("v", "none", "#005fa8"),
}
"""Mark, line and colour; all dark, where peers are light."""
MARKS = "v^<>pXPdhH8*"


def newest(folders: Sequence[Path], name: str) -> dict[str, Any]:
    """The JSON of the last folder that has the file; empty where none has."""
    for folder in reversed(folders):
        path = folder / name
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
    return {}


def gaps(results: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Bits, and bits above the bound, of the Gaussian source, by method, in order of bits."""
    found: dict[str, list[tuple[float, float]]] = {}
    for key, row in results.get("rows", {}).items():
        source, method, _ = key.split(" | ")
        if source == f"gaussian {GAUSSIAN}":
            found.setdefault(method, []).append((row["bits"], row["gap"]))
    return {method: sorted(points) for method, points in found.items()}


def pyplot() -> Any:  # noqa: ANN401
    """Matplotlib without a window, whose SVG files are the same for the same numbers."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "dither", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:  # noqa: ANN401
    """Write a figure as PNG and SVG, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    pyplot().close(figure)


def _series(found: Sequence[Group]) -> dict[str, list[Group]]:
    """Compressed files with a score, by method, ours last, so that they lie on top."""
    series: dict[str, list[Group]] = {}
    for group in found:
        if group.run.method != "fp32" and group.score is not None:
            series.setdefault(group.run.method, []).append(group)
    return dict(sorted(series.items(), key=lambda item: (item[0] in OURS, item[0])))


def _limits(task: str, found: Sequence[Group], original: float | None) -> tuple[float, float]:
    """Scores that are shown: near fp32 or, without it, near the best of ours."""
    facts = TASKS[task]
    scores = [g.score for g in found if g.score is not None]
    base = original if original is not None else (min if facts.less else max)(scores)
    sign = 1 if facts.less else -1
    near = [s for s in scores if abs(s - base) <= facts.span]
    far = max((abs(s - base) for s in near if (s - base) * sign > 0), default=facts.span)
    other = max((abs(s - base) for s in near if (s - base) * sign < 0), default=0.0)
    pad = 0.08 * (far + other) + 0.05
    ends = base + sign * (far + pad), base - sign * (other + pad)
    return min(ends), max(ends)


def score_against_bytes(rows: Sequence[Row], task: str, path: Path) -> bool:
    """One task: all methods, ours highlighted, and the fp32 line. False without rows."""
    found = groups(rows, task)
    series = _series(found)
    if not series:
        return False
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 4.6))
    original = next((g.score for g in found if g.run.method == "fp32"), None)
    low, high = _limits(task, found, original)
    outside, number = 0, 0
    for method, some in series.items():
        inside = [g for g in some if g.score is not None and low <= g.score <= high]
        outside += len(some) - len(inside)
        xs, ys = [g.nbytes for g in inside], [g.score for g in inside]
        errors = [g.spread or 0.0 for g in inside]
        if method in OURS:
            mark, line, color = OURS[method]
            style: dict[str, Any] = {"color": color, "ms": 6, "lw": 2.2, "zorder": 3}
            if any(errors):
                axes.errorbar(xs, ys, errors, fmt="none", ecolor=color, capsize=3, zorder=2)
        else:
            mark, line, color = MARKS[number % len(MARKS)], "none", "0.45"
            style = {"color": color, "mfc": "white" if number % 2 else "0.75", "ms": 6, "lw": 1.0}
            number += 1
        axes.plot(xs, ys, ls=line, marker=mark, label=method, **style)
    if original is not None:
        axes.axhline(original, color="black", lw=1.0, ls="--", label="fp32")
    _finish_scores(axes, task, (low, high), outside)
    figure.tight_layout()
    save(figure, path)
    return True


def _finish_scores(axes: Any, task: str, limits: tuple[float, float], outside: int) -> None:  # noqa: ANN401
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _si(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="bytes of the file", ylabel=TASKS[task].metric, ylim=limits)
    axes.set_title(TASKS[task].title, fontsize=10)
    axes.grid(visible=True, color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    if outside:
        where, side = (0.98, "top") if TASKS[task].less else (0.02, "bottom")
        text = f"{outside} row{'s' if outside > 1 else ''} outside: see the table"
        axes.text(0.5, where, text, transform=axes.transAxes, ha="center", va=side, fontsize=8)
    legend = axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for text in legend.get_texts():
        if text.get_text() in OURS:
            text.set_fontweight("bold")


def _si(nbytes: float) -> str:
    """Bytes in units of 1,000, as in the text."""
    for unit, name in ((1e6, "MB"), (1e3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:g} {name}"
    return f"{nbytes:g} B"


def noise_overhead(results: Mapping[str, Any], path: Path) -> None:
    """Time of a training step over that of a plain one, with the limit of each method."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 3.0))
    methods = results["methods"]
    places = range(len(methods))
    axes.barh(places, [row["ratio"] - 1 for row in methods.values()], left=1, color="0.55")
    limits = [row["limit"] for row in methods.values()]
    axes.plot(limits, places, "|", color="black", ms=16, mew=2, label="limit")
    axes.set_yticks(places, list(methods))
    axes.invert_yaxis()
    axes.set(xlabel="time of a step over a plain one", xlim=(1, max(limits) + 0.05))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=0.6)
    figure.tight_layout()
    save(figure, path)


def coding_gap(results: Mapping[str, Any], path: Path) -> None:
    """Bits above the rate-distortion bound of a Gaussian source, against bits."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 4.0))
    found = gaps(results)
    for place, (method, points) in enumerate(found.items()):
        grey = str(round(0.65 * place / max(len(found), 1), 3))
        line = "-" if method.startswith("trellis") else "--"
        mark = MARKS[place % len(MARKS)]
        axes.plot(*zip(*points, strict=True), line, marker=mark, color=grey, label=method, ms=5)
    axes.set(xlabel="coded bits for each weight", ylabel="bits above the bound", ylim=(0, None))
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    save(figure, path)


def draw(rows: Sequence[Row], folders: Sequence[Path], out: Path) -> None:
    """All plots for which there are results."""
    for task in TASKS:
        score_against_bytes(rows, task, out / task)
    noise, gap = (newest(folders, name) for name in ("noise_cost.json", "gaussian.json"))
    if noise:
        noise_overhead(noise, out / "noise_overhead")
    if gap and gaps(gap):
        coding_gap(gap, out / "coding_gap")
