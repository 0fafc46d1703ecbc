"""All results as rows of one form, from the JSON files that the benchmarks wrote.

A folder of results holds ``runs/TASK/METHOD-SETTING-SEED.json`` of the runner, and files of
benchmarks with programs of their own: training, noise, DiffQ. It imports the standard library only.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.methods import METHODS, NOISE, ORDERING, TASKS, Run

TRAINED = ("dither-train", "parq", "diffq")
"""Methods that train."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        run: what was measured.
        nbytes: of the file; a peer's is the smaller of its own and the same after zstd -19.
        score: None where it is no number, or there is an error.
        error: the exact message, or "".
        distance: of outputs from fp32's, where it was measured.
        seconds: of compressing or training.
        peak_mb: memory in 10^6 bytes.
        commit: of dither, or the version of the peer.
        machine: processor and cores.
        torch: its version.
        remark: on how the bytes or the score are to be read.
    """

    run: Run
    nbytes: int | None = None
    score: float | None = None
    error: str = ""
    seconds: float | None = None
    peak_mb: float | None = None
    commit: str = ""
    machine: str = ""
    torch: str = ""
    remark: str = ""
    distance: float | None = None


@dataclass(frozen=True)
class Group:
    """Rows that differ in their seeds alone.

    Attributes:
        rows: those with bytes, at least one.
    """

    rows: tuple[Row, ...]

    @property
    def run(self) -> Run:
        return self.rows[0].run

    @property
    def label(self) -> str:
        """Method and setting, as in the tables."""
        setting = self.run.setting
        return self.run.method if setting == "none" else f"{self.run.method} {setting}"

    @property
    def nbytes(self) -> int:
        """Of the largest file: what holds for one size holds for all seeds."""
        return max(row.nbytes or 0 for row in self.rows)

    @property
    def score(self) -> float | None:
        """The mean, or None where a row has no number."""
        found = [row.score for row in self.rows if row.score is not None]
        return statistics.mean(found) if len(found) == len(self.rows) else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds, if there are two."""
        found = [row.score for row in self.rows if row.score is not None]
        return statistics.stdev(found) if len(found) > 1 else None

    @property
    def distance(self) -> float | None:
        """The mean over the rows that have it."""
        found = [row.distance for row in self.rows if row.distance is not None]
        return statistics.mean(found) if found else None

    @property
    def seeds(self) -> list[int]:
        return sorted(row.run.seed for row in self.rows)

    def of(self, seeds: Collection[int]) -> Group | None:
        """The part of these seeds; None where one is missing."""
        rows = tuple(row for row in self.rows if row.run.seed in seeds)
        return Group(rows) if len(rows) == len(seeds) else None


def result_path(results: Path, run: Run) -> Path:
    """The file of a run."""
    return results / "runs" / f"{run.name}.json"


def _json(path: Path) -> Any:  # noqa: ANN401
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _row(run: Run, values: Mapping[str, Any], head: Mapping[str, Any], **more: Any) -> Row:
    facts: dict[str, Any] = {
        key: values.get(key) for key in ("score", "seconds", "peak_mb", "distance")
    }
    facts |= {key: head.get(key, "") for key in ("machine", "torch")}
    facts["nbytes"] = values.get("nbytes", values.get("bytes"))
    facts["error"] = values.get("error", "")
    facts["commit"] = values.get("commit", head.get("commit", ""))
    facts["remark"] = _on_training(run, values)
    return Row(run, **facts | more)


def _on_training(run: Run, values: Mapping[str, Any]) -> str:
    """What is to be said of a training that goes on from a model that was trained here."""
    trains = run.method in TRAINED or run.setting.startswith("ipq-quant-noise")
    if run.task not in ORDERING or run.method == "dither-noise" or not trains:
        return ""
    if "unseen" not in values:
        return "trained on batches that the model had been trained on: to be measured again"
    return f"fp32 after the same steps: {values['control']:.2f}" if "control" in values else ""


def _of_peer(run: Run, values: Mapping[str, Any], head: Mapping[str, Any]) -> Row:
    own, packed = values.get("nbytes"), values.get("nbytes_zstd")
    remark = _on_training(run, values)
    if own is not None and packed is not None and packed < own:
        remark = "; ".join(filter(None, [f"zstd -19; {own:,} bytes as written", remark]))
        own = packed
    version = str(values.get("version", ""))
    more = {"nbytes": own, "commit": version, "remark": remark, "torch": values.get("torch", "")}
    return _row(run, values, head, **more)


def from_runs(results: Path) -> Iterator[Row]:
    """What the runner wrote."""
    for path in sorted((results / "runs").glob("*/*.json")):
        values = _json(path)
        run = Run(values["task"], values["method"], values["setting"], values["seed"])
        head = values.get("environment", {})
        yield _row(run, values, head) if run.ours else _of_peer(run, values, head)


def from_data_free(results: Path) -> Iterator[Row]:
    """What ``benchmarks.data_free`` wrote, on test; NNCodec's numbers there are runs, too."""
    found = _json(results / "data_free_test.json")
    for values in found.get("rows", []):
        run = Run(values["task"], "dither", str(values["budget"]))
        yield _row(run, values, found)


def from_calibrated(results: Path) -> Iterator[Row]:
    """What ``benchmarks.calibrated`` wrote, on test."""
    for values in _json(results / "calibrated_test.json") or []:
        run = Run(values["task"], "dither-data", str(values["budget"]), values["seed"])
        peak = round(values["peak_mib"] * 2**20 / 1e6, 1)
        yield _row(run, values, values["environment"], peak_mb=peak)


def from_training(results: Path) -> Iterator[Row]:
    """What ``benchmarks.train_resnet20`` and ``benchmarks.train_minilm`` wrote, on test."""
    for name, task in (("resnet20", "resnet20_cifar10"), ("minilm", "minilm_stsb")):
        found = _json(results / f"train_{name}_test.json")
        for values in found.get("rows", []):
            run = Run(task, "dither-train", str(values["budget"]), values["seed"])
            yield _row(run, values, found["environment"], score=values["test"])


def from_ordering(results: Path) -> Iterator[Row]:
    """What ``benchmarks.ordering`` wrote."""
    settings = {row: name for name, row in NOISE.items()}
    for task, short in ORDERING.items():
        found = _json(results / f"ordering_{short}.json")
        for values in found.get("rows", []):
            method, setting = "dither-noise", settings.get(values["row"])
            if setting is None:
                method, setting = "fp32", "none"
            run = Run(task, method, setting, values["seed"])
            yield _row(run, values, found, seconds=round(values["cpu_s"], 1))


def from_diffq(results: Path) -> Iterator[Row]:
    """What ``benchmarks.diffq`` wrote: the DiffQ package, and ours trained alike."""
    found = _json(results / "diffq.json")
    for values in found.get("rows", []):
        head, peer, seed = found["environment"], values["peer"], values["seed"]
        penalty = f"penalty-{peer['penalty']:g}"
        run = Run("resnet20_cifar10", "dither-diffq", str(values["budget"]), seed)
        yield _row(run, values, head, score=values["test"])
        left = peer["bytes"]["buffers_left_out"]
        run = Run("resnet20_cifar10", "diffq", penalty, peer["seed"])
        remark = f"its least count; {left:,} bytes of statistics, which the model needs, not in it"
        more = {"nbytes": peer["bytes"]["least"], "commit": "", "remark": remark}
        yield _row(run, peer, head, score=peer["test"], **more)


def recorded(results: Path) -> dict[Run, Row]:
    """All rows of a folder; of two for one run, the runner's."""
    sources = (
        from_data_free,
        from_calibrated,
        from_diffq,
        from_ordering,
        from_training,
        from_runs,
    )
    return {row.run: row for source in sources for row in source(results)}


def read(folders: Iterable[Path]) -> list[Row]:
    """Rows of several folders; of two for one run, that of the later folder."""
    found: dict[Run, Row] = {}
    for folder in folders:
        found |= recorded(folder)
    return [row for row in found.values() if row.run.task in TASKS]


def groups(rows: Iterable[Row], task: str) -> list[Group]:
    """Rows of a task without error, seeds together, the smallest files first."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.run.task == task and not row.error and row.nbytes:
            found.setdefault((row.run.method, row.run.setting), []).append(row)
    every = [Group(tuple(sorted(some, key=lambda r: r.run.seed))) for some in found.values()]
    return sorted(every, key=lambda group: (group.nbytes, group.label))


def is_ours(group: Group) -> bool:
    """Whether it is ours and compressed."""
    return group.run.method in METHODS and group.run.method != "fp32"
