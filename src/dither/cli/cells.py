"""One cell of a sweep: a model, a method, a size and a seed in, one row of results out.

``python -m dither.cli.cells`` runs the cell that it is given as a line of JSON on standard input,
and ends when that closes: a sweep that is killed leaves no process behind.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dither import __version__
from dither.activations import Encodings, apply
from dither.archive import Archive, load_into, load_weights
from dither.cli.data import data_of, evaluate_of, model_of, named
from dither.core import SpecError
from dither.data import Data
from dither.model import collect, duplicate, evaluating
from dither.search import compress, parse_size

METHODS = ("data-free", "data", "int8")
"""Without data, with data, and with data and activations of eight bits."""


@dataclass(frozen=True)
class Cell:
    """What one run of a sweep does.

    Attributes:
        source: path of the weights.
        method: one of :data:`METHODS`, or ``module:name`` of a function
            ``(model, nbytes, data, seed)`` that returns an archive or bytes of one.
        size: as :func:`dither.compress` reads it.
        seed: of all random numbers, and of the samples, where the function that makes them has a
            parameter of this name.
        data: as ``--data``.
        model: as ``--model``.
        evaluate: as ``--evaluate``.
        keep: folder to keep the file in, or none.
    """

    source: str
    method: str
    size: str
    seed: int
    data: str | None = None
    model: str | None = None
    evaluate: str | None = None
    keep: str | None = None

    @property
    def key(self) -> str:
        """What makes two cells the same; where files are kept does not."""
        return json.dumps({k: v for k, v in asdict(self).items() if k != "keep"}, sort_keys=True)

    @property
    def name(self) -> str:
        """For people, and for the file."""
        found = f"{Path(self.source).stem}, {self.method}, {self.size}"
        return f"{found}, seed {self.seed}" if self.needs_seed else found

    @property
    def needs_seed(self) -> bool:
        """Whether anything depends on the seed: without data nothing does."""
        return self.method != "data-free"


def run_cell(cell: Cell) -> dict[str, Any]:
    """The row of a cell: what it is, and what came of it.

    Raises:
        DitherError: it cannot be run.
    """
    start = time.monotonic()
    random.seed(cell.seed)
    np.random.seed(cell.seed % 2**32)  # noqa: NPY002 - what users' code draws from
    torch.manual_seed(cell.seed)
    source = Path(cell.source)
    state = load_weights(source)
    tensors = collect(state)
    values = sum(value.numel() for value in tensors.values.values())
    budget = parse_size(cell.size, tensors.nbytes, values)
    needs_model = cell.method != "data-free" or cell.data or cell.evaluate
    model = model_of(cell.model, source, state) if needs_model else None
    data = None if cell.data is None or model is None else _data(cell, source, model)
    archive = _archive(cell, state if model is None else model, budget, data)
    compressed = time.monotonic() - start
    if archive.nbytes > budget:
        raise SpecError(f"{cell.method!r} made {archive.nbytes} bytes of at most {budget}")
    row = asdict(cell) | {"budget": budget, "nbytes": archive.nbytes, "values": values}
    row |= {"distance": None, "score": None, "seconds": round(compressed, 2)}
    if model is not None:
        row |= _measured(model, archive, data, evaluate_of(cell.evaluate))
    content = archive.to_bytes()
    row["sha256"] = hashlib.sha256(content).hexdigest()
    if cell.keep is not None:
        archive.save(Path(cell.keep) / file_name(cell))
    row["environment"] = {"dither": __version__, "torch": torch.__version__}
    return row | {"host": platform.node()}


def score_cell(cell: Cell, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a cell whose file was made and kept without a score: the same, with the score.

    Args:
        cell: with ``evaluate`` and ``keep``.
        row: what :func:`run_cell` said of it without a score.
    """
    try:
        source = Path(cell.source)
        model = model_of(cell.model, source, load_weights(source))
        with Archive.open(Path(cell.keep or "") / file_name(replace(cell, evaluate=None))) as kept:
            found = _measured(model, kept, None, evaluate_of(cell.evaluate))
    except Exception as error:  # noqa: BLE001 - a file that cannot be scored is a result
        return failed(cell, said_of(error))
    if not math.isfinite(found["score"]):
        return failed(cell, f"SpecError: a score of {found['score']}")
    return {**row, **asdict(cell), **found}


def file_name(cell: Cell) -> str:
    """Under which a cell's file is kept."""
    plain = "".join(c if c.isalnum() or c in ".-" else "-" for c in cell.name.replace(", ", "-"))
    return f"{plain}-{hashlib.sha256(cell.key.encode()).hexdigest()[:8]}.dither"


def _data(cell: Cell, source: Path, model: nn.Module) -> Data:
    """The samples, drawn with the cell's seed, and kept, so that all read the same."""
    return data_of(cell.data or "", source, model, seed=cell.seed).held()


def _archive(cell: Cell, source: Any, budget: int, data: Data | None) -> Archive:  # noqa: ANN401
    if cell.method == "data-free":
        return compress(source, budget)
    if cell.method in METHODS:
        if data is None:
            raise SpecError(f"the method {cell.method!r} needs --data")
        activations = cell.method if cell.method == "int8" else None
        return compress(source, budget, data=data, activations=activations)
    made = named(cell.method, "--methods")(source, budget, data, cell.seed)
    if isinstance(made, bytes):
        return Archive.from_bytes(made)
    if not isinstance(made, Archive):
        raise SpecError(f"{cell.method!r} gave {type(made).__name__}, no archive")
    return made


def _measured(
    model: nn.Module,
    archive: Archive,
    data: Data | None,
    evaluate: Callable[[nn.Module], float] | None,
) -> dict[str, float]:
    """How far outputs are from the original's, and the score, of what can be measured."""
    changed = duplicate(model)
    if archive.sites:
        apply(changed, Encodings.from_json(archive.sites))
    load_into(changed, archive)
    found: dict[str, float] = {}
    with evaluating(model), evaluating(changed), torch.no_grad():
        if data is not None:
            each = [
                float(data.distance(data.output(changed, batch), data.output(model, batch)))
                for batch in data
            ]
            found["distance"] = sum(each) / len(each)
        if evaluate is not None:
            found["score"] = float(evaluate(changed))
    return found


def failed(cell: Cell, error: str) -> dict[str, Any]:
    """The row of a cell that came to nothing."""
    return asdict(cell) | {"error": error}


def said_of(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def tried(cell: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The row of a cell, run in a folder, whatever comes of it."""
    found = Cell(**cell)
    if Path(folder).is_dir():
        os.chdir(folder)
    try:
        return run_cell(found)
    except Exception as error:  # noqa: BLE001 - a cell that fails is a result
        return failed(found, said_of(error))


def cells_of(
    sources: Iterable[str],
    methods: Iterable[str],
    sizes: Iterable[str],
    seeds: Iterable[int],
    **given: str | None,
) -> list[Cell]:
    """All cells, each once, those of one model together, the seeds of what needs none left out."""
    seeds = list(seeds)
    product = [
        Cell(source, method, size, seed, **given)
        for source in sources
        for size in sizes
        for method in methods
        for seed in seeds
    ]
    found = (cell for cell in product if cell.needs_seed or cell.seed == seeds[0])
    return list(dict.fromkeys(found))


def _end_with_standard_input() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    """Run the cell on standard input; the last line of the output is its row."""
    given = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    warnings.simplefilter("ignore")
    row = tried(given, ".")
    sys.stdout.write(f"\n{json.dumps(row)}\n")
    sys.stdout.flush()
    os._exit(0)  # the thread that reads would be waited for


if __name__ == "__main__":
    main()
