"""The command line: every command, its exit status, its JSON and its errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import dither
from dither import progress
from dither.archive import Archive, content_hash, load, write
from dither.checkpoint import read_checkpoint
from dither.cli import app, console
from dither.cli.compare import compare
from dither.cli.console import Printer, user_errors
from dither.core import ArchiveError, BudgetError
from dither.formats import Affine, Raw
from dither.model import collect

TYPES = ("float32", "float64", "bfloat16", "float16", "int64", "uint16", "bool", "complex64")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def example() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.weight": torch.randn(96, 64, generator=generator),
        "layer.bias": torch.randn(96, generator=generator),
        "steps": torch.tensor(7),
    }


def dither_(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def good(*arguments: str) -> dict[str, Any]:
    result = dither_(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def by_name(document: dict[str, Any]) -> dict[str, Any]:
    return {tensor["name"]: tensor for tensor in document["tensors"]}


def refused(*arguments: str) -> str:
    """The message of a command that refuses its input: one message, nothing on stdout."""
    result = dither_(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture
def source() -> Path:
    save_file(example(), "model.safetensors")
    return Path("model.safetensors")


@pytest.fixture
def archive() -> Path:
    state = example()
    tensors = {name: Raw().encode(value) for name, value in state.items()}
    tensors["layer.weight"] = Affine(4).encode(state["layer.weight"])
    write("a.dither", tensors, {"tied": "layer.weight"}, {"made by": "a test"})
    return Path("a.dither")


# --- help and version ----------------------------------------------------------------------------


def test_help_and_version_need_no_torch() -> None:
    program = (
        "import sys\nfrom dither.cli import main\ntry:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code\nassert 'torch' not in sys.modules"
    )
    for option, text in (("--help", "compress"), ("--version", dither.__version__)):
        done = subprocess.run(
            [sys.executable, "-c", program, option], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert text in done.stdout


def test_python_m_dither() -> None:
    command = [sys.executable, "-m", "dither", "compare", "none.pt", "b"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "dither: there is no file or folder 'none.pt'; check the path\n"


def test_progress_shows_what_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(console, "_PATIENCE", 0.05)
    with Printer(as_json=False, quiet=False).progress("reading") as advance:
        time.sleep(0.3)
        advance("encoding", 0.5)
        time.sleep(0.3)
    shown = capsys.readouterr()
    assert "reading" in shown.err
    assert "encoding" in shown.err
    assert shown.out == ""
    for flags in ((True, False), (False, True)):
        with Printer(*flags).progress("reading") as advance:
            time.sleep(0.1)
            advance("encoding", 1.0)
    assert capsys.readouterr().err == ""


def test_progress_gives_a_pipe_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Printer(as_json=False, quiet=False).progress("reading"):
        progress.report("encoding", 0.5, "w")
    assert capsys.readouterr().err == ""  # it took no ten seconds
    monkeypatch.setattr(console, "_EVERY", 0.05)
    with Printer(as_json=False, quiet=False).progress("reading"):
        time.sleep(0.15)
        with progress.part_of("calibrated"):
            progress.report("encoding", 0.5, "odd\nname")
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "dither: reading, 0 % (after 5 s)"
    assert lines[-1] == "dither: calibrated: encoding odd\\nname, 50 % (after 5 s)"
    assert 3 <= len(lines) <= 10
    for flags in ((True, False), (False, True)):
        with Printer(*flags).progress("reading"):
            time.sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            BudgetError("too small", smallest=1234),
            "too small (the smallest possible is 1234 bytes)",
        ),
        (BudgetError("at least 1234 bytes", smallest=1234), "at least 1234 bytes"),
        (ArchiveError("beyond max_nbytes=5"), "(on the command line: --max-size)"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: 9 bytes"), "not enough memory"),
        (PermissionError(13, "Permission denied", "a.dither"), "Permission denied: a.dither"),
    ],
)
def test_errors_of_the_user(
    error: Exception, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as end, user_errors():
        raise error
    assert end.value.exit_code == 2
    assert text in capsys.readouterr().err


def test_errors_of_ours_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), user_errors():
        raise ZeroDivisionError


def test_a_reader_that_stops_early() -> None:
    write("many.dither", {f"tensor {i}": Raw().encode(torch.ones(1)) for i in range(5000)})
    with subprocess.Popen(
        [sys.executable, "-m", "dither", "inspect", "many.dither"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


# --- compress ------------------------------------------------------------------------------------


def test_compress(source: Path) -> None:
    result = good("compress", str(source), "--size", "25%")
    assert result["output"] == "model.dither"
    assert result["nbytes"] == Path("model.dither").stat().st_size <= result["budget"]
    assert result["original_nbytes"] == collect(example()).nbytes == 4 * result["budget"]
    assert result["ratio"] == result["original_nbytes"] / result["nbytes"]
    assert {"name", "shape", "dtype", "format", "nbytes", "bits"} <= set(result["tensors"][0])
    assert {tensor["name"] for tensor in result["tensors"]} == set(example())
    assert set(load("model.dither")) == set(example())


@pytest.mark.parametrize("size", ["6kB", "6 KiB", "6000", "4x"])
def test_sizes(source: Path, size: str) -> None:
    result = good("compress", str(source), "--size", size, "-o", "b.dither")
    assert result["nbytes"] <= result["budget"] <= 6300


def test_bits_for_each_value(source: Path) -> None:
    result = good("compress", str(source), "--bits", "5")
    assert result["nbytes"] <= result["budget"] < 5000


def test_tables_for_people(source: Path) -> None:
    result = dither_("compress", str(source), "--size", "25%")
    assert result.exit_code == 0
    assert "bits/value" in result.stdout
    assert "wrote model.dither" in result.stdout
    assert result.stderr == ""
    quiet = dither_("compress", str(source), "--size", "25%", "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")


def kinds(result: dict[str, Any]) -> dict[str, list[Any]]:
    return {t["name"]: [t["shape"], t["dtype"], t["format"]] for t in result["tensors"]}


def test_compress_every_kind_of_source(source: Path) -> None:
    state = example()
    torch.save({"model": state, "ema": state}, "both.pt")
    np.savez("a.npz", allow_pickle=False, **{n: v.numpy() for n, v in state.items()})
    folder = Path("folder")
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    expected = good("compress", str(source), "--size", "25%")
    for arguments in (["both.pt", "--key", "ema"], ["a.npz"], ["folder"]):
        found = good("compress", *arguments, "--size", "25%")
        assert kinds(found) == kinds(expected)  # sizes may follow the order of the tensors
        assert found["nbytes"] <= expected["budget"]
        assert Path(found["output"]).exists()
    again = good("compress", "model.dither", "--size", "12%", "-o", "smaller.dither")
    assert again["nbytes"] < expected["nbytes"]
    assert "several state dicts: 'model', 'ema'" in refused("compress", "both.pt", "--size", "1kB")


def test_ties_survive(tmp_path: Path) -> None:
    embedding, head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
    head.weight = embedding.weight
    torch.save(nn.Sequential(embedding, head).state_dict(), "tied.bin")
    result = good("compress", "tied.bin", "--size", "40%")
    assert result["aliases"] == {"1.weight": "0.weight"}
    assert result["original_nbytes"] == 3200
    for suffix in ("safetensors", "pt"):
        good("decompress", "tied.dither", "-o", f"b.{suffix}")
        state = read_checkpoint(f"b.{suffix}")
        assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr()
    again = good("compress", "tied.dither", "--size", "30%", "-o", "again.dither")
    assert again["aliases"] == {"1.weight": "0.weight"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--size", "9 bananas"], "9 bananas"),
        (["--size", "-5"], "-5"),
        (["--size", "12"], "bytes is impossible"),
        ([], "--size or --bits, not neither"),
        (["--size", "9kB", "--bits", "3"], "--size or --bits, not both"),
        (["--bits", "-1"], "from 0 to 64, not -1"),
        (["--bits", "nan"], "from 0 to 64, not nan"),
        (["--size", "9kB", "-o", "other.txt/a.dither"], "other.txt', which is no folder"),
        (["--size", "9kB", "-o", "."], "is a folder"),
        (["--size", "9kB", "-o", "model.safetensors"], "is the source itself"),
        (["--size", "9kB", "-o", "other.txt"], "exists and is no archive"),
        (["--size", "9kB", "-o", "/dev/null"], "no ordinary file"),
        (["--size", "9kB", "--key", "model"], "for PyTorch files"),
    ],
)
def test_compress_refuses(source: Path, arguments: list[str], text: str) -> None:
    Path("other.txt").write_text("precious")
    before = source.read_bytes()
    assert text in refused("compress", str(source), *arguments)
    assert source.read_bytes() == before
    assert Path("other.txt").read_text() == "precious"
    assert sorted(path.name for path in Path().iterdir()) == ["model.safetensors", "other.txt"]


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    Path("bad.pt").write_bytes(b"garbage")
    Path("bad.dither").write_bytes(b"garbage")
    assert "no file or folder" in refused("compress", "none.pt", "--size", "9kB")
    assert "none of model.safetensors" in refused("compress", ".", "--size", "9kB")
    assert "bad.pt" in refused("compress", "bad.pt", "--size", "9kB", "-o", "b")
    assert "not a .dither archive" in refused("compress", "bad.dither", "--size", "9kB", "-o", "b")


def test_a_full_disk_is_one_message(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "model.dither")

    monkeypatch.setattr(os, "fsync", full)
    assert refused("compress", str(source), "--size", "9kB") == (
        "dither: No space left on device: model.dither\n"
    )
    assert not Path("model.dither").exists()


def test_interrupting(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "fsync", interrupt)
    result = dither_("compress", str(source), "--size", "9kB")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert [path.name for path in Path().iterdir()] == ["model.safetensors"]


# --- inspect, verify, decompress -----------------------------------------------------------------


def test_inspect(archive: Path) -> None:
    result = good("inspect", str(archive))
    assert result["nbytes"] == archive.stat().st_size
    assert result["budget"] is None
    assert result["aliases"] == {"tied": "layer.weight"}
    assert result["metadata"] == {"made by": "a test"}
    weight = next(t for t in result["tensors"] if t["name"] == "layer.weight")
    assert (weight["shape"], weight["dtype"], weight["format"]) == ([96, 64], "float32", "affine")
    with Archive.open(archive) as opened:
        assert [t["bits"] for t in result["tensors"]] == [
            opened.encoded(t["name"]).bits for t in result["tensors"]
        ]
    text = dither_("inspect", str(archive)).stdout
    assert "96x64" in text
    assert "= layer.weight" in text
    assert "made by: a test" in text


def test_a_base_from_compress_to_compare(source: Path, tmp_path: Path) -> None:
    base, fine = load_file(source), tmp_path / "fine.safetensors"
    fine_values = {**base, "layer.weight": base["layer.weight"] + 1e-3 * torch.randn(96, 64)}
    save_file(fine_values, fine)
    given = ("--base", str(source))
    made = good("compress", str(fine), "--size", "2kB", "-o", "small.dither", *given)
    assert made["nbytes"] <= 2000
    rests = {name: tensor["on_base"] for name, tensor in by_name(made).items()}
    assert rests == {"layer.weight": True, "layer.bias": True, "steps": True}
    shown = good("inspect", "small.dither")
    assert shown["base"] == content_hash(base)
    assert content_hash(base) in dither_("inspect", "small.dither").stdout
    assert good("verify", "small.dither", *given)["good"]
    assert good("decompress", "small.dither", "-o", "back.safetensors", *given)["tensors"] == 3
    found = good("compare", str(fine), "small.dither", "--min-sqnr", "30", *given)
    assert found["same_names"]
    assert torch.equal(load_file("back.safetensors")["layer.bias"], base["layer.bias"])
    assert good("report", "small.dither", "-o", "a.html", *given)["tensors"] == 3
    for command in (["decompress", "-o", "b.pt"], ["compare", "small.dither"], ["report"]):
        result = dither_(command[0], "small.dither", *command[1:])
        assert result.exit_code == 2
        assert content_hash(base) in result.stderr
    other = dither_("decompress", "small.dither", "-o", "b.pt", "--base", str(fine))
    assert other.exit_code == 2
    assert content_hash(base) in other.stderr
    assert content_hash(fine_values) in other.stderr
    assert not Path("b.pt").exists()


def test_names_do_nothing_to_the_terminal() -> None:
    write("odd.dither", {"\x1b[31m[red]\n\ud800": Raw().encode(torch.ones(3))})
    text = dither_("inspect", "odd.dither").stdout
    assert "\x1b" not in text
    assert r"\x1b[31m[red]" in text
    assert good("inspect", "odd.dither")["tensors"][0]["name"] == "\x1b[31m[red]\n\ud800"


def test_verify(archive: Path) -> None:
    assert good("verify", str(archive)) == {"file": "a.dither", "good": True, "faults": []}
    assert dither_("verify", str(archive)).stdout == "a.dither: good\n"
    data = bytearray(archive.read_bytes())
    data[100] ^= 1
    archive.write_bytes(data)
    result = dither_("verify", str(archive), "--json")
    assert result.exit_code == 1
    assert "layer.weight" in json.loads(result.stdout)["faults"][0]
    assert "fault: tensor 'layer.weight'" in dither_("verify", str(archive)).stdout
    quiet = dither_("verify", str(archive), "--quiet")
    assert (quiet.exit_code, quiet.stdout) == (1, "")


@pytest.mark.parametrize("command", ["inspect", "verify", "decompress"])
def test_files_that_are_missing(command: str) -> None:
    assert refused(command, "none.dither") == "dither: No such file or directory: none.dither\n"
    assert "Is a directory" in refused(command, ".", *(["-o", "b.pt"] * (command == "decompress")))


@pytest.mark.parametrize("command", ["inspect", "decompress"])
def test_files_that_are_damaged(archive: Path, command: str) -> None:
    archive.write_bytes(archive.read_bytes()[:-9])
    assert "damaged" in refused(command, str(archive))
    assert [path.name for path in Path().iterdir()] == ["a.dither"]


def test_memory_is_limited(archive: Path) -> None:
    assert "--max-size" in refused("decompress", str(archive), "--max-size", "1kB")
    assert "--max-size" in refused("decompress", str(archive), "--max-size", "50%")
    assert "--max-size" in refused("compare", str(archive), str(archive), "--max-size", "1kB")
    assert dither_("verify", str(archive), "--max-size", "1kB").exit_code == 1
    assert dither_("verify", str(archive), "--max-size", "1GB").exit_code == 0


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "npz"])
def test_decompress(suffix: str) -> None:
    state = {name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in TYPES}
    state |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    if suffix == "npz":
        del state["bfloat16"]
    write("all.dither", {n: Raw().encode(v) for n, v in state.items()}, {"tied": "float32"})
    result = good("decompress", "all.dither", "-o", f"all.{suffix}")
    assert result["tensors"] == len(state)
    assert result["nbytes"] == Path(f"all.{suffix}").stat().st_size
    read = read_checkpoint(f"all.{suffix}")
    expected = state | {"tied": state["float32"]}
    assert {n: (v.dtype, v.tolist()) for n, v in read.items()} == {
        n: (v.dtype, v.tolist()) for n, v in expected.items()
    }
    if suffix == "safetensors":
        assert set(load_file("all.safetensors")) == set(state)
    good("compare", "all.dither", f"all.{suffix}")


def test_decompress_refuses(archive: Path) -> None:
    write("half.dither", {"w": Raw().encode(torch.ones(2, dtype=torch.bfloat16))})
    write("wide.dither", {"w": Raw().encode(torch.ones(2, dtype=torch.complex128))})
    assert "bfloat16" in refused("decompress", "half.dither", "-o", "b.npz")
    assert "complex128" in refused("decompress", "wide.dither", "-o", "b.safetensors")
    assert "suffix '.onnx'" in refused("decompress", str(archive), "-o", "b.onnx")
    good("decompress", str(archive))
    assert "exists, perhaps the file" in refused("decompress", str(archive))
    good("decompress", str(archive), "-o", "a.safetensors")


# --- compare -------------------------------------------------------------------------------------


def test_compare(source: Path) -> None:
    equal = good("compare", str(source), str(source), "--min-sqnr", "1000")
    assert equal["same_names"]
    assert equal["total"] == {"tensors": 3, "equal": 3, "sqnr_db": None, "max_abs_error": 0.0}
    state = example()
    state["layer.weight"] = state["layer.weight"] * 1.1
    torch.save(state, "b.pt")
    found = good("compare", str(source), "b.pt")
    weight = next(t for t in found["tensors"] if t["name"] == "layer.weight")
    assert weight["sqnr_db"] == pytest.approx(20, abs=1e-4)
    largest = float(0.1 * example()["layer.weight"].abs().max())
    assert weight["max_abs_error"] == pytest.approx(largest, rel=1e-4)
    text = dither_("compare", str(source), "b.pt").stdout
    assert "20.00" in text
    assert "2 of 3 equal" in text
    assert dither_("compare", str(source), "b.pt", "--min-sqnr", "19").exit_code == 0
    below = dither_("compare", str(source), "b.pt", "--min-sqnr", "21")
    assert below.exit_code == 1
    assert "below 21 dB: layer.weight" in below.stdout


def test_exact_integers_do_not_drown_the_noise_of_weights(source: Path) -> None:
    state = example() | {"positions": 1000 * torch.arange(200)}
    torch.save(state, "a.pt")
    torch.save(state | {"layer.weight": state["layer.weight"] * 1.1}, "b.pt")
    found = good("compare", "a.pt", "b.pt")
    assert found["total"]["sqnr_db"] == pytest.approx(20, abs=1)


def test_compare_names_and_shapes(source: Path) -> None:
    state = example()
    state["layer.bias"] = state["layer.bias"][:5]
    state["more"] = state.pop("steps")
    torch.save(state, "b.pt")
    result = dither_("compare", str(source), "b.pt", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["only_a"], found["only_b"]) == (["steps"], ["more"])
    assert found["reshaped"] == {"layer.bias": [[96], [5]]}
    text = dither_("compare", str(source), "b.pt").stdout
    assert "only in A: steps" in text
    assert "layer.bias is 96 in A, 5 in B" in text


def test_compare_odd_numbers() -> None:
    inf, nan = torch.inf, torch.nan
    big = torch.tensor([2**53, 2**62])
    a = {
        "alike": torch.tensor([inf, nan, 1.0, -inf]),
        "one nan": torch.tensor([1.0, nan]),
        "infinite": torch.tensor([1.0, inf]),
        "zero": torch.zeros(2),
        "big": big,
        "unsigned": big.to(torch.uint64),
        "flags": torch.tensor([True, False]),
        "eight": torch.ones(2).to(torch.float8_e5m2),
        "complex": torch.tensor([3 + 4j]),
        "empty": torch.zeros(0),
        "types": torch.ones(2),
    }
    b = dict(a)
    b["one nan"] = torch.ones(2)
    b["infinite"] = torch.ones(2)
    b["zero"] = torch.ones(2)
    b["big"] = big + 1
    b["unsigned"] = (big + 1).to(torch.uint64)
    b["complex"] = torch.tensor([3 + 3.5j])
    b["types"] = torch.ones(2, dtype=torch.float16)
    found = {item.name: item for item in compare(a, b).differences}
    equal = {name for name, item in found.items() if item.equal}
    assert equal == {"alike", "flags", "eight", "empty", "types"}
    assert all(found[name].sqnr == inf for name in equal)
    assert all(found[name].sqnr == -inf for name in ("one nan", "infinite", "zero"))
    assert found["complex"].sqnr == pytest.approx(20)
    assert found["complex"].largest == 0.5


def test_plan_predicts_what_compress_does(source: Path) -> None:
    document = good("plan", "model.safetensors", "--sizes", "4x, 8x,20", "--plot", "new/plan.svg")
    assert [row["size"] for row in document["sizes"]] == ["4x", "8x", "20"]
    assert [row["is_reachable"] for row in document["sizes"]] == [True, True, False]
    made = good("compress", "model.safetensors", "--size", "8x")
    assert document["sizes"][1]["nbytes"] == pytest.approx(made["nbytes"], rel=0.03)
    assert Path("new/plan.svg").read_text().count("<svg") == 1
    text = dither_("plan", "model.safetensors")
    assert text.exit_code == 0, text.stderr
    assert "16x" in text.stdout
    assert "kept exactly: steps (int64" in text.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sizes", "4y"], "4y"),
        (["--sizes", ","], "no sizes"),
        (["--plot", "plan.gif"], ".svg, .png, .pdf"),
    ],
)
def test_plan_refuses(source: Path, arguments: list[str], said: str) -> None:
    assert said in refused("plan", str(source), *arguments)


@pytest.mark.parametrize(("size", "is_said"), [("1.2 bits", True), ("1.4 bits", False)])
def test_few_bits_without_data_suggest_samples(source: Path, size: str, *, is_said: bool) -> None:
    save_file({"w": torch.randn(128, 256, generator=torch.Generator().manual_seed(0))}, source)
    result = CliRunner().invoke(app, ["compress", str(source), "--size", size])
    assert result.exit_code == 0, result.output
    assert ("--data" in result.output) == is_said
