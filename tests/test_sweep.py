"""Sweeps: every cell once, whatever some of them do, and on from where a killed one stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import dither
from dither.cli import work
from dither.cli.cells import Cell, cells_of, failed, file_name, run_cell
from dither.cli.choose import choose_file
from dither.cli.console import Printer
from dither.cli.sweep import append, read_rows, sweep
from dither.core import CheckpointError, DitherError
from dither.report import draw_sweep

PARTS = """
import os, signal, time
import torch
from torch import nn
import dither

def build():
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 8))

def samples(seed):
    torch.manual_seed(seed)
    return [torch.randn(64, 24) for _ in range(3)]

def score(model):
    return -float(model(torch.ones(1, 24)).sum())

def own(model, nbytes, data, seed):
    assert seed in (3, 4)
    return dither.compress(model, nbytes).to_bytes()

def fails(model, nbytes, data, seed):
    raise RuntimeError("no luck with\\nthis")

def dies(model, nbytes, data, seed):
    os.kill(os.getpid(), signal.SIGKILL)

def greedy(model, nbytes, data, seed):
    return dither.compress(model, 2 * nbytes)

def slow(model, nbytes, data, seed):
    with open("pids", "a") as file:
        file.write(f"{os.getpid()}\\n")
    while not os.path.exists("go"):
        time.sleep(0.02)
    return dither.compress(model, nbytes)
"""

SCORES = """

def counted(model):
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 8))
    inputs = torch.randn(64, 24)
    with torch.no_grad():
        score = -float((model(inputs) - original(inputs)).square().mean())
    with open("calls", "a") as file:
        file.write(f"{score!r}\\n")
    return score

def picky(model):
    if os.path.exists("called"):
        return counted(model)
    open("called", "w").close()
    return float("nan")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with weights and a module of the user's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 8))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "parts.py").write_text(PARTS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "parts", raising=False)
    return tmp_path


def command(*options: str) -> list[str]:
    given = ("--model", "parts:build", "--data", "parts:samples")
    return [sys.executable, "-m", "dither", "sweep", "model.safetensors", *given, *options]


def swept(*options: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        command("--json", *options), capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def cell(**given: Any) -> Cell:
    plain = Cell("model.safetensors", "data-free", "4x", 3, "parts:samples", "parts:build")
    return replace(plain, **given)


def test_cells_that_fail_are_rows_and_the_others_go_on(folder: Path) -> None:
    methods, results = "data-free,parts:own", folder / "sweep.jsonl"
    options = ("--sizes", "4x", "--jobs", "2", "--keep", "files", "--plot", "sweep.svg")
    status, found, _ = swept("--methods", methods, "--seeds", "3,4", *options)
    assert status == 0
    rows = {(row["method"], row["seed"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) == 3  # without data nothing depends on the seed
    for row in rows.values():
        assert row["nbytes"] <= row["budget"] == 24 * 48 + 48 + 48 * 8 + 8
        assert row["distance"] > 0
        assert row["score"] is None
    assert rows["parts:own", 3]["distance"] != rows["parts:own", 4]["distance"]  # other samples
    kept = [path.stat().st_size for path in (folder / "files").iterdir()]
    assert kept == [rows["data-free", 3]["nbytes"]] * 3
    assert b"<svg" in (folder / "sweep.svg").read_bytes()

    before = results.read_bytes()
    methods += ",parts:fails,parts:dies"
    status, found, _ = swept("--methods", methods, "--seeds", "3", *options)
    assert (status, found["failed"]) == (1, 2)
    assert found["rows"][:2] == [rows["data-free", 3], rows["parts:own", 3]]
    assert found["rows"][2]["error"] == "RuntimeError: no luck with"
    assert "signal 9" in found["rows"][3]["error"]
    assert results.read_bytes().startswith(before)  # nothing was done again
    assert results.read_bytes().count(b"\n") == 5

    (folder / "parts.py").write_text(PARTS.replace("def fails", "fails = own\ndef gone"))
    methods = methods.removesuffix(",parts:dies")
    assert swept("--methods", methods, "--seeds", "3", *options)[0] == 1  # an error is a result
    assert results.read_bytes().count(b"\n") == 5
    status, found, _ = swept("--methods", methods, "--seeds", "3", "--retry", *options)
    assert (status, found["failed"]) == (0, 0)
    assert results.read_bytes().count(b"\n") == 6


def test_a_killed_sweep_leaves_no_process_and_goes_on(folder: Path) -> None:
    options = ("--methods", "data-free,parts:slow", "--sizes", "4x,6x", "--seeds", "3", "-q")
    first = subprocess.Popen(command(*options))
    pids, results = folder / "pids", folder / "sweep.jsonl"
    limit = time.monotonic() + 60
    while not (pids.exists() and pids.read_text().endswith("\n")) and time.monotonic() < limit:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    child = int(pids.read_text())
    while Path(f"/proc/{child}").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    before = results.read_bytes()
    assert before.count(b"\n") == 1
    results.write_bytes(before + before[:100])  # as if killed amid the next row
    (folder / "go").touch()
    assert subprocess.run(command(*options), check=False, timeout=120).returncode == 0
    rows = read_rows(results)
    assert [(row["method"], row["size"]) for row in rows.values()] == [
        ("data-free", "4x"), ("parts:slow", "4x"), ("data-free", "6x"), ("parts:slow", "6x"),
    ]  # fmt: skip
    assert results.read_bytes().startswith(before)
    assert len(pids.read_text().split()) == 3


@pytest.mark.parametrize("method", ["data", "int8", "data-free"])
def test_a_row_says_what_the_file_is(method: str, folder: Path) -> None:
    row = run_cell(cell(method=method, evaluate="parts:score", keep=str(folder), size="3x"))
    path = folder / file_name(cell(method=method, evaluate="parts:score", size="3x"))
    with dither.open(path) as archive:
        assert row["nbytes"] == archive.nbytes == path.stat().st_size <= row["budget"]
        assert bool(archive.sites) == (method == "int8")
    again = run_cell(cell(method=method, evaluate="parts:score", size="3x"))
    assert {k: again[k] for k in ("sha256", "distance", "score")} == {
        k: row[k] for k in ("sha256", "distance", "score")
    }
    assert isinstance(row["score"], float)


def test_a_method_that_takes_more_bytes_than_it_may_fails(folder: Path) -> None:
    with pytest.raises(dither.SpecError, match=r"'parts:greedy' made .* bytes of at most"):
        run_cell(cell(method="parts:greedy"))
    with pytest.raises(dither.SpecError, match="'data' needs --data"):
        run_cell(cell(method="data", data=None))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"methods": ["gptq"]}, "there is no method 'gptq'"),
        ({"choose": 0}, "1 or more"),
        ({"choose": 2}, "give --evaluate and --keep"),
        ({"choose": 2, "evaluate": "a:b"}, "give --evaluate and --keep"),
        ({"choose": 2, "evaluate": "a:b", "keep": Path("files"), "twice": True}, "give one SOURCE"),
        ({"seeds": ["a"]}, "seeds are whole numbers"),
        ({"sizes": []}, "at least one method, one size"),
        ({"results": "parts.py"}, "no result of a sweep"),
        ({"plot": Path("plot.txt")}, "no picture"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(
    given: dict[str, Any], said: str, folder: Path
) -> None:
    results, plot = Path(given.pop("results", "sweep.jsonl")), given.pop("plot", None)
    choose, twice = given.pop("choose", None), given.pop("twice", False)
    wanted = work.Wanted(**{"methods": ["data-free"], "sizes": ["4x"], "seeds": ["0"], **given})
    sources, printer = [folder / "model.safetensors"], Printer(as_json=False, quiet=True)
    sources += [folder / "other.safetensors"] if twice else []
    how = {"jobs": 1, "ray": None, "retry": False, "plot": plot, "choose": choose}
    with pytest.raises(dither.DitherError, match=said):
        work.sweep(printer, sources, wanted, results, **how)
    assert (folder / "parts.py").read_text(encoding="utf-8") == PARTS
    assert not (folder / "sweep.jsonl").exists()


@pytest.mark.usefixtures("folder")
def test_a_choice_that_lacks_its_package_is_refused_before_any_cell_is_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.gaussian_process", None)
    cells = [cell(evaluate="parts:counted", keep="files")]
    settings: dict[str, Any] = {"jobs": 1, "ray": None, "retry": False, "plot": None, "choose": 1}
    with pytest.raises(DitherError, match=r"dither\[select\]"):
        sweep(Printer(as_json=False, quiet=True), cells, Path("rows.jsonl"), **settings)
    assert not Path("rows.jsonl").exists()


class Choice:
    """Files of several sizes, made in this process, and what was said of them."""

    def __init__(self, evaluate: str, sizes: int) -> None:
        self.cells = [
            cell(size=f"{size}x", data=None, evaluate=evaluate, keep="files")
            for size in range(3, 3 + sizes)
        ]
        Path("files").mkdir()
        plain = [replace(one, evaluate=None) for one in self.cells]
        self.rows = {one.key: run_cell(one) for one in plain}

    def made(self, trials: int) -> dict[str, Any]:
        kept: list[Any] = []
        printer = Printer(as_json=False, quiet=True)
        found = choose_file(printer, self.cells, self.rows, trials, kept.append)
        self.rows |= {
            Cell(**{name: row[name] for name in vars(self.cells[0])}).key: row for row in kept
        }
        return found


def test_the_best_file_is_found_by_fewer_scores_and_a_stopped_choice_goes_on(folder: Path) -> None:
    pytest.importorskip("sklearn")
    (folder / "parts.py").write_text(PARTS + SCORES, encoding="utf-8")
    choice = Choice("parts:counted", 10)
    assert choice.made(2)["scored"] == 2
    found = choice.made(5)
    calls = (folder / "calls").read_text().split()
    assert len(calls) == len(set(calls)) == 5 == found["scored"]  # none was measured again
    assert (found["of"], found["failed"], len(found["beliefs"])) == (10, 0, 10)
    assert found["best"]["score"] == max(map(float, calls))
    assert found["best"]["size"] == "3x"  # the largest file: the score falls with the error
    with dither.open(found["file"]) as archive:
        assert archive.nbytes == found["best"]["nbytes"]
    assert 0 < found["chance"] <= 1
    assert choice.made(5) == found
    assert len((folder / "calls").read_text().split()) == 5
    assert choice.made(99)["scored"] == 10


def test_files_that_cannot_be_scored_are_left_out(folder: Path) -> None:
    pytest.importorskip("sklearn")
    (folder / "parts.py").write_text(PARTS + SCORES, encoding="utf-8")
    choice = Choice("parts:picky", 3)
    found = choice.made(3)
    assert (found["scored"], found["failed"]) == (2, 1)
    errors = [row for row in choice.rows.values() if "error" in row]
    assert [row["error"] for row in errors] == ["SpecError: a score of nan"]
    assert found["best"]["size"] != errors[0]["size"]
    everything = Choice.__new__(Choice)
    everything.cells = choice.cells[:1]
    everything.rows = {one.key: failed(one, "no") for one in choice.cells[:1]}
    everything.rows[replace(choice.cells[0], evaluate=None).key] = failed(choice.cells[0], "no")
    assert everything.made(1)["best"] is None


def test_the_command_makes_lost_files_anew_and_chooses(folder: Path) -> None:
    pytest.importorskip("sklearn")
    (folder / "parts.py").write_text(PARTS + SCORES, encoding="utf-8")
    options = ("--sizes", "4x", "--keep", "files")
    assert swept(*options)[0] == 0
    next((folder / "files").iterdir()).unlink()
    status, found, errors = swept(*options, "--evaluate", "parts:counted", "--choose", "1")
    assert status == 0, errors
    assert Path(found["choice"]["file"]).is_file()
    assert found["choice"]["best"]["score"] == float((folder / "calls").read_text())
    rows = list(read_rows(folder / "sweep.jsonl").values())
    assert [row["evaluate"] for row in rows] == [None, "parts:counted"]


def test_cells_are_all_combinations_each_once() -> None:
    found = cells_of(["a", "b"], ["data-free", "data", "data"], ["4x", "8x"], [1, 2], data="d:d")
    assert len(found) == len(set(found)) == 2 * 2 * (1 + 2)
    assert len({one.key for one in found}) == len(found)
    assert len({file_name(one) for one in found}) == len(found)
    assert replace(found[0], keep="elsewhere").key == found[0].key


@pytest.mark.parametrize("cut", [1, 5, 12, 60, -3])
def test_a_row_that_was_cut_off_was_not_run(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{**vars(cell(seed=seed)), "score": 1.0, "more": {"a": 1}} for seed in range(3)]
    append(path, rows[0])
    whole = path.read_bytes()
    append(path, rows[1])
    data = path.read_bytes()
    path.write_bytes(data[: len(whole) + cut] if cut > 0 else data[:cut])
    assert list(read_rows(path).values()) == rows[:1]
    append(path, rows[2])
    append(path, rows[1])
    assert list(read_rows(path).values()) == [rows[0], rows[2], rows[1]]


def test_other_files_are_no_results(tmp_path: Path) -> None:
    for text in ("1\n", '{"a": 1}\n', "text\n", '["source"]\n'):
        (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match="line 1"):
            read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("key", ["score", "distance", "bits per"])
def test_the_picture_shows_what_all_rows_have(key: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            **vars(cell(method=method, seed=seed)),
            "budget": budget,
            "nbytes": budget - seed,
            "values": 100,
            "score": float(budget + seed) if key == "score" else None,
            "distance": 1 / budget if key != "bits per" else None,
        }
        for method in ("data-free", "data")
        for budget in (1000, 2000)
        for seed in (0, 1)
    ]
    rows.append({**vars(cell(method="data")), "error": "none"})
    with mpl.rc_context({"svg.fonttype": "path"}):  # beside which texts are comments
        draw_sweep(rows, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    shown = [found for found in ("score", "distance", "bits per") if f"<!-- {found}" in text]
    assert shown == [key]
    assert "<!-- data-free -->" in text
