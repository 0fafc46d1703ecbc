"""Rows of a benchmark that is stopped and started again: read, and written after each."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks.environment import describe


def kept(path: Path) -> Any:  # noqa: ANN401
    """The rows of a results file, a list or a dict, as it was written; None without the file."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else None


def keep(path: Path, rows: Collection[Any]) -> None:
    """Write rows, and what they depend on: see :func:`~benchmarks.environment.describe`."""
    result = {"environment": describe(), "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
