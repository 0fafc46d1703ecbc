"""Files of weights as memory: every type, any size, given back on request."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dither.checkpoint import read_checkpoint
from dither.checkpoint.mapped import Pages
from dither.core import DTYPES

SHARED = [name for name in DTYPES if name != "complex128"]


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (1,)], ids=str)
def test_every_type_and_shape_is_read_as_it_was_written(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    noise = torch.Generator().manual_seed(0)
    value = torch.randint(0, 2, shape, generator=noise).double().to(DTYPES[name])
    save_file({"odd": torch.ones(3, dtype=torch.int8), "value": value}, tmp_path / "w.safetensors")
    found = read_checkpoint(tmp_path / "w.safetensors")["value"]
    assert (found.dtype, found.shape) == (value.dtype, value.shape)
    assert torch.equal(found.to(torch.complex128), value.to(torch.complex128))


def test_tensors_between_whole_numbers_are_read(tmp_path: Path) -> None:
    wanted = torch.tensor([1.5, -2.0])
    entries = {
        "first": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]},
        "second": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    header = json.dumps(entries).encode()
    data = b"\x07" + bytes(wanted.view(torch.uint8).tolist())
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    found = read_checkpoint(path)
    assert int(found["first"]) == 7
    assert torch.equal(found["second"], wanted)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems set memory aside")
def test_a_file_larger_than_memory_is_read_where_it_is_touched(tmp_path: Path) -> None:
    size = 1 << 42
    entry = {"w": {"dtype": "I8", "shape": [size], "data_offsets": [0, size]}}
    header = json.dumps(entry).encode()
    path = tmp_path / "w.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + size)
        except OSError:
            pytest.skip("the file system has no files with holes of this size")
    value = read_checkpoint(path)["w"]
    assert value.shape == (size,)
    assert int(value[-1]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the memory")
def test_memory_that_is_given_back_is_read_again_from_its_files_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"w": torch.full((5000,), 2.0)}, tmp_path / f"{name}.safetensors")
    first, other = (read_checkpoint(tmp_path / f"{name}.safetensors")["w"] for name in "ab")
    mine = torch.zeros(5)
    pages = Pages.of([first, mine])
    for value in (first, other, mine):
        value.fill_(3.0)
    pages.release()  # of the first: then it shows its file
    assert [float(value.unique()) for value in (first, other, mine)] == [2.0, 3.0, 3.0]


def test_files_that_no_tensor_shows_are_not_held(tmp_path: Path) -> None:
    save_file({"w": torch.ones(5)}, tmp_path / "w.safetensors")
    value = read_checkpoint(tmp_path / "w.safetensors")["w"]
    assert len(Pages.of([value]).maps) == 1
    assert Pages.of([torch.ones(5)]).maps == ()
