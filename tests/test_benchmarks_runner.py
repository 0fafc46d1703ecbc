"""The benchmarks' runner, rows, verdicts and page, on runs that take milliseconds."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
from benchmarks import distances, measure, ordering, page, plots, runner
from benchmarks.distances import distance
from benchmarks.methods import METHODS, SEEDS, TASKS, Run, runs
from benchmarks.rows import Row, groups, read, recorded, result_path
from benchmarks.runner import Ended, Place, call, execute, outcome, prepare, to_do
from benchmarks.tasks import resnet20_cifar10
from benchmarks.verdicts import at_its_size, beaten, verdicts
from dither.data import divergence

ROOT = Path(__file__).parents[1]
ONE, TWO = Run("lm_ptb", "dither", "290000", 0), Run("lm_ptb", "dither", "290000", 1)
GOOD = 'print("noise"); print(\'{"nbytes": 9, "score": 1.5, "seconds": 2}\')'


@dataclass(frozen=True)
class Fake(Place):
    """Runs a line of Python for each run, and notes that it did."""

    scripts: dict[Run, str] = field(default_factory=dict)
    called: list[Run] = field(default_factory=list)

    def command(self, run: Run) -> list[str]:
        self.called.append(run)
        return [sys.executable, "-c", self.scripts.get(run, GOOD)]


class Stops(Fake):
    """The user interrupts where the second run would begin."""

    def command(self, run: Run) -> list[str]:
        if run == TWO:
            raise KeyboardInterrupt
        return super().command(run)


def place(folder: Path, scripts: dict[Run, str] | None = None, limit: float = 60) -> Fake:
    return Fake(results=folder, limit=limit, scripts=scripts or {})


def result(folder: Path, run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result_path(folder, run).read_text(encoding="utf-8"))
    return found


# --- processes -----------------------------------------------------------------------------------


def test_the_memory_of_a_process_is_its_own() -> None:
    # In a small process, as the runner is: a child begins with the peak of its parent.
    code = """
import sys
from benchmarks.runner import call
peaks = [call([sys.executable, "-c", c], 60).peak_mb for c in ("", "bytearray(80_000_000)")]
print(peaks[1] - peaks[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert 60 < float(done.stdout) < 100


def test_a_process_that_takes_too_long_is_ended_with_what_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    later = f"import time, pathlib; time.sleep(1.5); pathlib.Path({str(mark)!r}).touch()"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {later!r}])"
    ended = call([sys.executable, "-c", script], 0.5)
    assert ended.status is None
    time.sleep(1.6)
    assert not mark.exists()


def test_the_runner_stays_small() -> None:
    code = "import sys, benchmarks.runner; sys.exit(bool({'torch', 'numpy'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- resuming ------------------------------------------------------------------------------------


def test_runs_with_a_result_are_not_repeated(tmp_path: Path) -> None:
    fake = place(tmp_path)
    assert execute(to_do([ONE], ["*"], fake, retry=False), fake) == 0
    assert result(tmp_path, ONE).items() >= {"nbytes": 9, "score": 1.5, "seed": 0}.items()
    assert execute(to_do([ONE, TWO], ["*"], fake, retry=True), fake) == 0
    assert fake.called == [ONE, TWO]
    assert {row.run for row in recorded(tmp_path).values()} == {ONE, TWO}


def test_an_interrupt_leaves_what_was_done_and_no_part(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        execute([ONE, TWO], Stops(results=tmp_path))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["dither-290000-0.json"]
    assert to_do([ONE, TWO], ["*"], place(tmp_path), retry=False) == [TWO]


def test_errors_are_rows_with_the_exact_message(tmp_path: Path) -> None:
    scripts = {ONE: "raise ValueError('no such thing: 7')", TWO: "print('done')"}
    fake = place(tmp_path, scripts)
    assert execute([ONE, TWO], fake) == 2
    assert result(tmp_path, ONE)["error"] == "exit status 1: ValueError: no such thing: 7"
    assert result(tmp_path, TWO)["error"] == "it printed no row, but 'done\\n'"
    assert to_do([ONE], ["*"], fake, retry=False) == []
    assert to_do([ONE], ["*"], fake, retry=True) == [ONE]


def test_a_run_beyond_its_time_is_a_row(tmp_path: Path) -> None:
    fake = place(tmp_path, {ONE: "import time; time.sleep(30)"}, limit=0.3)
    assert execute([ONE], fake) == 1
    assert result(tmp_path, ONE)["error"] == "it took more than 0 s"


def test_several_run_at_once(tmp_path: Path) -> None:
    # Each waits for a mark of the other: one after the other, both would take too long.
    def wait(mine: str, other: str) -> str:
        return f"""
import pathlib, time
pathlib.Path({str(tmp_path / mine)!r}).touch()
while not pathlib.Path({str(tmp_path / other)!r}).exists():
    time.sleep(0.05)
{GOOD}"""

    fake = place(tmp_path, {ONE: wait("1", "2"), TWO: wait("2", "1")}, limit=30)
    assert execute([ONE, TWO], fake, jobs=2) == 0
    assert {row.run for row in recorded(tmp_path).values()} == {ONE, TWO}


def test_an_interrupt_ends_all_that_runs(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    later = f"import time, pathlib; time.sleep(1.5); pathlib.Path({str(mark)!r}).touch()"
    with pytest.raises(KeyboardInterrupt):
        execute([ONE, TWO], Stops(results=tmp_path, scripts={ONE: later}), jobs=2)
    time.sleep(1.6)
    assert not mark.exists()


def test_a_model_without_a_checkpoint_is_trained_once_for_all_its_runs(tmp_path: Path) -> None:
    class Trains(Fake):
        def preparation(self, run: Run) -> list[str]:
            weights = run.weights(self.folder)
            assert weights is not None
            code = (
                f"import pathlib; p = pathlib.Path({str(weights)!r}); p.parent.mkdir(parents=True)"
            )
            return [sys.executable, "-c", f"{code}; p.touch()"]

    peer = Run("lm_ptb", "hqq", "int4", 0)
    trains = Trains(results=tmp_path, folder=tmp_path / "work", peers=tmp_path)
    prepare([ONE, peer, Run("minilm_stsb", "hqq", "int4")], trains)
    (weights,) = (path for path in trains.folder.rglob("*") if path.is_file())
    command = Place.command(trains, peer)
    assert command[command.index("--weights") + 1] == str(weights)
    assert "--weights" not in Place.command(trains, Run("minilm_stsb", "hqq", "int4"))
    prepare([ONE], trains)  # making the folder anew would be an error


def test_globs_choose(tmp_path: Path) -> None:
    wanted = to_do([ONE, TWO], ["lm_ptb/*-1", "minilm*"], place(tmp_path), retry=False)
    assert wanted == [TWO]


def test_messages_do_not_name_folders() -> None:
    assert runner.cleaned(f"{ROOT}/x in {sys.prefix}") == "./x in PYTHON"


# --- what there is to run ------------------------------------------------------------------------


def test_training_has_three_seeds_and_no_run_comes_twice() -> None:
    full = runs("full")
    assert len({run.name for run in full}) == len(full)
    assert set(runs("quick")) <= set(full)
    assert {run.task for run in full} == set(TASKS)
    trained = [run for run in full if run.method in {"dither-train", "dither-noise"}]
    trained += [run for run in full if not TASKS[run.task].checkpoint]
    for run in trained:
        assert {Run(run.task, run.method, run.setting, seed) for seed in SEEDS} <= set(full)


# --- verdicts and page ---------------------------------------------------------------------------


def rows_of(*found: tuple[str, str, int, float], task: str = "minilm_stsb") -> list[Row]:
    seeds: dict[tuple[str, str], int] = {}
    rows = []
    for method, setting, nbytes, score in found:
        seed = seeds[method, setting] = seeds.get((method, setting), -1) + 1
        rows.append(Row(Run(task, method, setting, seed), nbytes, score))
    return rows


def wins(rows: list[Row], task: str = "minilm_stsb") -> list[bool | None]:
    found = verdicts(groups(rows, task), task)
    return [None if v.ours is None else v.peer_wins for v in found]


def test_only_files_of_as_many_bytes_count() -> None:
    ours = ("dither", "100", 100, 80.0), ("dither", "50", 50, 70.0)
    assert wins(rows_of(*ours, ("nncf", "a", 100, 79.9))) == [False]
    assert wins(rows_of(*ours, ("nncf", "a", 99, 79.9))) == [True]
    assert wins(rows_of(*ours, ("nncf", "a", 49, 10.0))) == [None]
    assert wins(rows_of(*ours, ("nncf", "a", 100, 80.0))) == [False]


def test_a_better_smaller_file_does_not_hide_a_worse_one_of_the_same_size() -> None:
    rows = rows_of(("dither", "100", 98, 80.0), ("dither", "50", 50, 82.0), ("nncf", "a", 100, 81))
    assert wins(rows) == [False]
    (claim,) = at_its_size(groups(rows, "minilm_stsb"), "minilm_stsb")[3:]
    assert claim.startswith("- nncf a scores 81.00 with 100 bytes, 1.00 better than 80.00 (dither")
    assert at_its_size(groups(rows[1:], "minilm_stsb"), "minilm_stsb") == []
    twice = rows_of(("dither", "100", 98, 80.0), ("nncf", "a", 100, 81))  # said already
    assert at_its_size(groups(twice, "minilm_stsb"), "minilm_stsb") == []


def test_perplexity_is_better_when_less() -> None:
    rows = rows_of(("dither", "100", 100, 80.0), ("nncf", "a", 100, 79.0), task="lm_ptb")
    assert wins(rows, "lm_ptb") == [True]


def test_seeds_count_by_their_mean_and_largest_file() -> None:
    rows = rows_of(
        ("dither-train", "100", 90, 81.0), ("dither-train", "100", 100, 79.0), ("nncf", "a", 99, 1)
    )
    assert wins(rows) == [None]
    rows[-1] = Row(rows[-1].run, 100, 80.5)
    assert wins(rows) == [True]
    assert "mean of 2 seeds" in beaten(verdicts(groups(rows, "minilm_stsb"), "minilm_stsb"))[2]


def test_models_that_are_trained_are_compared_seed_by_seed() -> None:
    ours = ("dither", "100", 99, 60.0), ("dither", "100", 99, 80.0)
    rows = rows_of(*ours, ("nncf", "a", 100, 70.0), task="minilm_sst2")
    assert wins(rows, "minilm_sst2") == [True]  # 60 of the same model; the mean is 70
    rows = rows_of(*ours, *[("nncf", "a", 100, 70.0)] * 3, task="minilm_sst2")
    assert wins(rows, "minilm_sst2") == [None]


def test_the_original_model_is_no_method_of_ours() -> None:
    assert wins(rows_of(("fp32", "none", 100, 99.0), ("nncf", "a", 100, 1.0))) == [None]


def test_the_page_says_first_where_a_peer_is_better() -> None:
    rows = rows_of(
        ("fp32", "none", 400, 82.0),
        ("dither", "100", 98, 80.25),
        ("nncf", "int4", 99, 80.75),
        ("hqq", "int8", 200, 80.0),
    )
    rows.append(Row(Run("minilm_stsb", "aimet", "w4"), error="KeyError: 'a|b'"))
    text = page.page(rows, [])
    task = text[text.index("## all-MiniLM-L6-v2 on STS-B") :]
    claim = "- nncf int4 scores 80.75 with 99 bytes, 0.50 better than 80.25 (dither 100, 98 bytes)."
    assert "**Peers beat the best of ours once**, of 2 rows compared:" in task
    assert 0 < task.index(claim) < task.index("| bytes |")
    assert "| 98 | 4.1 | **dither 100** | 80.25 | -1.75 |  | 0 |" in task
    assert "| aimet w4 | `KeyError: 'a\\|b'` |" in task
    assert "hqq int8 scores" not in task
    assert "nncodec" in task[task.index("Peers not run on this task:") :].splitlines()[0]
    assert "dither-train 2670000 (0 1 2)" in task
    without = page.page(rows[:2] + rows[3:], [])
    assert "No peer beats the best of ours within its bytes, of 1 row compared." in without


def test_changes_are_of_the_same_models() -> None:
    fp32 = ("fp32", "none", 400, 80.0), ("fp32", "none", 400, 90.0)
    rows = rows_of(*fp32, ("nncf", "a", 100, 79.0), task="minilm_sst2")
    assert "| nncf a | 79.00 | -1.00 |  | 0 |" in page.page(rows, [])


def test_tables_hold_the_numbers_of_their_files(tmp_path: Path) -> None:
    rows = read([ROOT / "benchmarks" / "results"])
    text = page.page(rows, [])
    scored = [row for row in rows if row.score is not None and not row.error]
    assert {row.run.method for row in scored} & set(METHODS)
    for row in (row for row in scored if not row.run.ours):
        assert f"| {row.run.method} {row.run.setting} | {row.score:.2f} |" in text
        assert f"| {row.nbytes:,} |" in text


def test_rows_of_a_later_folder_win(tmp_path: Path) -> None:
    for name, score in (("old", 1.0), ("new", 2.0)):
        row: dict[str, Any] = {"task": "lm_ptb", "method": "dither", "setting": "290000"}
        row |= {"seed": 0, "nbytes": 5, "score": score}
        runner.write(result_path(tmp_path / name, ONE), row)
    assert [row.score for row in read([tmp_path / "old", tmp_path / "new"])] == [2.0]


def test_the_smaller_count_of_a_peer_is_taken(tmp_path: Path) -> None:
    run = Run("minilm_stsb", "nncf", "int8")
    row: dict[str, Any] = {"version": "1", "nbytes": 100, "nbytes_zstd": 90, "score": 5.0}
    printed = f"noise\n{json.dumps(row)}\n"
    runner.write(result_path(tmp_path, run), outcome(run, Ended(0, printed, "", 1, 1), 60))
    (found,) = read([tmp_path])
    assert found.machine
    assert (found.nbytes, found.commit) == (90, "1")
    assert found.remark == "zstd -19; 100 bytes as written"


@pytest.mark.parametrize("method", ["dither-train", "parq"])
def test_rows_say_what_was_trained_on(tmp_path: Path, method: str) -> None:
    said: list[dict[str, Any]] = [{}, {"unseen": True}, {"unseen": True, "control": 208.1234}]
    for seed, more in enumerate(said):
        run = Run("lm_ptb", method, "290000", seed)
        printed = json.dumps(more | {"nbytes": 9, "score": 5.0})
        runner.write(result_path(tmp_path, run), outcome(run, Ended(0, printed, "", 1, 1), 60))
    remarks = [row.remark for row in read([tmp_path])]
    assert "had been trained on" in remarks[0]
    assert remarks[1:] == ["", "fp32 after the same steps: 208.12"]


def test_rows_of_programs_of_their_own_are_read(tmp_path: Path) -> None:
    head = {"commit": "abc", "machine": "M", "torch": "2"}
    free = {"task": "minilm_stsb", "budget": 10, "nbytes": 9, "score": 80.0, "nncodec": 79.0}
    files: dict[str, Any] = {
        "data_free_test": head | {"rows": [free]},
        "calibrated_test": [
            {"task": "minilm_stsb", "budget": 10, "seed": 2, "nbytes": 8, "score": 81.0}
            | {"peak_mib": 100, "environment": head}
        ],
        "train_minilm_test": {
            "environment": head,
            "rows": [{"budget": 10, "seed": 1, "bytes": 7, "test": 82.0, "commit": "def"}],
        },
        "ordering_ptb": head
        | {"rows": [{"row": "int4, QAT", "seed": 0, "nbytes": 6, "score": 200.0, "cpu_s": 3.0}]},
    }
    for name, found in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    rows = {row.run.name: row for row in read([tmp_path])}
    shown = {name: (row.nbytes, row.score, row.commit) for name, row in rows.items()}
    assert shown == {
        "minilm_stsb/dither-10-0": (9, 80.0, "abc"),
        "minilm_stsb/dither-data-10-2": (8, 81.0, "abc"),
        "minilm_stsb/dither-train-10-1": (7, 82.0, "def"),
        "lm_ptb/dither-noise-int4-qat-0": (6, 200.0, "abc"),
    }
    assert rows["minilm_stsb/dither-data-10-2"].peak_mb == 104.9


def test_plots_repeat_and_are_small(tmp_path: Path) -> None:
    rows = rows_of(
        ("fp32", "none", 4000, 82.0),
        ("dither", "100", 98, 80.25),
        ("dither-train", "100", 98, 80.25),
        ("dither-train", "100", 99, 80.5),
        ("nncf", "int4", 99, 80.75),
        ("nncf", "int2", 40, 2.0),
    )
    for name in ("one", "two"):
        assert plots.score_against_bytes(rows, "minilm_stsb", tmp_path / name)
    svg = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert svg == (tmp_path / "two.svg").read_text(encoding="utf-8")
    for label in ("dither-train", "nncf", "fp32", "1 row outside"):
        assert label in svg
    assert (tmp_path / "one.png").stat().st_size < 150_000
    assert not plots.score_against_bytes(rows, "lm_ptb", tmp_path / "none")


# --- measuring -----------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.output = nn.Linear(16, 50, bias=False)
        self.output.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.output(self.table(ids))
        return logits


@pytest.fixture
def tied(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Tied]:
    def load(*_: object) -> Tied:
        torch.manual_seed(0)
        return Tied().eval()

    def evaluate(_: str, model: nn.Module, __: str) -> float:
        return float(model.get_parameter("table.weight").detach().square().sum())

    monkeypatch.setattr(measure, "load", load)
    monkeypatch.setattr(measure, "evaluate", evaluate)
    return load


def test_a_file_is_made_within_its_budget_and_scored_alone(
    tied: Callable[[], Tied], tmp_path: Path
) -> None:
    run = Run("lm_ptb", "dither", "1500")
    path, figures = measure.make(run, tmp_path)
    assert path is not None
    assert path.stat().st_size <= 1500
    assert figures["seconds"] >= 0
    whole = float(tied().table.weight.detach().square().sum())
    assert measure.score(run, path, tmp_path) == pytest.approx(whole, rel=0.05)
    assert measure.score(run, path, tmp_path) != whole
    ids = [torch.arange(50), torch.arange(25)]
    model, original = measure.loaded(run, path, tmp_path), tied()
    data = dither.Data(ids, distance=divergence)
    with torch.no_grad():
        wanted = [float(divergence(model(some), original(some))) for some in ids]
    assert distance(model, original, data) == pytest.approx(sum(wanted) / 2)
    assert distance(original, original, data) == 0.0 < wanted[0]


def test_the_distance_of_a_file_is_that_of_what_it_holds(
    tied: Callable[[], Tied], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def samples(task: str, seed: int) -> dither.Data:
        seen.append(seed)
        return dither.Data([torch.arange(50)], distance=divergence)

    monkeypatch.setattr(distances, "samples_of", samples)
    monkeypatch.setattr(resnet20_cifar10, "load", tied)
    archive = dither.compress(tied(), 1500)
    archive.save(tmp_path / "file.dither")
    model = tied()
    dither.load_into(model, archive)
    found = distances.of_file("resnet20_cifar10", tmp_path / "file.dither", seed=2)
    assert found == distance(model, tied(), samples("", 0)) > 0
    assert seen[0] == 2 + distances.OTHER


def test_nothing_of_the_original_counts(tied: Callable[[], Tied], tmp_path: Path) -> None:
    dither.compress({"other": torch.ones(3)}, 1000).save(tmp_path / "x.dither")
    with pytest.raises(SystemExit, match="does not fit"):
        measure.score(ONE, tmp_path / "x.dither", tmp_path)


def test_fp32_counts_a_tied_weight_once(tied: Callable[[], Tied], tmp_path: Path) -> None:
    path, figures = measure.make(Run("lm_ptb", "fp32", "none"), tmp_path)
    assert path is None
    assert figures["nbytes"] == 50 * 16 * 4


def test_a_model_without_a_checkpoint_is_trained_once_and_then_to_a_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built: list[Tied] = []
    drawn: list[int] = []

    def build() -> Tied:
        built.append(Tied())
        with torch.no_grad():
            built[-1].table.weight.mul_(0.1)
        return built[-1]

    def batches(seed: int) -> Iterator[Tensor]:
        drawn.append(seed)
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randint(0, 50, (8,), generator=generator)

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(ids), ids)

    def score(model: nn.Module) -> float:
        return float(loss(model, torch.arange(50)).detach())

    rates = (3e-2, 3e-2, 3e-2)
    task = ordering.Task(build, batches, loss, score, "nats", (100, 40, 2), rates, {})
    monkeypatch.setitem(ordering.TASKS, "ptb", task)
    monkeypatch.setattr(measure, "evaluate", lambda _, model, __: score(model))
    run = Run("lm_ptb", "dither-train", "1200", 1)
    first = measure.load(run, tmp_path)
    assert len(list(tmp_path.rglob("plain.pt"))) == 1
    again = measure.load(run, tmp_path)
    assert torch.equal(first.get_parameter("table.weight"), again.get_parameter("table.weight"))
    path, figures = measure.fine_tune(run, tmp_path)
    assert path.stat().st_size <= 1200
    assert figures["length"] == 40
    assert len(drawn) == 4, drawn  # the model's training in two stages, ours, the control's
    assert not set(drawn[:2]) & set(drawn[2:]), "batches that trained the model are replayed"
    assert drawn[2] == drawn[3]
    assert figures["control"] <= score(first), "fp32 after the same steps"
    untrained = score(build())
    assert score(built[0]) < 0.9 * untrained
    assert measure.score(run, path, tmp_path) < 0.9 * untrained
