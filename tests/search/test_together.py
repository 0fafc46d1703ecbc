"""Two processes make the file of one, byte for byte, and fail together."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dither.core import BudgetError
from dither.team import ALONE, Team, fingerprint, team_of
from tests.search.together import FAILURES, FILES, digest, tokens

ROOT = Path(__file__).parents[2]


def started(what: str, folder: Path) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.search.together", what, str(rank), str(folder)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each of two processes made, or what it said."""
    folder = tmp_path_factory.mktemp("together")
    ranks = started("main", folder)
    try:
        errors = [process.communicate(timeout=240)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], errors
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_that_of_one_process(
    name: str, found: list[dict[str, str]], tmp_path: Path
) -> None:
    wanted = digest(FILES[name](), tmp_path / "one.dither")
    assert [each[name] for each in found] == [wanted, wanted]


def test_a_process_may_work_alone(found: list[dict[str, str]]) -> None:
    assert found[0]["alone"] == found[0]["without_data"]


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "model_fails": "does not run on batch .*KeyError: 'only here'",
        "loader_fails": "OSError: disk of one machine",
        "other_batches": "SpecError: data differ between processes: .*seed a loader",
        "other_models": "SpecError: sizes and tensors differ between processes",
        "other_sizes": "SpecError: sizes and tensors differ between processes",
        "impossible": "BudgetError: .*impossible",
    }.items(),
)
def test_an_error_in_one_process_ends_all_with_it(
    name: str, said: str, found: list[dict[str, str]]
) -> None:
    assert name in FAILURES
    assert found[0][name] == found[1][name]
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(found[0][name])


def test_a_killed_process_is_missed_at_once(tmp_path: Path) -> None:
    first, second = started("killed", tmp_path)
    _, errors = first.communicate(timeout=60)
    second.communicate(timeout=60)
    assert second.returncode == -signal.SIGKILL
    assert first.returncode == 0, errors
    told = json.loads((tmp_path / "told.json").read_text(encoding="utf-8"))
    assert "is gone" in told["said"]
    assert told["seconds"] < 30


def test_a_job_of_two_processes_goes_on_where_both_were(tmp_path: Path) -> None:
    first, second = started("interrupted", tmp_path)
    _, errors = first.communicate(timeout=60)
    second.communicate(timeout=60)
    assert second.returncode == -signal.SIGKILL, errors
    assert first.returncode == 0, errors
    left = {path.name for path in tmp_path.glob("file*")}
    assert left == {"file.journal", "file.journal.1"}
    shutil.copy(tmp_path / "file.journal.1", tmp_path / "file.journal.2")  # of one process more
    (tmp_path / "again").touch()
    ranks = started("interrupted", tmp_path)
    said = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    anew = [int((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    wanted = FILES["with_data"]()
    assert (tmp_path / "file").read_bytes() == wanted.to_bytes()
    assert {path.name for path in tmp_path.glob("file*")} == {"file"}
    assert sum(anew) < len(wanted.entries)  # of several passes over all of them


def test_a_process_that_does_not_come_is_not_waited_for_without_end(tmp_path: Path) -> None:
    ranks = started("missing", tmp_path)
    errors = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    told = json.loads((tmp_path / "told.json").read_text(encoding="utf-8"))
    assert "not all of the 2 processes came to compress within 0:00:02" in told["said"]
    assert "alone()" in told["said"]
    assert told["seconds"] < 30


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "dither", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("has_data", [False, True])
def test_the_command_line_under_torchrun(has_data: bool, tmp_path: Path) -> None:
    save_file(tokens().state_dict(), tmp_path / "tokens.safetensors")
    one, two = tmp_path / "one.dither", tmp_path / "two.dither"
    source = tmp_path / "tokens.safetensors"
    given = ["--data", "tests.search.together:ids", "--model", "tests.search.together:tokens"]
    given = given if has_data else []
    done = torchrun("compress", source, "--size", "9x", "-o", two, "--json", *given)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(two)  # said once
    command = [sys.executable, "-m", "dither", "compress", str(source), "--size", "9x"]
    alone = subprocess.run(
        [*command, "-o", str(one), *given],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert alone.returncode == 0, alone.stderr
    same = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (one, two)]
    assert same[0] == same[1]


def test_an_error_under_torchrun_is_one_sentence(tmp_path: Path) -> None:
    save_file(tokens().state_dict(), tmp_path / "tokens.safetensors")
    done = torchrun("compress", tmp_path / "tokens.safetensors", "--size", "100")
    assert done.returncode != 0
    assert "dither: a file of 100 bytes is impossible" in done.stderr
    assert not list(tmp_path.glob("*.dither"))


def test_owners_have_about_as_much_to_do() -> None:
    team = Team()
    team.size = 3
    costs = {str(n): float(n % 7 + 1) for n in range(40)}
    owners = team.owners(costs)
    loads = [sum(costs[n] for n, owner in owners.items() if owner == rank) for rank in range(3)]
    assert list(owners) == list(costs)
    assert max(loads) - min(loads) <= 1


def test_alone_nothing_is_exchanged_and_errors_stay_as_they_are() -> None:
    with team_of("nothing") as team:
        assert team is ALONE
        assert team.first("a number", lambda: 7) == 7
        assert fingerprint([torch.ones(2)], team) == 0
    with pytest.raises(BudgetError, match="mine"), team_of("nothing"):
        raise BudgetError("mine")


def test_fingerprints_tell_values_types_and_shapes_apart() -> None:
    team = Team()
    team.size = 2
    values: list[Tensor] = [torch.zeros(4), torch.ones(4), torch.zeros(2, 2)]
    values += [torch.zeros(4, dtype=torch.int32), torch.zeros(4).bfloat16()]
    assert len({fingerprint({"a": value}, team) for value in values}) == len(values)
    mixed = torch.randn(3, 5)
    assert fingerprint(mixed.T, team) == fingerprint(mixed.T.contiguous(), team)
