"""The command line answers Ctrl-C at once, whatever it is in, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

# Work that looks for no signals for minutes, as a loop over a large tensor does: powers of a matrix
# in one call.
_DEAF = """
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import torch
from dither.archive import atomic_write
from dither.cli import main, work

matrix = torch.eye(3072)

def deaf(_=None):
    print("working", flush=True)
    torch.linalg.matrix_power(matrix, 2**62 + 12345)

def here(*_, **__):
    with atomic_write("new.dither") as file:
        file.write(b"begun")
        deaf()

def in_threads(*_, **__):
    with atomic_write("new.dither") as file, ThreadPoolExecutor(2) as pool:
        list(pool.map(deaf, range(100)))

def left_behind(*_, **__):
    threading.Thread(target=deaf).start()
    time.sleep(60)

work.compress = {way}
main()
"""


def interrupted(folder: Path, *command: str, number: int = signal.SIGINT) -> tuple[int, str]:
    """Exit status and what was said, of a command that is sent a signal after its first line."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(number)
    try:
        status = process.wait(10)  # the work takes minutes; a busy machine more than a second
    finally:
        process.kill()
    with process.stdout, process.stderr:
        return status, process.stderr.read()


@pytest.mark.parametrize("way", ["here", "in_threads", "left_behind"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_work_that_looks_for_no_signals_is_ended(
    way: str, number: signal.Signals, tmp_path: Path
) -> None:
    torch.save({"w": torch.zeros(100)}, tmp_path / "w.pt")
    command = ("-c", _DEAF.replace("{way}", way), "compress", "w.pt", "--size", "1kB")
    status, said = interrupted(tmp_path, *command, number=number)
    assert status == 128 + number
    assert said == ("interrupted\n" if number == signal.SIGINT else "")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


_BUSY = """
import sys
import torch
from dither.cli import console, main

console._EVERY = 0.02
main()
"""
_TASK = """
import torch

def model():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(320, 320) for _ in range(8)]
    return torch.nn.Sequential(*layers)

data = [torch.randn(64, 320) for _ in range(16)]
"""


@pytest.mark.parametrize(
    "stage", ["predicting", "encoding, pass", "reading samples", "in sequence"]
)
def test_compressing_with_data_is_ended_in_every_stage(stage: str, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(_TASK)
    scope: dict[str, Any] = {}
    exec(_TASK, scope)
    torch.save(scope["model"]().state_dict(), tmp_path / "w.pt")
    command = [sys.executable, "-c", _BUSY, "compress", "w.pt", "--size", "200kB"]
    command += ["--model", "task:model", "--data", "task:data"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        while stage not in (line := process.stderr.readline()):
            assert line, "it ended before"
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        status = process.wait(10)
    finally:
        process.kill()
    process.stderr.close()
    assert status == 130
    assert [line for line in rest.splitlines() if not line.startswith("dither: ")] == [
        "interrupted"
    ]
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left - {"w.dither.journal"} == {"task.py", "w.pt"}  # after 5 s there is a journal
