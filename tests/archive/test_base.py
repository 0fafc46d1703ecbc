"""Archives that store differences: exact sums, the base's hash, and what is refused."""

import json
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dither
from dither import ArchiveError, CheckpointError, SpecError
from dither.archive import Archive, Base, base_of, code, content_hash, pack, packed_nbytes
from dither.formats import Affine, Raw
from dither.testing import same_bits

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensors() -> dict[str, Tensor]:
    return {"w": numbers(16, 8), "b": numbers(16, seed=1), "n": torch.tensor([3])}


def on(base: dict[str, Tensor], dtype: str = "float32") -> Archive:
    """A difference to `w`, nothing to `n`, and `b` whole."""
    difference = code(Affine(4).encode(0.1 * numbers(16, 8, seed=2)))
    held = {
        "w": difference._replace(dtype=dtype, on_base=True),
        "b": code(Raw().encode(numbers(16, seed=3))),
        "n": code(Raw().encode(base["n"]))._replace(parts={}, on_base=True),
    }
    return pack(held, {"tied": "w"}, base=Base.of(base))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16], ids=str)
def test_values_are_the_base_s_and_the_difference_added_once(
    dtype: torch.dtype, own: torch.dtype
) -> None:
    base = {**tensors(), "w": (300 * numbers(16, 8)).to(own)}
    archive = on(base, str(dtype).removeprefix("torch."))
    difference = archive.stored("w")
    assert difference is not None
    wide = np.float64 if dtype == torch.float64 else np.float32
    total = base["w"].double().numpy().astype(wide) + difference.double().numpy().astype(wide)
    limit = torch.finfo(dtype).max
    wanted = torch.from_numpy(total).clamp(-limit, limit).to(dtype)
    assert same_bits(archive["w"], wanted)
    assert same_bits(archive["tied"], wanted)
    assert same_bits(archive["n"], base["n"])
    assert archive.stored("n") is None
    assert same_bits(archive["b"], numbers(16, seed=3))
    assert all(same_bits(archive.state_dict()[name], archive[name]) for name in archive)


def test_without_differences_a_tensor_is_the_base_s_to_the_last_bit() -> None:
    odd = torch.tensor([-0.0, torch.nan, torch.inf, 1e-45])
    held = {"w": code(Raw().encode(odd))._replace(parts={}, on_base=True)}
    assert same_bits(pack(held, base=Base.of({"w": odd}))["w"], odd)


def containers(folder: Path) -> dict[str, Any]:
    """The same weights in all that may hold them."""
    values = tensors()
    model = nn.Module()
    model.w, model.b = nn.Parameter(values["w"]), nn.Parameter(values["b"])
    model.register_buffer("n", values["n"])
    save_file(values, folder / "a.safetensors", {"any": "metadata"})
    torch.save({"state_dict": {f"module.{n}": v for n, v in values.items()}}, folder / "a.pt")
    whole = pack({name: Raw().encode(value) for name, value in reversed(values.items())})
    whole.save(folder / "a.dither")
    paths = {name: folder / name for name in ("a.safetensors", "a.pt", "a.dither")}
    return {**paths, "dict": values, "model": model, "wrapped": nn.DataParallel(model)} | {
        "archive": whole
    }


@pytest.mark.parametrize(
    "kind", ["a.safetensors", "a.pt", "a.dither", "dict", "model", "wrapped", "archive"]
)
def test_the_same_weights_are_one_base_whatever_holds_them(kind: str, tmp_path: Path) -> None:
    path, base = tmp_path / "small.dither", containers(tmp_path)[kind]
    on(tensors()).save(path)
    wanted = on(tensors())["w"]
    assert base_of(base).digest == content_hash(tensors())
    assert same_bits(dither.load(path, base=base)["w"], wanted)
    with dither.open(path, base=base) as archive:
        assert archive.base == content_hash(tensors())
        with pickle.loads(pickle.dumps(archive)) as again:
            assert same_bits(again["w"], wanted)
    model = containers(tmp_path)["model"]
    model.tied = model.w
    assert dither.load_into(model, path, base=base).exact
    assert same_bits(model.w.detach(), wanted)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"w": t["w"] + 1e-3},
        lambda t: t | {"w": t["w"].reshape(8, 16)},
        lambda t: t | {"w": t["w"].double()},
        lambda t: t | {"more": t["b"]},
        lambda t: {"x" + name: value for name, value in t.items()},
        lambda t: {name: value for name, value in t.items() if name != "b"},
    ],
    ids=["value", "shape", "type", "more", "names", "less"],
)
def test_another_base_is_refused_and_both_hashes_are_named(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], tmp_path: Path
) -> None:
    other, path = change(tensors()), tmp_path / "small.dither"
    on(tensors()).save(path)
    found = (content_hash(other), content_hash(tensors()))
    with pytest.raises(ArchiveError, match=f"{found[0]}.*{found[1]}"):
        dither.load(path, base=other)
    assert found[1] in dither.verify(path, base=other)[0]


def test_without_its_base_a_file_is_looked_at_and_not_read(tmp_path: Path) -> None:
    path, digest = tmp_path / "small.dither", content_hash(tensors())
    on(tensors()).save(path)
    assert dither.verify(path) == []
    model = containers(tmp_path)["model"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with dither.open(path) as archive:
        assert f"base + {Affine.name}" in str(archive)
        assert archive.entries["w"].shape == (16, 8)
        assert same_bits(archive["b"], numbers(16, seed=3))
        assert archive.encoded("b").format == Raw()
        for use in (
            lambda: archive["w"],
            lambda: archive["tied"],
            archive.state_dict,
            lambda: archive.encoded("w"),
            lambda: dither.load_into(model, archive, strict=False),
        ):
            with pytest.raises(ArchiveError, match=digest):
                use()
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())


def test_what_needs_no_base_takes_none(tmp_path: Path) -> None:
    path, values = tmp_path / "whole.dither", tensors()
    whole = pack({name: Raw().encode(value) for name, value in values.items()})
    whole.save(path)
    with pytest.raises(ArchiveError, match="rests on no base"):
        dither.load(path, base=values)
    with pytest.raises(SpecError, match="when it is opened"):
        dither.load_into(nn.Linear(1, 1), whole, base=values)
    on(values).save(path)
    with pytest.raises(CheckpointError, match="no file or folder"):
        dither.load(path, base=tmp_path / "none.safetensors")
    with pytest.raises(ArchiveError, match="none is named"):
        pack({"w": code(Raw().encode(numbers(3)))._replace(on_base=True)})


def test_a_base_on_a_base_is_given_open(tmp_path: Path) -> None:
    first = tensors()
    second = on(first)
    second.save(tmp_path / "second.dither")
    third = pack(
        {"w": code(Raw().encode(numbers(16, 8)))._replace(on_base=True)}, base=base_of(second)
    )
    third.save(tmp_path / "third.dither")
    with pytest.raises(ArchiveError, match="rests on another"):
        dither.open(tmp_path / "third.dither", base=tmp_path / "second.dither")
    with dither.open(tmp_path / "second.dither", base=first) as between:
        found = dither.load(tmp_path / "third.dither", base=between)["w"]
    assert same_bits(found, second["w"] + numbers(16, 8))


def test_changes_of_a_model_afterwards_are_not_the_base_s() -> None:
    values = tensors()
    archive = on(values)
    before = archive["w"]
    values["w"].zero_()
    assert same_bits(archive["w"], before)


def edited(data: bytes, features: int, edit: Callable[[dict[str, Any]], None]) -> bytes:
    """An archive with another index and other features, its checksum in order."""
    packed = struct.unpack("<I", data[-16:-12])[0]
    index = json.loads(zlib.decompress(data[-16 - packed : -16]))
    edit(index)
    text = json.dumps(index).encode()
    new, start = zlib.compress(text), data[:10] + struct.pack("<H", features)
    lengths = struct.pack("<II", len(new), len(text))
    crc = struct.pack("<I", zlib.crc32(start + new + lengths))
    return start + data[12 : -16 - packed] + new + lengths + crc + data[-4:]


@pytest.mark.parametrize(
    ("features", "edit", "said"),
    [
        (0, lambda index: None, "differ"),
        (1, lambda index: index.pop("base"), "differ"),
        (1, lambda index: index.update(base=None), "differ"),
        (2, lambda index: None, "needs features"),
        (3, lambda index: None, "needs features"),
        (1, lambda index: index.update(base="00"), "hash"),
        (1, lambda index: index.update(base=7), "hash"),
        (1, lambda index: index["tensors"].pop("base"), "columns"),
        (1, lambda index: index["tensors"].update(base=[1, 0]), "unequal"),
        (1, lambda index: index["tensors"].update(base=[1, 0, 2]), "from 0 to 1"),
        (1, lambda index: index["tensors"].update(base=[1, 0, True]), "from 0 to 1"),
        (1, lambda index: index["tensors"].update(dtype=["int8", "float32", "int64"]), "int8"),
    ],
)
def test_hostile_indices_are_refused(
    features: int, edit: Callable[[dict[str, Any]], None], said: str
) -> None:
    data = on(tensors()).to_bytes()
    assert Archive.from_bytes(edited(data, 1, lambda index: None)).base
    with pytest.raises(ArchiveError, match=said):
        Archive.from_bytes(edited(data, features, edit))


@pytest.mark.parametrize(
    "edit",
    [
        lambda index: index["tensors"].update(name=["other", "b", "n"], base=[1, 0, 1]),
        lambda index: index["tensors"].update(shape=[[16, 8], [16], [2]]),
        lambda index: index["tensors"].update(dtype=["float32", "float32", "float32"]),
        lambda index: index["tensors"].update(base=[1, 0, 0]),
    ],
    ids=["name", "shape", "kind", "no parts"],
)
def test_what_does_not_fit_the_base_is_refused_as_it_is_read(
    edit: Callable[[dict[str, Any]], None],
) -> None:
    def change(index: dict[str, Any]) -> None:
        index.pop("aliases")
        edit(index)

    data = edited(on(tensors()).to_bytes(), 1, change)
    archive = Archive.from_bytes(data, base=tensors())
    with pytest.raises(ArchiveError):
        archive.state_dict()


def test_a_tensor_that_is_the_base_s_takes_a_few_bytes_of_the_index() -> None:
    values = {f"encoder.layer.{n}.weight": numbers(20, 20, seed=n) for n in range(40)}
    same = {
        name: code(Raw().encode(value))._replace(parts={}, on_base=True)
        for name, value in values.items()
    }
    base = Base.of(values)
    assert packed_nbytes(same, base=base) < 12 * len(same) + 250
