"""Tables and a plot of what ``benchmarks.pixel_flow`` found, beside what others published."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.plots import MARKS, pyplot, save

Rows = Sequence[Mapping[str, Any]]

COOL_CHIC = {
    "kodim04": [(0.0531, 28.71), (0.1285, 31.71), (0.3117, 34.76), (0.5489, 37.23)],
    "kodim07": [(0.0809, 28.88), (0.1639, 32.84), (0.3155, 36.67), (0.4676, 39.26)],
    "kodim15": [(0.0576, 29.23), (0.1247, 32.13), (0.2816, 35.28), (0.5024, 37.77)],
    "kodim23": [(0.0594, 30.76), (0.1145, 34.13), (0.2235, 37.34), (0.3534, 39.35)],
}
"""Bits for each pixel and decibels, for four of its five trade-offs: Cool-chic 5.0.1,
https://github.com/Orange-OpenSource/Cool-Chic, ``results/v5.0/image-kodak.tsv`` of 2026-06-26."""
COIN = [(0.0368, 22.41), (0.0736, 23.21), (0.1604, 24.64), (0.3074, 26.41)]
"""Means of all 24 Kodak images: https://github.com/EmilienDupont/coin, ``results.json``."""
IMAGES = tuple(COOL_CHIC)
USUAL = ("JPEG", "WebP", "AVIF", "AVIF, all frames")
VIDEO = ("fresh, rounded", "fresh, trained", "flow, rounded", "flow, trained")
STILL = ("COIN, trained", "features, rounded", "features, trained")
SERIES = ("whole", "whole, twice the steps", "differences")
Point = tuple[float, float]


def some(rows: Rows, source: str, way: str, size: int) -> list[Mapping[str, Any]]:
    """Rows that differ in their seed alone."""
    wanted = {"source": source, "way": way, "size": size}
    return [one for one in rows if wanted.items() <= one.items()]


def decibels(found: Rows) -> str:
    """Mean and standard deviation of the seeds."""
    values = [one["psnr"] for one in found]
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def cell(found: Rows) -> str:
    """Bytes of the first seed, and decibels of all."""
    return f"{found[0]['nbytes']:,} | {decibels(found)}" if found else "not measured |"


def means(rows: Rows, way: str) -> list[Point]:
    """Of the four images: mean bits for each pixel and mean decibels, by size or quality."""
    points: dict[Any, list[Point]] = {}
    for one in rows:
        if one["source"] in IMAGES and one["way"] == way and one.get("seed", 0) == 0:
            point = (one["bpp"], one["psnr"])
            points.setdefault(one.get("size", one.get("quality")), []).append(point)
    return sorted(_mean(part) for part in points.values() if len(part) == len(IMAGES))


def _mean(points: Iterable[Point]) -> Point:
    rates, found = zip(*points, strict=True)
    return statistics.mean(rates), statistics.mean(found)


def published() -> list[Point]:
    """Cool-chic's means over the four images, for each of its trade-offs."""
    return [_mean(points) for points in zip(*COOL_CHIC.values(), strict=True)]


def tables(rows: Rows) -> str:
    """As Markdown: the video, the images, the series, usual codecs."""
    return "\n".join([*_video(rows), "", *_images(rows), "", *_series(rows), "", *_usual(rows)])


def _video(rows: Rows) -> Iterator[str]:
    yield "| networks | bytes | dB | bytes | dB |"
    yield "|" + " --- |" * 5
    for way in VIDEO:
        cells = [cell(some(rows, "bunny", way, size)) for size in (4000, 8000)]
        yield f"| {way} | " + " | ".join(cells) + " |"


def _images(rows: Rows) -> Iterator[str]:
    yield "| size, way | " + " | ".join(IMAGES) + " |"
    yield "|" + " --- |" * (1 + len(IMAGES))
    for size in (4000, 8000, 16000):
        for way in STILL:
            found = [some(rows, name, way, size) for name in IMAGES]
            if any(found):
                cells = [
                    f"{decibels(one)} ({one[0]['bpp']:.3f})" if one else "not measured"
                    for one in found
                ]
                yield f"| {size:,} bytes, {way} | " + " | ".join(cells) + " |"


def _series(rows: Rows) -> Iterator[str]:
    yield "| files | bytes | dB |"
    yield "|" + " --- |" * 3
    for source, ways, sizes in (
        (
            "bunny, series",
            ["one file, trained", *(f"groups, {way}" for way in SERIES)],
            (8000, 16000),
        ),
        ("bunny", [f"frames, {way}" for way in SERIES], (16000, 24000)),
    ):
        for size, way in product(sizes, ways):
            found = some(rows, source, way, size)
            if found:
                yield f"| {way} | {cell(found)} |"


def _usual(rows: Rows) -> Iterator[str]:
    for source in ("bunny", "bunny, series", *IMAGES):
        for way in USUAL:
            found = [one for one in rows if (one["source"], one["way"]) == (source, way)]
            points = ", ".join(f"{o['nbytes']:,} B {o['bpp']:.3f} {o['psnr']:.2f}" for o in found)
            yield f"{source}, {way}: {points}"
    for way in (*USUAL, *STILL):
        yield f"mean of four, {way}: {[(round(x, 3), round(y, 2)) for x, y in means(rows, way)]}"
    yield f"mean of four, Cool-chic: {[(round(x, 3), round(y, 2)) for x, y in published()]}"


def draw(rows: Rows, path: Path) -> None:
    """Three panels of decibels over bits for each pixel: video, images, files of a series."""
    figure, (video, images, series) = pyplot().subplots(1, 3, figsize=(14, 4.4))
    for source, axes, ways in (
        ("bunny", video, (*VIDEO, *USUAL)),
        ("bunny, series", series, ("one file, trained", "AVIF, all frames")),
    ):
        for number, way in enumerate(ways):
            found = [o for o in rows if (o["source"], o["way"]) == (source, way)]
            _curve(axes, number, way, _by_size(found))
    for number, way in enumerate(SERIES, 2):
        for name, source, line in (("groups", "bunny, series", "-"), ("frames", "bunny", ":")):
            full = f"{name}, {way}"
            found = [o for o in rows if (o["source"], o["way"]) == (source, full)]
            _curve(series, number, full, _by_size(found), line)
    for number, way in enumerate((*STILL, *USUAL[:3])):
        _curve(images, number, way, means(rows, way))
    _curve(images, 6, "Cool-chic 5.0.1, published", published())
    _curve(images, 7, "COIN, published, 24 images", COIN)
    for axes, title in (
        (video, "12 frames, 96 x 54"),
        (images, "four Kodak images, mean"),
        (series, "files of a series, 96 x 54"),
    ):
        axes.set(title=title, xlabel="bits for each pixel", ylabel="PSNR, dB", xscale="log")
        axes.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2], minor=False)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(0.03, 3)
        axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    save(figure, path)


def _by_size(found: Rows) -> list[Point]:
    """Means over the seeds, by size or quality."""
    groups: dict[Any, list[Point]] = {}
    for one in found:
        point = (one["bpp"], one["psnr"])
        groups.setdefault(one.get("size", one.get("quality")), []).append(point)
    return sorted(_mean(points) for points in groups.values())


def _curve(axes: Any, number: int, label: str, points: Sequence[Point], line: str = "-") -> None:  # noqa: ANN401
    if points:
        grey = str(round(0.09 * number, 2))
        axes.plot(*zip(*points, strict=True), line, marker=MARKS[number], color=grey, label=label)
