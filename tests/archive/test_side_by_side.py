"""Tensors that are decoded side by side are the same, in order, within the same memory."""

from collections.abc import Iterator

import pytest
import torch

import dither
from dither import ArchiveError
from dither.archive import limits, reader
from dither.archive.reader import Archive


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def archive() -> Archive:
    draw = torch.Generator().manual_seed(0)
    state = {f"w{i}": torch.randn(40, 50 + i, generator=draw) for i in range(7)}
    return dither.compress(state | {"again": state["w3"]}, "8x")


@pytest.mark.usefixtures("threads")
def test_tensors_are_the_same_in_order(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = archive.state_dict()
    assert archive._side_by_side(archive.entries.values()) == 1  # small: not worth a thread
    monkeypatch.setattr(reader, "_WORTH_THREADS", 0)
    assert archive._side_by_side(archive.entries.values()) == 3
    found = archive.state_dict()
    assert list(found) == list(alone)
    assert all(torch.equal(found[name], alone[name]) for name in alone)
    assert found["again"].data_ptr() == found["w3"].data_ptr()


@pytest.mark.usefixtures("threads")
def test_as_many_as_memory_is_allowed_for(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_WORTH_THREADS", 0)
    entries = archive.entries.values()
    kept = archive.original_nbytes
    beside = sorted(limits.working_nbytes(e) - e.decoded_nbytes for e in entries)
    for count in (1, 2, 3):
        limited = Archive.from_bytes(archive.to_bytes(), kept + sum(beside[-count:]))
        assert limited._side_by_side(limited.entries.values()) == count
        assert len(limited.state_dict()) == len(archive)


@pytest.mark.usefixtures("threads")
def test_the_first_damaged_tensor_is_named(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_WORTH_THREADS", 0)
    data = bytearray(archive.to_bytes())
    for name in ("w2", "w5"):
        part = max(archive.entries[name].parts, key=lambda part: part.length)
        data[part.offset + 5] ^= 1
    with pytest.raises(ArchiveError, match="'w2'"):
        Archive.from_bytes(bytes(data)).state_dict()
