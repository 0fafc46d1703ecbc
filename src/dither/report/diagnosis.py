"""The result of a diagnosis: rows, worst first, as a table, JSON or a picture."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dither.archive import atomic_write
from dither.core import SpecError
from dither.report.bars import draw


@dataclass(frozen=True)
class Row:
    """What one tensor does to the model's output when it alone is quantized.

    Attributes:
        name: of the weight, or the site of the activation: a module's path with ``@in`` or
            ``@out``.
        kind: ``"weight"`` or ``"activation"``.
        spec: how it is quantized.
        count: values of the weight; of an activation, those that passed in all batches.
        distance: of the output from the original one, mean of the batches.
        sqnr: signal to quantization noise ratio of the tensor itself in dB; infinite where nothing
            changed.
        low: least value before quantization.
        high: greatest value before quantization.
        score: what ``evaluate`` gave, or None where it was not asked.
    """

    name: str
    kind: str
    spec: str
    count: int
    distance: float
    sqnr: float
    low: float
    high: float
    score: float | None = None


@dataclass(frozen=True)
class Overall:
    """A whole model, or a half of it, quantized.

    Attributes:
        name: ``"original"``, ``"weights"``, ``"activations"`` or ``"both"``.
        distance: of the output from the original one. That of ``"original"`` is from a second pass
            of the first batch: it is 0 unless the model gives other numbers each time.
        score: what ``evaluate`` gave.
    """

    name: str
    distance: float
    score: float | None = None


@dataclass(frozen=True)
class Trial:
    """A remedy, tried on all weights or all activations alone.

    Attributes:
        side: ``"weights"`` or ``"activations"``.
        remedy: what was changed.
        distance: of the output from the original one.
        score: what ``evaluate`` gave.
        is_enough: whether no more than allowed is lost.
    """

    side: str
    remedy: str
    distance: float
    score: float | None
    is_enough: bool


@dataclass(frozen=True)
class Diagnosis:
    """Where a quantized model loses, worst first; made by :func:`dither.diagnose`.

    Attributes:
        rows: one for each weight and each site, the greatest distance first.
        overall: the original, all weights quantized, all activations quantized, both.
        distance: name of the distance.
        batches: how many were read.
        trials: remedies that were tried, if it was said what may be lost.
        next_step: what to do then; empty otherwise.
    """

    rows: tuple[Row, ...]
    overall: tuple[Overall, ...]
    distance: str
    batches: int
    trials: tuple[Trial, ...] = ()
    next_step: str = ""

    @property
    def weights(self) -> tuple[Row, ...]:
        """The rows of weights, worst first."""
        return tuple(row for row in self.rows if row.kind == "weight")

    @property
    def activations(self) -> tuple[Row, ...]:
        """The rows of activations, worst first."""
        return tuple(row for row in self.rows if row.kind == "activation")

    def table(self, limit: int | None = 20) -> str:
        """The whole model, then the worst rows, as aligned text.

        Args:
            limit: most rows, or None for all.
        """
        has_scores = any(part.score is not None for part in self.overall)
        parts = [("quantized", f"distance ({self.distance})", "score")]
        parts += [(o.name, _short(o.distance), _score(o.score)) for o in self.overall]
        rows = [("alone", "kind", "as", "values", "range", "SQNR dB", "distance", "score")]
        rows += [
            (
                row.name,
                row.kind,
                row.spec,
                f"{row.count:,}",
                f"{row.low:.3g} to {row.high:.3g}",
                f"{row.sqnr:.1f}",
                _short(row.distance),
                _score(row.score),
            )
            for row in self.rows[:limit]
        ]
        end = None if has_scores else -1
        lines = [*_aligned([p[:end] for p in parts], 1), "", *_aligned([r[:end] for r in rows], 3)]
        left = len(self.rows) - len(rows) + 1
        lines += [f"and {left} more"] if left else []
        if self.trials:
            tried = [("tried on", "remedy", "distance", "score", "")]
            tried += [
                (t.side, t.remedy, _short(t.distance), _score(t.score), "*" if t.is_enough else "")
                for t in self.trials
            ]
            lines += ["", *_aligned(tried, 2)]
        return "\n".join([*lines, "", f"next: {self.next_step}"] if self.next_step else lines)

    def __str__(self) -> str:
        """The table with its worst 20 rows."""
        return self.table()

    def to_json(self) -> dict[str, Any]:
        """As JSON values; numbers that are not finite are None: an SQNR where nothing changed."""
        told = {"trials": [_finite(asdict(t)) for t in self.trials], "next_step": self.next_step}
        return {
            "distance": self.distance,
            "batches": self.batches,
            "overall": [_finite(asdict(part)) for part in self.overall],
            "rows": [_finite(asdict(row)) for row in self.rows],
            **(told if self.next_step else {}),
        }

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_json` to a file, whole or not at all."""
        text = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        with atomic_write(path) as file:
            file.write(text.encode())

    def plot(self, path: str | os.PathLike[str], limit: int = 20) -> None:
        """Draw the worst rows as bars, weights above activations, into a file.

        Args:
            path: ends in ``.svg``, ``.png`` or ``.pdf``.
            limit: most bars of a panel.

        Raises:
            DitherError: matplotlib is not installed.
            SpecError: there is nothing to draw, or the file is of another kind.
        """
        halves = [("weights", self.weights), ("activations", self.activations)]
        together = {part.name: part.distance for part in self.overall}
        panels = [
            (
                f"{name}, each quantized alone (dashed: all at once)",
                [(row.name, row.distance) for row in rows if _is_drawn(row)][:limit],
                together.get(name, math.nan),
            )
            for name, rows in halves
        ]
        panels = [panel for panel in panels if panel[1]]
        if not panels:
            raise SpecError("nothing to draw: no tensor's quantization changed the output")
        draw(panels, f"distance of the output ({self.distance}), logarithmic", Path(path))


def _is_drawn(row: Row) -> bool:
    """Whether a logarithmic axis has a place for it."""
    return math.isfinite(row.distance) and row.distance > 0


def worst_first(rows: Sequence[Row]) -> tuple[Row, ...]:
    """By distance; what is no number is worst of all."""
    return tuple(
        sorted(rows, key=lambda row: -math.inf if math.isnan(row.distance) else -row.distance)
    )


def _short(distance: float) -> str:
    return "0" if distance == 0 else f"{distance:.2e}"


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:.4g}"


def _aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Columns; all but the ``left`` first are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
