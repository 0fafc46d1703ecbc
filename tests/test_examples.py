"""The examples run from beginning to end, with tiny settings; one in a process of its own."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import dither

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.stem not in {"tasks", "__init__"})


def settings(out: Path, epochs: int = 1) -> list[str]:
    return ["--data", "digits", "--epochs", str(epochs), "--steps", "6", "--out", str(out)]


def check(printed: str, out: Path, limit: int = 150_000) -> None:
    dither.verify(out)
    row = next(line.split() for line in printed.splitlines() if line.startswith("file"))
    assert int(row[1].replace(",", "")) == out.stat().st_size < limit
    assert 20 < float(row[2]) <= 100


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_writes_a_file_and_says_how_large_and_good(
    script: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "model.dither"
    # These train no more afterwards.
    epochs = 4 if script.stem in {"ajpq", "choosing"} else 1
    monkeypatch.setattr(sys, "argv", [str(script), *settings(out, epochs)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(script), run_name="__main__")
    # Six steps close few gates: files of 16 or 8 bits, and not of 4.
    limit = 498_368 // 2 if script.stem == "bayesian_bits" else 150_000
    check(capsys.readouterr().out, out, limit)


def test_an_example_runs_by_itself_from_anywhere(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "model.dither"
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "diffq.py"), *settings(out)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    check(done.stdout, out)
