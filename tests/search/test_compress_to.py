"""A file as the end: the bytes are the same as in memory, also after any interruption."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from dither.archive import Archive
from dither.checkpoint import read_checkpoint
from dither.core import BudgetError, SpecError
from dither.data import Data
from dither.search import coder, compress, compress_to, journal, layer_order
from dither.search.ladder import Ladder
from dither.search.ledger import Ledger
from dither.search.source import Source, weights_in

pytestmark = pytest.mark.filterwarnings("error")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def table(rows: int, columns: int) -> Tensor:
    """A token table whose columns have much in common."""
    return normal(rows, 3, seed=1) @ normal(3, columns, seed=2) + 0.1 * normal(rows, columns)


def plain(folder: Path) -> Path:
    save_file({"w": normal(60, 40), "b": normal(60)}, folder / "model.safetensors")
    return folder / "model.safetensors"


def shards(folder: Path) -> Path:
    """Of several types in several files, what is not rounded among them."""
    parts: list[dict[str, Tensor]] = [
        {"emb.weight": table(2100, 12), "steps": torch.arange(700)},
        {"a.weight": normal(80, 50).bfloat16(), "a.bias": normal(80).bfloat16()},
        {"c.weight": normal(16, 8, 3, 3).half(), "mask": torch.arange(600) % 3 == 0},
        {"none": torch.empty(0, 4), "bad": normal(300).masked_fill(normal(300) > 2, torch.nan)},
        {"mlp.experts.up": normal(3, 40, 24), "q": torch.randint(-9, 9, (70, 30)).to(torch.int8)},
    ]
    names = [f"model-{i:05}.safetensors" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    placed = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


def tied(folder: Path) -> Path:
    embed, head = nn.Embedding(90, 32), nn.Linear(32, 90, bias=False)
    head.weight = embed.weight = nn.Parameter(normal(90, 32))
    model = nn.Sequential(embed, head)
    save_model(model, str(folder / "model.safetensors"))
    return folder


def in_memory(path: Path) -> Source:
    """The same weights, none of which a file has."""
    found = weights_in(path, "test")
    assert isinstance(found, Mapping)
    memo: dict[int, Tensor] = {}
    return {k: memo.setdefault(v.data_ptr() or id(v), v.clone()) for k, v in found.items()}


def saved(archive: Archive, folder: Path) -> bytes:
    archive.save(folder / "in-memory.dither")
    return (folder / "in-memory.dither").read_bytes()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Journals begin with the first result."""
    monkeypatch.setattr(journal, "PATIENCE", -1.0)


class Killed(BaseException):
    """Ends a job anywhere."""


@pytest.fixture
def interrupted(
    monkeypatch: pytest.MonkeyPatch, at_once: None
) -> Callable[[Path, Source, str], bytes]:
    """Does all of a job but its end; the journal that is left."""

    def run(output: Path, source: Source, size: str) -> bytes:
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "write", _end)
            with pytest.raises(Killed):
                compress_to(output, source, size)
        assert not output.exists()
        return output.with_name(f"{output.name}.journal").read_bytes()

    return run


@pytest.mark.parametrize("make", [plain, shards, tied])
@pytest.mark.parametrize("size", ["3x", "9x"])
@pytest.mark.parametrize("patience", [-1.0, 1e9], ids=["journal", "none"])
def test_the_bytes_are_those_of_the_same_tensors_in_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], Path],
    size: str,
    patience: float,
) -> None:
    source = make(tmp_path)
    wanted = saved(compress(in_memory(source), size, metadata={"of": 1}), tmp_path)
    monkeypatch.setattr(journal, "PATIENCE", patience)
    output = tmp_path / "out.dither"
    with compress_to(output, source, size, metadata={"of": 1}) as archive:
        assert output.read_bytes() == wanted
        assert dict(archive.metadata) == {"of": 1}
        archive.check_total()
        archive.state_dict()
    assert not list(tmp_path.glob("*.journal"))


def test_after_any_interruption_the_same_call_makes_the_same_file(
    tmp_path: Path, interrupted: Callable[[Path, Source, str], bytes]
) -> None:
    source, output = shards(tmp_path), tmp_path / "out.dither"
    wanted = saved(compress(source, "6x"), tmp_path)
    left = interrupted(output, source, "6x")
    path = tmp_path / "out.dither.journal"
    for cut in [20, 90, *range(100, len(left), len(left) // 4), len(left)]:
        path.write_bytes(left[:cut])
        compress_to(output, source, "6x").close()
        assert output.read_bytes() == wanted, f"after {cut} of {len(left)} bytes"
        assert not path.exists()


def test_what_was_done_is_not_done_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interrupted: Callable[[Path, Source, str], bytes],
) -> None:
    source, output = shards(tmp_path), tmp_path / "out.dither"
    interrupted(output, source, "6x")

    monkeypatch.setattr(coder, "code", refuse)
    monkeypatch.setattr(Ladder, "of", refuse)
    monkeypatch.setattr(coder, "facts_of", refuse)
    stages: list[str] = []
    compress_to(output, source, "6x", progress=lambda stage, _: stages.append(stage)).close()
    assert stages[0] == "going on from out.dither.journal"


@pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
def test_what_a_disk_has_lost_is_done_again(
    tmp_path: Path, interrupted: Callable[[Path, Source, str], bytes], place: float
) -> None:
    source, output = shards(tmp_path), tmp_path / "out.dither"
    wanted = saved(compress(source, "6x"), tmp_path)
    left = bytearray(interrupted(output, source, "6x"))
    begin = int(place * len(left))
    left[begin : begin + 600] = bytes(600)
    (tmp_path / "out.dither.journal").write_bytes(left)
    compress_to(output, source, "6x").close()
    assert output.read_bytes() == wanted


def test_a_journal_of_another_size_is_not_used(
    tmp_path: Path, interrupted: Callable[[Path, Source, str], bytes]
) -> None:
    source, output = shards(tmp_path), tmp_path / "out.dither"
    interrupted(output, source, "6x")
    with pytest.warns(UserWarning, match=r"out\.dither\.journal' is of another job"):
        compress_to(output, source, "5x").close()
    assert output.read_bytes() == saved(compress(source, "5x"), tmp_path)


def test_a_journal_of_other_values_is_not_used(
    tmp_path: Path, interrupted: Callable[[Path, Source, str], bytes]
) -> None:
    before, after = ({"w": normal(60, 40, seed=seed), "b": normal(60)} for seed in (0, 1))
    output = tmp_path / "out.dither"
    interrupted(output, before, "6x")
    compress_to(output, after, "6x").close()
    assert output.read_bytes() == saved(compress(after, "6x"), tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")
def test_two_jobs_do_not_write_one_journal(
    tmp_path: Path, interrupted: Callable[[Path, Source, str], bytes]
) -> None:
    import fcntl

    source, output = plain(tmp_path), tmp_path / "out.dither"
    left = interrupted(output, source, "6x")
    path = tmp_path / "out.dither.journal"
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.warns(UserWarning, match="in use by another process"):
            compress_to(output, source, "6x").close()
    assert path.read_bytes() == left
    assert output.read_bytes() == saved(compress(source, "6x"), tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")
@pytest.mark.usefixtures("at_once")
def test_of_two_jobs_that_begin_together_one_keeps_the_journal(tmp_path: Path) -> None:
    first, second = (journal.Journal(tmp_path / "out.journal", {}) for _ in range(2))
    assert first.is_kept()
    first.note(b"k" * 32, 5)
    with pytest.warns(UserWarning, match="in use by another process"):
        assert not second.is_kept()
    second.remove()
    assert first.recall(b"k" * 32) == 5
    first.close()
    third = journal.Journal(tmp_path / "out.journal", {})
    assert third.recall(b"k" * 32) == 5
    third.remove()


@pytest.mark.usefixtures("at_once")
def test_an_impossible_size_leaves_no_journal(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="at least"):
        compress_to(tmp_path / "out.dither", plain(tmp_path), 100)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_short_job_keeps_no_journal(tmp_path: Path) -> None:
    seen: set[str] = set()

    def look(*_: object) -> None:
        seen.update(path.name for path in tmp_path.iterdir())

    compress_to(tmp_path / "out.dither", {"w": normal(60, 40)}, "6x", progress=look).close()
    assert seen == set()


def test_much_that_is_coded_goes_to_the_journal_however_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "ROOM", 1000)
    seen: set[str] = set()

    def look(*_: object) -> None:
        seen.update(path.name for path in tmp_path.iterdir())

    compress_to(tmp_path / "out.dither", shards(tmp_path), "6x", progress=look).close()
    assert "out.dither.journal" in seen


@pytest.mark.usefixtures("at_once")
def test_where_the_output_cannot_be_nothing_is_begun(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        compress_to(tmp_path / "missing" / "out.dither", plain(tmp_path), "6x")
    with pytest.raises(SpecError, match="goes with data="):
        compress_to(tmp_path / "out.dither", plain(tmp_path), "6x", evaluate=lambda _: 0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told otherwise elsewhere")
def test_tensors_of_files_are_in_memory_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # else small ones come four at a time
    noise = torch.Generator().manual_seed(0)
    few = {f"{i}": torch.randint(0, 4, [1 << 19], generator=noise) for i in range(16)}
    save_file({k: v.to(torch.int8) for k, v in few.items()}, tmp_path / "model.safetensors")
    source = tmp_path / "model.safetensors"
    most, whole = 0, source.stat().st_size

    def look(*_: object) -> None:
        nonlocal most
        most = max(most, resident(source))

    compress_to(tmp_path / "out.dither", source, "3x", progress=look).close()
    assert most <= whole / 2
    kept = read_checkpoint(source)
    assert all(int(value.max()) == 3 for value in kept.values())
    assert resident(source) > 0.9 * whole  # else this would see nothing


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    lines = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    found, here = 0, False
    for line in lines:
        if "-" in line.partition(" ")[0]:
            here = line.endswith(str(path))
        elif here and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


@pytest.mark.usefixtures("at_once")
def test_with_data_encodings_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 8))
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed))
    data = Data([normal(64, 16, seed=i) for i in range(3)])
    wanted = compress(model, "6x", data=data)
    output, path = tmp_path / "out.dither", tmp_path / "out.dither.journal"
    with monkeypatch.context() as patch:
        patch.setattr(Archive, "save", _end)
        with pytest.raises(Killed):
            compress_to(output, model, "6x", data=data)
    left = path.read_bytes()
    for cut in (len(left) // 2, len(left)):
        path.write_bytes(left[:cut])
        if cut == len(left):  # what fails here would be another file's end
            monkeypatch.setattr(coder, "code", refuse)
            monkeypatch.setattr(layer_order, "_encode", refuse)
        with compress_to(output, model, "6x", data=data) as archive:
            assert len(archive.trials) == len(wanted.trials)
            assert not [str(trial) for trial in archive.trials if "failed" in str(trial)]
            assert "in sequence" in " ".join(map(str, archive.trials))
        assert output.read_bytes() == saved(wanted, tmp_path)


def _end(*_: object) -> None:
    raise Killed


def refuse(*_: object) -> None:
    raise AssertionError("computed again")
