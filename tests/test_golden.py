"""Archives made once by `fixtures/make.py` are read alike for ever, by both decoders."""

import json

import pytest
import torch

from dither import Archive
from dither.core import dtype_name
from fixtures.make import BRANCHES, FOLDER, LIMIT, branches, digests
from packages.python import dither_decode as independent

GOLDEN: dict[str, dict[str, str]] = json.loads((FOLDER / "golden.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_the_library_reads_what_it_always_read(name: str) -> None:
    with Archive.open(FOLDER / f"{name}.dither") as archive:
        tensors = archive.state_dict()
    restored = {
        name: (
            dtype_name(tensor.dtype),
            tuple(tensor.shape),
            tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, tensor in tensors.items()
    }
    assert digests(restored) == GOLDEN[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_independent_decoder_reads_the_same(name: str) -> None:
    data = (FOLDER / f"{name}.dither").read_bytes()
    assert digests(independent.decode(data)) == GOLDEN[name]


def test_the_archives_are_small_and_take_every_branch() -> None:
    archives = {path.stem: path.read_bytes() for path in FOLDER.glob("*.dither")}
    assert archives.keys() == GOLDEN.keys()
    assert sum(map(len, archives.values())) < LIMIT
    assert not BRANCHES.difference(*map(branches, archives.values()))
