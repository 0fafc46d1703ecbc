"""Archives and files shared by processes and threads."""

import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import dither
from dither import Archive, ArchiveError
from dither.archive import atomic_write, pack, write
from dither.core import Encoded
from dither.formats import Affine, Raw


def _tensors(seed: int = 0) -> dict[str, Encoded]:
    noise = torch.Generator().manual_seed(seed)
    return {f"w{i}": Affine(4).encode(torch.randn(20, 30, generator=noise)) for i in range(6)}


def _pickled(archive: Archive) -> Archive:
    again = pickle.loads(pickle.dumps(archive))
    assert isinstance(again, Archive)
    return again


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_forked_and_spawned_readers_of_an_open_archive_find_what_it_holds() -> None:
    command = [sys.executable, "-m", "benchmarks.readers", "--readers", "3", "--reads", "300"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_reading_at_a_place_threads_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pread")
    write(tmp_path / "a.dither", _tensors())
    expected = dither.load(tmp_path / "a.dither")
    wrong: list[str] = []
    with Archive.open(tmp_path / "a.dither") as archive:

        def read() -> None:
            wrong.extend(n for n in expected if not torch.equal(archive[n], expected[n]))

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_read_that_comes_in_pieces_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.dither", _tensors())
    whole, pread = dither.load(tmp_path / "a.dither"), os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, 7), at))
    found = dither.load(tmp_path / "a.dither")
    assert all(torch.equal(found[name], value) for name, value in whole.items())


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, _pickled])
def test_a_copy_of_an_open_archive_reads_for_itself(
    again: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write("a.dither", _tensors(), metadata={"epochs": 3})
    assert callable(again)
    archive = Archive.open("a.dither", max_nbytes=1 << 20)
    monkeypatch.chdir(tmp_path.parent)
    with again(archive) as copied:
        expected = archive.state_dict()
        archive.close()
        assert copied.max_nbytes == 1 << 20
        assert copied.metadata == {"epochs": 3}
        assert all(torch.equal(copied[name], value) for name, value in expected.items())
    with pytest.raises(ValueError, match="closed"):
        again(archive)


def test_a_pickle_of_an_open_archive_holds_its_path_and_not_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.dither"
    write(path, {"w": Raw().encode(torch.randn(1000))})
    with Archive.open(path) as archive:
        pickled = pickle.dumps(archive)
    assert len(pickled) < 1000 < archive.nbytes
    write(path, _tensors(1))
    with pytest.raises(ArchiveError, match="no longer the archive"):
        pickle.loads(pickled)


def test_an_archive_in_memory_is_pickled_whole() -> None:
    archive = pack(_tensors())
    again = pickle.loads(pickle.dumps(archive))
    assert again.to_bytes() == archive.to_bytes()


def test_saving_asks_for_no_mask_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> int:
        raise AssertionError("umask is the whole process's")

    before = os.umask(0o027)
    monkeypatch.setattr(os, "umask", refuse)
    try:
        with atomic_write(tmp_path / "new") as file:
            assert (os.fstat(file.fileno()).st_mode & 0o777) == 0o640
            file.write(b"new")
        secret = tmp_path / "secret"
        secret.touch(mode=0o600)
        with atomic_write(secret) as file:
            assert (os.fstat(file.fileno()).st_mode & 0o777) == 0o600
        shared = tmp_path / "shared"
        shared.touch()
        shared.chmod(0o666)
        with atomic_write(shared):
            pass
    finally:
        monkeypatch.undo()
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("new", "secret", "shared")]
    assert modes == [0o640, 0o600, 0o666]


def test_a_long_name_is_written(tmp_path: Path) -> None:
    for name in ("n" * 240, "\u00fc" * 120):
        with atomic_write(tmp_path / name) as file:
            file.write(b"all")
        assert (tmp_path / name).read_bytes() == b"all"


def test_the_order_of_metadata_changes_no_byte() -> None:
    one = pack({}, metadata={"a": 1, "b": {"c": 2, "d": [3]}})
    other = pack({}, metadata={"b": {"d": [3], "c": 2}, "a": 1})
    assert one.to_bytes() == other.to_bytes()


_SLOW_DISK = """
import os, sys, time
os.fsync = lambda _: (print("writing", flush=True), time.sleep(60))
from dither.cli import main
main()
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_command_that_is_ended_leaves_no_temporary_file(
    number: signal.Signals, tmp_path: Path
) -> None:
    torch.save({"w": torch.zeros(100)}, tmp_path / "w.pt")
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW_DISK, "compress", "w.pt", "--size", "1kB"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(number)
    process.stdout.close()
    assert process.wait(20) == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]
