"""The decoders in `packages` read what the library reads, and refuse what it refuses."""

import ast
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import dither
from benchmarks.bad_files import Cases
from benchmarks.decoder_size import DECODER, minified
from benchmarks.decoding_memory import vast_cases
from benchmarks.lines import code_lines
from benchmarks.small_decoders import by_python, compare, run
from dither import Archive
from dither.archive import pack
from dither.core import DTYPES
from dither.encoders.gptq import GPTQ
from dither.formats import Raw
from fixtures.make import FOLDER
from packages.python import dither_decode

FILES = sorted(FOLDER.glob("*.dither"))


def test_mutated_files_have_one_verdict() -> None:
    outcomes, differences = run(Cases(seed=1), range(300))
    assert differences == []
    assert outcomes["python: read"] > 30
    assert outcomes["python: refused"] > 100


def test_a_difference_is_found() -> None:
    cases = [(path.name, path.read_bytes()) for path in FILES]
    readers = {
        "library": lambda files: map(by_python, files),
        "other": lambda files: ("refused" for _ in files),
    }
    assert len(compare(cases, readers)[1]) == len(FILES)


def test_one_file_has_at_most_600_lines_of_code() -> None:
    assert code_lines(DECODER.read_text(encoding="utf-8")) <= 600


def test_one_file_needs_numpy_and_nothing_else() -> None:
    tree = ast.parse(DECODER.read_text(encoding="utf-8"))
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    modules = {str(n.module) if isinstance(n, ast.ImportFrom) else n.names[0].name for n in names}
    assert {m.partition(".")[0] for m in modules} <= {*sys.stdlib_module_names, "numpy"}


def test_one_file_gives_arrays_of_every_type() -> None:
    tensors = {
        name: torch.arange(-4, 60).abs().fmod(2 if name == "bool" else 16).to(dtype).reshape(8, 8)
        for name, dtype in DTYPES.items()
    }
    archive = dither_decode.Archive(
        pack({name: Raw().encode(tensor) for name, tensor in tensors.items()}).to_bytes()
    )
    assert list(archive) == list(tensors)
    for name, tensor in tensors.items():
        has_none = name == "bfloat16" or name.startswith("float8")
        expected = (tensor.float() if has_none else tensor).numpy()
        assert archive[name].dtype == expected.dtype
        assert np.array_equal(archive[name], expected)


def test_one_file_is_a_command(tmp_path: Path) -> None:
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    archive = pack({"a weight": GPTQ(0.2).encode(weight)})
    archive.save(tmp_path / "a.dither")
    small = tmp_path / "small.py"
    small.write_text(minified(DECODER.read_text(encoding="utf-8")), encoding="utf-8")
    command = [sys.executable, "-I", str(small), "a.dither", "a.npz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "40x30" in done.stdout
    with np.load(tmp_path / "a.npz") as arrays:
        assert np.array_equal(arrays["a weight"], archive["a weight"].numpy())
    (tmp_path / "a.dither").write_bytes(archive.to_bytes()[:-1])
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cut off" in done.stderr


@pytest.mark.parametrize("count", [3_000, 70_000])
def test_streams_of_one_lane_and_of_many(count: int) -> None:
    weight = torch.randn(count, generator=torch.Generator().manual_seed(count))
    data = pack({"w": GPTQ(0.3).encode(weight)}).to_bytes()
    archive = dither_decode.Archive(data)
    part = archive.tensors["w"].parts["levels"]
    reader = dither_decode.Reader(part["payload"])
    head = dither_decode.read_head(reader, part["shape"], part["holds"])
    assert head.lanes == 1 if count < 10_000 else head.lanes >= 64
    assert np.array_equal(archive["w"], Archive.from_bytes(data)["w"].numpy())


@pytest.mark.parametrize("name", ["trellis float8", "codebook", "factors vector", "raw half"])
def test_decoding_takes_no_more_memory_than_is_counted(name: str) -> None:
    archive = dither_decode.Archive(vast_cases(1500)[name]())
    tensor = archive.tensors["t"]
    counts = [math.prod(part["shape"]) for part in tensor.parts.values()]
    tracemalloc.start()
    try:
        archive.stored("t")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 16 * (math.prod(tensor.shape) + sum(counts)) + (8 << 20)


def test_differences_to_a_base_are_refused_and_called_so() -> None:
    base = {"w": torch.zeros(64)}
    data = dither.compress({"w": torch.linspace(-1e-3, 1e-3, 64)}, 400, base=base).to_bytes()
    with pytest.raises(dither_decode.DecodeError, match="differences to a base"):
        dither_decode.Archive(data)


def test_what_takes_too_much_is_refused_before_it_is_taken() -> None:
    data = pack({"w": Raw().encode(torch.zeros(1000))}).to_bytes()
    assert dither_decode.Archive(data, 32_000)["w"].shape == (1000,)
    with pytest.raises(dither_decode.LimitError, match="max_nbytes=31999"):
        dither_decode.Archive(data, 31_999)["w"]
