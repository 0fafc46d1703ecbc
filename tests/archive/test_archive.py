import io
import json
import os
import threading
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dither
from benchmarks.mutations import closed
from dither import Archive, ArchiveError, CheckpointError
from dither.archive import ArchiveWriter, code, pack, packed_nbytes, verify, write
from dither.archive.layout import HEAD, TAIL
from dither.core import DTYPES, Encoded
from dither.encoders.gptq import GPTQ
from dither.formats import Affine, Codebook, Mixed, Product, Raw
from packages.python import dither_decode as independent


def _weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _tensors() -> dict[str, Encoded]:
    return {
        "grid": GPTQ(0.2).encode(_weight(30, 40)),
        "rows": GPTQ(torch.linspace(0.1, 1, 12)).encode(_weight(12, 20)),
        "four": Affine(4, axis=0).encode(_weight(6, 3, 3, 3)),
        "half": Affine(3, group=16).encode(_weight(10, 40).bfloat16()),
        "book": Codebook(16, bucket=64, shift=True).encode(_weight(20, 30)),
        "product": Product(4, 16, dtype=torch.int8).encode(_weight(16, 22)),
        "mixed": Mixed(group=8).encode(_weight(16, 20)),
        "raw": Raw().encode(_weight(31).double()),
        "step": Raw().encode(torch.tensor(3)),
    }


def test_all_formats_come_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = _tensors()
    write(tmp_path / "a.dither", tensors, {"alias": "grid"}, {"epochs": 3})
    with dither.open(tmp_path / "a.dither") as archive:
        assert list(archive) == [*tensors, "alias"]
        assert archive.metadata == {"epochs": 3}
        for name, encoded in tensors.items():
            assert archive.encoded(name).format == encoded.format
            assert archive[name].dtype == encoded.dtype
            assert torch.equal(archive[name], encoded.decode())
        assert torch.equal(archive["alias"], archive["grid"])
    state = dither.load(tmp_path / "a.dither")
    assert state["alias"].data_ptr() == state["grid"].data_ptr()
    assert verify(tmp_path / "a.dither") == []


@given(
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(0, 5), max_size=4),
    st.text(max_size=20),
)
def test_raw_tensors_of_every_type_shape_and_name(kind: str, shape: list[int], name: str) -> None:
    dtype = DTYPES[kind]
    count = 1
    for n in shape:
        count *= n
    data = torch.arange(count * dtype.itemsize, dtype=torch.int64).remainder(251).to(torch.uint8)
    if dtype == torch.bool:
        data = data % 2
    value = data.view(dtype).reshape(shape)
    again = Archive.from_bytes(pack({name: Raw().encode(value)}).to_bytes())[name]
    assert again.dtype == dtype
    assert again.shape == value.shape
    assert again.reshape(-1).view(torch.uint8).tolist() == data.tolist()


def test_a_part_may_be_one_expanded_value() -> None:
    value = torch.tensor(3.5).expand(1)
    assert value.stride() == (0,)
    encoded = Encoded(Raw(), (1,), torch.float32, {}, {"values": value})
    assert pack({"one": encoded})["one"].tolist() == [3.5]


def test_a_tensor_is_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.dither"
    write(path, _tensors())
    data = bytearray(path.read_bytes())
    with Archive.open(path) as archive:
        part = archive.entries["grid"].parts[0]
    data[part.offset + part.length // 2] ^= 1
    path.write_bytes(bytes(data))
    with Archive.open(path) as archive:
        assert torch.equal(archive["rows"], _tensors()["rows"].decode())
        with pytest.raises(ArchiveError, match="tensor 'grid', part 'levels' is damaged"):
            archive["grid"]
    assert verify(path) == ["tensor 'grid', part 'levels' is damaged: its checksum does not match"]


def test_writing_to_a_stream_needs_no_seeking() -> None:
    class Pipe:
        data = b""

        def write(self, data: bytes, /) -> None:
            self.data += data

    pipe = Pipe()
    writer = ArchiveWriter(pipe)
    for name, encoded in _tensors().items():
        writer.add(name, encoded)
    assert writer.finish() == len(pipe.data)
    assert pipe.data == pack(_tensors()).to_bytes()


def test_the_size_is_known_without_writing() -> None:
    coded = {name: code(encoded) for name, encoded in _tensors().items()}
    assert packed_nbytes(coded, {"alias": "grid"}) == pack(coded, {"alias": "grid"}).nbytes


def test_payloads_overhead_is_small() -> None:
    for name, encoded in _tensors().items():
        archive = pack({name: encoded})
        assert archive.nbytes <= encoded.bits / 8 + 300
        assert sum(p.length for p in archive.entries[name].parts) <= encoded.bits / 8 + 8


def test_names_are_taken_once() -> None:
    writer = ArchiveWriter(io.BytesIO())
    writer.add("a", Raw().encode(torch.zeros(3)))
    with pytest.raises(ArchiveError, match="'a' is taken"):
        writer.add("a", Raw().encode(torch.zeros(3)))
    with pytest.raises(ArchiveError, match="no tensor 'b'"):
        writer.alias("c", "b")


def test_memory_is_limited(tmp_path: Path) -> None:
    write(tmp_path / "a.dither", {"zeros": Raw().encode(torch.zeros(1 << 16))})
    with Archive.open(tmp_path / "a.dither", max_nbytes=1 << 16) as archive:
        with pytest.raises(ArchiveError, match="max_nbytes=65536"):
            archive["zeros"]
        with pytest.raises(ArchiveError, match="max_nbytes=65536"):
            archive.state_dict()


def test_an_unknown_name_is_a_key_error() -> None:
    archive = pack(_tensors())
    assert "nothing" not in archive
    with pytest.raises(KeyError, match="no tensor 'nothing'"):
        archive["nothing"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda d: b"", "not a .dither archive"),
        (lambda d: b"PK" + d[2:], "not a .dither archive"),
        (lambda d: d[:8] + b"\x02\x00" + d[10:], "archive version 2"),
        (lambda d: d[:10] + b"\x04\x00" + d[12:], "features 0x0004"),
        (lambda d: d[:-1], "end mark is missing"),
        (lambda d: d[: HEAD.size + 3], "cut off"),
        (lambda d: d[: -TAIL.size] + b"\xff" * 4 + d[-TAIL.size + 4 :], "does not fit"),
        (lambda d: d[: -TAIL.size - 2] + b"ab" + d[-TAIL.size :], "index is damaged"),
    ],
)
def test_damage_is_named(change: object, error: str) -> None:
    data = pack(_tensors()).to_bytes()
    assert callable(change)
    with pytest.raises(ArchiveError, match=error):
        Archive.from_bytes(change(data))


def _edited(data: bytes, old: bytes, new: bytes) -> bytes:
    """An archive whose index says something else, its checksum made good."""
    packed = TAIL.unpack(data[-TAIL.size :])[0]
    text = zlib.decompress(data[-TAIL.size - packed : -TAIL.size])
    assert text.count(old) == 1
    return closed(data[: -TAIL.size - packed], text.replace(old, new))


@pytest.mark.parametrize(
    "text", ["01 02ab", " 0102ab", "0102ab\n", "0102a", "0102ag", "+102ab", "0102a\u0662"]
)
def test_payloads_in_the_index_are_hexadecimal_digits_only(text: str) -> None:
    data = pack({"t": Raw().encode(torch.tensor([1, 2, 0xAB], dtype=torch.uint8))}).to_bytes()
    assert Archive.from_bytes(_edited(data, b'"0102ab"', b'"0102AB"'))["t"].tolist() == [1, 2, 171]
    damaged = _edited(data, b'"0102ab"', json.dumps(text).encode())
    with pytest.raises(ArchiveError, match=r"tensor 't', part 'values' is damaged.*hexadecimal"):
        Archive.from_bytes(damaged)
    with pytest.raises(ValueError, match="hexadecimal"):
        independent.decode(damaged)


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.dither"
    path.write_bytes(b"precious")
    archive = pack(_tensors())

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        archive.save(path)
    assert path.read_bytes() == b"precious"
    assert [p.name for p in tmp_path.iterdir()] == ["a.dither"]
    monkeypatch.undo()
    archive.save(path)
    assert path.read_bytes() == archive.to_bytes()


def test_reading_from_several_threads(tmp_path: Path) -> None:
    tensors = {f"t{i}": GPTQ(0.1).encode(_weight(50, 50, seed=i)) for i in range(8)}
    write(tmp_path / "a.dither", tensors)
    wrong: list[str] = []

    def read(archive: Archive) -> None:
        wrong.extend(n for n in tensors if not torch.equal(archive[n], tensors[n].decode()))

    with Archive.open(tmp_path / "a.dither") as archive:
        threads = [threading.Thread(target=read, args=(archive,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.embed.weight


def test_a_tied_model_comes_back(tmp_path: Path) -> None:
    model = Tied()
    archive = dither.compress(model, size="100%")
    assert dict(archive.aliases) == {"head.weight": "embed.weight"}
    archive.save(tmp_path / "a.dither")
    again = Tied()
    found = dither.load_into(again, tmp_path / "a.dither")
    assert found.exact
    assert str(found) == "all tensors match"
    for name, value in again.state_dict().items():
        assert torch.equal(value, archive[name])
    assert again.head.weight is again.embed.weight


def test_a_missing_alias_is_not_missing() -> None:
    model = Tied()
    tensors = {n: Raw().encode(v) for n, v in model.state_dict().items() if n != "head.weight"}
    assert dither.load_into(Tied(), pack(tensors)).exact


def test_what_differs_is_reported() -> None:
    model = nn.Linear(4, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    archive = pack(
        {"weight": Raw().encode(torch.zeros(2, 4)), "extra": Raw().encode(torch.zeros(1))}
    )
    with pytest.raises(CheckpointError) as caught:
        dither.load_into(model, archive)
    text = str(caught.value)
    for expected in ("bias", "extra", "weight (archive (2, 4), model (3, 4))", "strict=False"):
        assert expected in text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found = dither.load_into(model, archive, strict=False)
    assert (found.missing, found.unexpected) == (("bias",), ("extra",))


def test_a_cast_is_reported() -> None:
    model = nn.Linear(4, 3).half()
    archive = pack({name: Raw().encode(v.float()) for name, v in model.state_dict().items()})
    found = dither.load_into(model, archive)
    assert found.cast == ("weight", "bias")
    assert not found.exact


@settings(max_examples=30)
@given(st.data())
def test_the_table_shows_every_tensor(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.text("abc.", min_size=1, max_size=9), unique=True, max_size=5))
    archive = pack({name: Raw().encode(torch.zeros(3)) for name in names})
    text = str(archive)
    assert all(f"{name} " in text for name in names)
    assert f"{archive.nbytes:,} bytes for {12 * len(names):,} bytes" in text
    assert repr(archive) == f"<Archive of {len(names)} tensors in {archive.nbytes} bytes>"
