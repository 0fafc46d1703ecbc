"""The best file of a sweep by a few scores: ``dither sweep --choose``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dither.cli.cells import Cell, file_name, score_cell
from dither.cli.console import Printer
from dither.core import SpecError
from dither.select import MetricSearch
from dither.select.surrogate import check_installed


def check_choice(cells: Sequence[Cell], trials: int) -> None:
    """Raise SpecError where there would be nothing to choose from, or nothing to choose by."""
    if trials < 1:
        raise SpecError(f"--choose {trials}: give the scores that may be taken, 1 or more")
    if any(cell.evaluate is None or cell.keep is None for cell in cells):
        raise SpecError("--choose takes scores of files: give --evaluate and --keep, too")
    if len({cell.source for cell in cells}) > 1:
        raise SpecError("--choose finds the best file of one model: give one SOURCE")
    check_installed()


def lost(cell: Cell) -> bool:
    """Whether the file of a cell is not where it is kept."""
    return not (Path(cell.keep or "") / file_name(cell)).is_file()


def choose_file(
    printer: Printer,
    cells: Sequence[Cell],
    rows: Mapping[str, Mapping[str, Any]],
    trials: int,
    keep: Callable[[Mapping[str, Any]], None],
) -> dict[str, Any]:
    """Score files, one after another, where it helps most to find the best.

    Args:
        printer: of what is found.
        cells: with ``evaluate``.
        rows: of all cells so far: those without a score that have one are the candidates, and
            those with a score are trials that were made before.
        trials: scores in all, those of before included.
        keep: takes the row of each new score.

    Returns:
        The best file with its score, what is believed of it, and how many were scored or failed.
    """
    made = {cell: rows[replace(cell, evaluate=None).key] for cell in cells}
    made = {cell: row for cell, row in made.items() if "error" not in row}
    known = {cell: rows[cell.key] for cell in made if cell.key in rows}
    while True:
        left = [cell for cell in made if "error" not in known.get(cell, {})]
        if not left:
            return {"best": None, "scored": 0, "of": len(cells), "failed": len(known)}
        chooser = MetricSearch(_features([made[cell] for cell in left]))
        for number, cell in enumerate(left):
            if cell in known:
                chooser.tell(number, [known[cell]["score"]])
        if len(known) >= trials or len(chooser.trials) == len(left):
            break
        cell = left[chooser.ask()]
        known[cell] = score_cell(cell, made[cell])
        keep(known[cell])
        said = known[cell].get("error") or f"score {known[cell]['score']:.4g}"
        printer.text(f"[{len(known)}/{min(trials, len(made))}] {cell.name}: {said}")
    answer = chooser.answer()
    best = left[answer.best]
    file = Path(best.keep or "") / file_name(replace(best, evaluate=None))
    printer.text(
        f"best of {len(left)} files by {answer.spent} scores: {best.name}, score "
        f"{known[best]['score']:.4g}; the best of all with a chance of {answer.chance:.0%}: {file}"
    )
    return {
        "best": known[best],
        "file": str(file),
        "chance": answer.chance,
        "beliefs": [
            {"file": file_name(replace(cell, evaluate=None)), "mean": mean, "deviation": deviation}
            for cell, mean, deviation in zip(left, answer.means, answer.deviations, strict=True)
        ],
        "scored": answer.spent,
        "of": len(cells),
        "failed": len(made) - len(left),
    }


def _features(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """What is known of files without a score: bytes, distance of outputs if measured, method."""
    methods = sorted({row["method"] for row in rows})
    columns = [[math.log(row["nbytes"]) for row in rows]]
    if all(row["distance"] is not None for row in rows):
        columns.append([math.log(max(row["distance"], 1e-12)) for row in rows])
    columns += [[float(row["method"] == method) for row in rows] for method in methods[1:]]
    return np.array(columns).T
