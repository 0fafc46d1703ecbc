"""Names from files, and streams and disks that fail, at the command line: one message each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

import dither
from dither.archive import pack, write
from dither.cli import app
from dither.cli.console import Printer
from dither.formats import Raw

HOSTILE = "a\nforged  9x9  float32\x1b[2J\u202e\u00fc\ud800"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def dither_(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def process(
    *arguments: str, before: str = "", shell: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, after some code and behind a shell's redirection."""
    code = f"{before}\nfrom dither.cli import main\nmain()"
    command = [sys.executable, "-c", code, *arguments]
    if shell:
        command = ["sh", "-c", f'"$@" {shell}', "sh", *command]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, **environment},
    )


def archive_of(*names: str) -> Path:
    write("a.dither", {name: Raw().encode(torch.arange(3.0)) for name in names}, {"tied": names[0]})
    return Path("a.dither")


# --- what is shown -------------------------------------------------------------------------------


def test_names_forge_no_lines() -> None:
    archive_of(HOSTILE)
    plain = dither_("inspect", str(archive_of("a"))).stdout.count("\n")
    text = dither_("inspect", str(archive_of(HOSTILE))).stdout
    assert text.count("\n") == plain
    assert "a\\nforged" in text
    with dither.open("a.dither") as archive:
        shown = str(archive).split("\n")
    assert len(shown) == 5
    assert all(line.isprintable() for line in shown)


def test_metadata_forges_no_lines() -> None:
    write("a.dither", {}, metadata={"note\n": "b\n1 byte for 2 bytes\x1b[0m"})
    text = dither_("inspect", "a.dither").stdout
    assert "note\\n: b\\n1 byte" in text
    assert "\x1b" not in text


def test_names_in_errors_forge_no_lines() -> None:
    with pytest.raises(dither.CheckpointError) as caught:
        dither.load_into(torch.nn.Linear(1, 1), pack({"a\nb": Raw().encode(torch.zeros(1))}))
    assert "a\nb" not in str(caught.value)
    assert "a\\nb" in str(caught.value)
    Path("x\ny").mkdir()
    result = dither_("compress", "x\ny", "--size", "9kB")
    assert result.exit_code == 2
    assert "x\ny" not in result.output


def test_progress_shows_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer(as_json=False, quiet=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORCE_COLOR", "1")
        patch.setenv("TTY_COMPATIBLE", "1")
        patch.setattr("dither.cli.console._PATIENCE", 0.0)
        with printer.progress("reading [/x]") as advance:
            advance("decoding [bold]w[/italic]", 0.5)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_shows_any_name(encoding: str) -> None:
    archive_of("caf\u00e9 \u4e2d", HOSTILE)
    for arguments in (["inspect", "a.dither"], ["verify", "caf\u00e9"]):
        done = process(*arguments, PYTHONIOENCODING=encoding)
        assert "Traceback" not in done.stderr
        assert done.returncode == (0 if arguments[0] == "inspect" else 2)


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
@pytest.mark.parametrize(
    ("shell", "status"),
    [(">&- 2>&-", 0), (">&-", 0), (">/dev/full", 2), ("--json >/dev/full", 2), ("| true", 0)],
)
def test_streams_that_are_closed_or_full(shell: str, status: int) -> None:
    archive_of("w")
    done = process("inspect", "a.dither", shell=shell)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode == status
    if status:
        assert done.stderr == "dither: No space left on device\n"


def test_memory_that_torch_cannot_get_is_said_in_one_line() -> None:
    before = (
        "import dither.cli.work as w\nimport torch\n"
        "def fail(*_): torch.empty(1 << 50)\nw.find_faults = fail"
    )
    archive_of("w")
    done = process("verify", "a.dither", before=before)
    assert done.returncode == 2
    assert done.stderr.startswith("dither: not enough memory.")
    assert "Traceback" not in done.stderr


def test_metadata_that_is_nested_deeply_is_said_in_one_line() -> None:
    deep: list[object] = []
    for _ in range(700):
        deep = [deep]
    write("a.dither", {}, metadata={"deep": deep})
    for flags in ([], ["--json"]):
        done = process("inspect", "a.dither", *flags)
        assert "Traceback" not in done.stderr
        assert done.returncode in (0, 2)


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["file", "allow_pickle", "a/b", "x.npy", "", "caf\u00e9"])
def test_npz_takes_any_harmless_name(name: str) -> None:
    archive_of(name)
    assert dither_("decompress", "a.dither", "-o", "a.npz").exit_code == 0
    with np.load("a.npz") as arrays:
        assert set(arrays.files) == {name, "tied"}
        assert arrays[name].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "name", ["../../zip", "/etc/zip", "a/../b", "a\\..\\b", "a\nb", "a\0b", "\ud800", "a//b"]
)
def test_npz_holds_no_path_out_of_a_folder(name: str) -> None:
    archive_of(name)
    result = dither_("decompress", "a.dither", "-o", "a.npz")
    assert result.exit_code == 2
    assert "write a .pt file" in result.output
    assert not Path("a.npz").exists()


def test_safetensors_hold_no_name_that_nobody_can_read() -> None:
    archive_of("\ud800")
    result = dither_("decompress", "a.dither", "-o", "a.safetensors")
    assert result.exit_code == 2
    assert "no Unicode text" in result.output
    archive_of("a\n\x1b")
    assert dither_("decompress", "a.dither", "-o", "a.safetensors").exit_code == 0
    assert set(load_file("a.safetensors")) == {"a\n\x1b"}


def test_pt_takes_any_name() -> None:
    archive_of(HOSTILE)
    assert dither_("decompress", "a.dither", "-o", "a.pt").exit_code == 0
    state: dict[str, Tensor] = torch.load("a.pt", weights_only=True)
    assert set(state) == {HOSTILE, "tied"}


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz"])
def test_a_disk_that_is_full_is_said(suffix: str) -> None:
    write("a.dither", {f"w{i}": Raw().encode(torch.zeros(50_000)) for i in range(3)})
    before = (
        "import atexit, resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "limit = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))\n"
        # What is written at the end, as coverage does, has room again.
        "atexit.register(resource.setrlimit, resource.RLIMIT_FSIZE, limit)"
    )
    done = process("decompress", "a.dither", "-o", f"b{suffix}", before=before)
    assert done.stderr == "dither: File too large\n"
    assert done.returncode == 2
    assert [path.name for path in Path().iterdir()] == ["a.dither"]


def test_names_of_outputs_may_be_long_and_their_folders_new() -> None:
    archive_of("w")
    for output in ("n" * 240 + ".pt", "new/er/a.safetensors", "new/b.npz"):
        assert dither_("decompress", "a.dither", "-o", output).exit_code == 0
        assert Path(output).is_file()
    save_file({"w": torch.zeros(300)}, "w.safetensors")
    assert dither_("compress", "w.safetensors", "--size", "1kB", "-o", "c/d.dither").exit_code == 0
    assert dither_("report", "c/d.dither", "-o", "e/f.html").exit_code == 0
    result = dither_("decompress", "a.dither", "-o", "a.dither/b.pt")
    assert result.exit_code == 2
    assert "which is no folder" in result.output


def test_what_is_left_out_is_said_in_one_line() -> None:
    torch.save({"w": torch.zeros(300), "a\nb._extra_state": {"x": 1}}, "w.pt")
    done = process("compress", "w.pt", "--size", "1kB")
    assert done.returncode == 0
    assert done.stderr.startswith("dither: left out, because it is no tensor: a\\nb._extra_state;")
    assert done.stderr.count("\n") == 1
