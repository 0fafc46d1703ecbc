"""An archive within a file of safetensors is read as it is: in files, in memory, over a network."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

import dither
from dither.archive import WRAPPER_NBYTES, Archive, is_archive, wrapper
from dither.core import ArchiveError
from dither.testing import same_bits


@pytest.fixture
def archive() -> Archive:
    generator = torch.Generator().manual_seed(0)
    return dither.compress({n: torch.randn(64, 64, generator=generator) for n in "ab"}, "8x")


def wrapped(archive: Archive) -> bytes:
    return wrapper(archive.nbytes) + archive.to_bytes()


def check(found: Archive, archive: Archive) -> None:
    assert found.nbytes == archive.nbytes
    assert found.to_bytes() == archive.to_bytes()
    assert all(same_bits(found[name], archive[name]) for name in archive)


def test_it_is_a_file_of_safetensors(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(wrapped(archive))
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["dither"]
        assert file.metadata() == {"format": "pt"}
        assert bytes(file.get_tensor("dither").tolist()) == archive.to_bytes()
    assert len(wrapper(1)) == len(wrapper(1 << 50)) == WRAPPER_NBYTES


def test_it_is_read_from_a_file_and_from_memory(archive: Archive, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(wrapped(archive))
    assert is_archive(path)
    assert dither.verify(path) == []
    check(Archive.from_bytes(wrapped(archive)), archive)
    with Archive.open(path) as found:
        check(found, archive)
        for other in (copy.copy(found), pickle.loads(pickle.dumps(found))):
            with other:
                check(other, archive)
        found.save(tmp_path / "plain.dither")
    assert (tmp_path / "plain.dither").read_bytes() == archive.to_bytes()


def test_it_is_read_behind_a_url(archive: Archive) -> None:
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("/m.safetensors", wrapped(archive))
    with dither.open("memory://m.safetensors") as found:
        check(found, archive)


@pytest.mark.parametrize("place", [0, 9, WRAPPER_NBYTES - 1, WRAPPER_NBYTES, -1, 200])
def test_a_damaged_one_is_refused_and_named(archive: Archive, place: int, tmp_path: Path) -> None:
    data = bytearray(wrapped(archive))
    data[place] ^= 1
    path = tmp_path / "m.safetensors"
    path.write_bytes(bytes(data))
    with pytest.raises(ArchiveError):
        dither.load(path)
    path.write_bytes(wrapped(archive)[:-5])
    with pytest.raises(ArchiveError):
        dither.load(path)


def test_other_files_of_safetensors_are_none(archive: Archive, tmp_path: Path) -> None:
    values = torch.tensor(list(archive.to_bytes()), dtype=torch.uint8)
    path = tmp_path / "m.safetensors"
    for tensors in ({"dither": values, "w": torch.ones(2)}, {"w": torch.ones(32)}):
        path.write_bytes(save(tensors))
        assert not is_archive(path)
        assert set(load(path.read_bytes())) == set(tensors)
        assert set(dither.compress(path, "9kB")) == set(tensors)
    header = json.loads(wrapper(7)[8:])
    assert header["dither"]["shape"] == [7]
