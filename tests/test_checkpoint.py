"""Reading checkpoints: every kind, as others write them, and hostile ones."""

import argparse
import datetime as dt
import json
import pickle
import random
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from dither.checkpoint import ALIASES_KEY, read_checkpoint
from dither.core import CheckpointError
from dither.model import collect


def example() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "conv.bias": torch.randn(4, generator=generator),
        "steps": torch.tensor(7),
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def tied_model() -> nn.Module:
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    return nn.Sequential(embedding, head)


# --- safetensors ---------------------------------------------------------------------------------


def test_safetensors_of_every_type(tmp_path: Path) -> None:
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    types += [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.bool]
    types += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
    tensors = {str(dtype): torch.arange(5).to(dtype) for dtype in types}
    tensors["empty"] = torch.zeros(0, 3)
    tensors["scalar"] = torch.tensor(1.5)
    save_file(tensors, tmp_path / "a.safetensors")
    read = read_checkpoint(tmp_path / "a.safetensors")
    assert {name: value.dtype for name, value in read.items()} == {
        name: value.dtype for name, value in tensors.items()
    }
    assert all(read[name].tolist() == value.tolist() for name, value in tensors.items())


def test_ties_in_safetensors_come_back_shared(tmp_path: Path) -> None:
    save_model(tied_model(), str(tmp_path / "a.safetensors"))
    state = read_checkpoint(tmp_path / "a.safetensors")
    assert set(state) == {"0.weight", "1.weight"}
    assert len(collect(state).aliases) == 1
    save_file({"a": torch.ones(2)}, tmp_path / "b.safetensors", {ALIASES_KEY: '{"b": "a"}'})
    state = read_checkpoint(tmp_path / "b.safetensors")
    assert state["b"].data_ptr() == state["a"].data_ptr()


def test_strange_ties(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2)}, path, {ALIASES_KEY: '{"b": 3, "c": "none"}'})
    assert set(read_checkpoint(path)) == {"a"}
    for ties in ("[]", "{"):
        save_file({"a": torch.ones(2)}, path, {ALIASES_KEY: ties})
        with pytest.raises(CheckpointError, match=r"a\.safetensors.* damaged"):
            read_checkpoint(path)


# --- PyTorch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".bin", ".ckpt", ".PT"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"a{suffix}"
    torch.save(OrderedDict(example()), path, _use_new_zipfile_serialization=zipped)
    assert same(read_checkpoint(path), example())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3, "best": torch.tensor(0.9)},
        lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {0: s}}},
        lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": []}, "args": {"lr": 1.0}},
        lambda s: {"params": s},
        lambda s: {"ema": s, "lr_schedulers": [], "callbacks": {"best": {"score": torch.ones(1)}}},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {"my_own": s, "step": 5},
        lambda s: {f"module.{name}": value for name, value in s.items()},
        lambda s: {f"_orig_mod.module.{name}": value for name, value in s.items()},
        lambda s: {"state_dict": {f"module._orig_mod.{n}": v for n, v in s.items()}},
        lambda s: {name: nn.Parameter(v, requires_grad=False) for name, v in s.items()},
    ],
)
def test_nested_and_wrapped_state_dicts(tmp_path: Path, wrap: Callable[[Any], object]) -> None:
    torch.save(wrap(example()), tmp_path / "a.pt")
    assert same(read_checkpoint(tmp_path / "a.pt"), example())


def test_a_prefix_that_only_some_names_have_stays(tmp_path: Path) -> None:
    state = {"module.a": torch.ones(2), "b": torch.ones(2)}
    torch.save(state, tmp_path / "a.pt")
    assert same(read_checkpoint(tmp_path / "a.pt"), state)


def test_several_state_dicts_are_named_and_chosen(tmp_path: Path) -> None:
    other = {"w": torch.zeros(3)}
    torch.save({"model": example(), "ema": other, "epoch": 1}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="several state dicts: 'model', 'ema'"):
        read_checkpoint(tmp_path / "a.pt")
    assert same(read_checkpoint(tmp_path / "a.pt", key="ema"), other)
    with pytest.raises(CheckpointError, match=r"no state dict under 'emma'; there are 'model'"):
        read_checkpoint(tmp_path / "a.pt", key="emma")


def test_a_key_is_for_torch_files(tmp_path: Path) -> None:
    save_file(example(), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="for PyTorch files"):
        read_checkpoint(tmp_path / "a.safetensors", key="model")


def test_ties_in_torch_files_stay_shared(tmp_path: Path) -> None:
    torch.save(tied_model().state_dict(), tmp_path / "a.bin")
    assert len(collect(read_checkpoint(tmp_path / "a.bin")).aliases) == 1


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"w": torch.ones(2), "note": "hi"}, "'note' (str)"),
        ({"w": torch.ones(2), 3: torch.ones(2)}, "names that are no strings: 3"),
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({"epoch": 3, "name": "x"}, "entries 'epoch', 'name'"),
        ({}, "no state dict"),
        ({"w": torch.ones(2).to_sparse()}, "expected dense tensors"),
        ({"w": torch.ones(2).to(torch.float8_e4m3fnuz)}, "float8_e4m3fnuz"),
        ({"model": dt.timezone(dt.timedelta(hours=1))}, "object of type datetime.timezone"),
        ({"model": nn.Linear(2, 2)}, "object of type torch.nn.modules.linear.Linear"),
    ],
)
def test_refused_contents(tmp_path: Path, content: object, text: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "a.pt")
    assert text in str(caught.value)
    assert "a.pt" in str(caught.value)


# --- Hugging Face folders ------------------------------------------------------------------------


def write_shards(folder: Path, suffix: str) -> dict[str, Tensor]:
    state = example()
    weights = {}
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    for i, (name, value) in enumerate(state.items()):
        shard = f"{stem}-{i + 1:05}-of-00003.{suffix}"
        if suffix == "safetensors":
            save_file({name: value}, folder / shard)
        else:
            torch.save({name: value}, folder / shard)
        weights[name] = shard
    index = {"metadata": {}, "weight_map": weights}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return state


def test_model_folders(tmp_path: Path) -> None:
    torch.save({"old": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert set(read_checkpoint(tmp_path)) == {"old"}
    save_file(example(), tmp_path / "model.safetensors")
    assert same(read_checkpoint(tmp_path), example())


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_folders(tmp_path: Path, suffix: str) -> None:
    state = write_shards(tmp_path, suffix)
    assert same(read_checkpoint(tmp_path), state)
    assert same(read_checkpoint(next(tmp_path.glob("*.index.json"))), state)
    next(tmp_path.glob("*-00002-*")).unlink()
    with pytest.raises(CheckpointError, match=r"needs 3 shards, of which 1 are missing: .*-00002-"):
        read_checkpoint(tmp_path)


def test_a_folder_with_one_file_of_another_name(tmp_path: Path) -> None:
    save_file(example(), tmp_path / "adapter_model.safetensors")
    assert same(read_checkpoint(tmp_path), example())
    save_file(example(), tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"it has adapter_model.safetensors, b.safetensors"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index",
    ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "\xff", "[" * 100_000]
    + [json.dumps({"weight_map": {"w": name}}) for name in ("../w.safetensors", "/etc/x", "w.odd")],
)
def test_hostile_indexes(tmp_path: Path, index: str) -> None:
    (tmp_path / "w.odd").write_text("x")
    save_file({"w": torch.ones(2)}, tmp_path.parent / "w.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="latin-1")
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path)


def test_an_index_that_names_more_than_the_shards_hold(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    weights = {"weight_map": {"w": "a.safetensors", "lost": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(weights))
    with pytest.raises(CheckpointError, match="its shards lack: 'lost'"):
        read_checkpoint(tmp_path)


# --- NumPy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: Callable[..., None]) -> None:
    arrays = {
        "a": np.arange(6, dtype=">f4").reshape(2, 3),
        "b": np.array(True),
        "x.npy": np.ones(2),
    }
    arrays["fortran"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    save(tmp_path / "a.npz", **arrays)
    state = read_checkpoint(tmp_path / "a.npz")
    assert {name: value.tolist() for name, value in state.items()} == {
        name: value.tolist() for name, value in arrays.items()
    }
    state["a"] += 1  # writable, or torch would warn


@pytest.mark.parametrize(
    "array", [np.array([{}]), np.array(["x"]), np.zeros(2, "f4,i4"), np.zeros(2, "M8[s]")]
)
def test_npz_of_other_things_than_numbers(tmp_path: Path, array: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", array, allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"arr_0|allow_pickle"):
        read_checkpoint(tmp_path / "a.npz")


def test_npz_that_claims_more_than_it_has(tmp_path: Path) -> None:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (999999999999,), }"
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("a.npy", member)
    with pytest.raises(CheckpointError, match="claims 7999999999992 bytes"):
        read_checkpoint(tmp_path / "a.npz")


# --- what is none of these -----------------------------------------------------------------------


def test_missing_and_unknown(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file or folder"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"has none of model\.safetensors"):
        read_checkpoint(tmp_path)
    for name, text in (("a.onnx", "understood are"), ("a.dither", r"dither\.load")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(CheckpointError, match=text):
            read_checkpoint(tmp_path / name)
    save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"hello world " * 20, b"PK\x03\x04" * 9])
def test_garbage(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".legacy.pt", ".npz"])
def test_mutated_files_are_read_or_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".safetensors":
        save_file(example(), path)
    elif suffix == ".npz":
        arrays = {name: value.numpy() for name, value in example().items()}
        np.savez_compressed(path, allow_pickle=False, **arrays)
    else:
        torch.save(example(), path, _use_new_zipfile_serialization=suffix == ".pt")
    good = path.read_bytes()
    pick = random.Random(0)
    refused = 0
    for i in range(300):
        bad = bytearray(good)
        if i % 3:
            for _ in range(pick.randint(1, 6)):
                bad[pick.randrange(len(bad))] = pick.randrange(256)
        else:
            del bad[pick.randrange(len(bad)) :]
        path.write_bytes(bad)
        try:
            for value in read_checkpoint(path).values():
                value.clone()
        except CheckpointError:
            refused += 1
    assert refused >= 90


# --- what a file really is -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><title>Sign in</title>", "an HTML page"),
        (b"<html><body>404</body></html>", "an HTML page"),
        (b"\x1f\x8b\x08" + bytes(40), "gzip"),
        (b"BZh91AY" + bytes(40), "bzip2"),
        (b"GGUF\x03" + bytes(40), "GGUF"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
        (b"\x8dDITHER\x1a" + bytes(40), r"dither\.load"),
    ],
)
@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.npz", "a", "a.pth.tar"])
def test_it_is_said_what_a_file_is(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=text):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["model_best.pth.tar", "weights", "a.npz", "a.sd", "a.pkl"])
def test_a_file_is_read_as_what_it_holds(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    torch.save({"state_dict": example(), "epoch": 3}, path)
    assert same(read_checkpoint(path, key="state_dict"), example())
    torch.save(example(), path, _use_new_zipfile_serialization=False)
    assert same(read_checkpoint(path), example())
    save_file(example(), path)
    assert same(read_checkpoint(path), example())
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **{n: v.numpy() for n, v in example().items()})
    assert same(read_checkpoint(path), example())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["a.pkl", "a.pt"])
def test_a_pickle_of_another_program_is_named(tmp_path: Path, name: str, protocol: int) -> None:
    state = {name: value.numpy() for name, value in example().items()}
    (tmp_path / name).write_bytes(pickle.dumps(state, protocol))
    with pytest.raises(CheckpointError, match=r"a pickle that torch\.save did not write"):
        read_checkpoint(tmp_path / name)


class _Runs:
    ran: list[str] = []  # noqa: RUF012 - what was run

    def __init__(self, what: str) -> None:
        self.ran.append(what)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), ("code",)


def test_what_training_loops_save_beside_weights_is_passed_over(tmp_path: Path) -> None:
    rows: defaultdict[str, list[float]] = defaultdict(list)
    rows["loss"].append(0.5)
    training = {
        "epoch": np.int64(3),
        "best": np.float64(0.9),
        "metrics": np.arange(3.0),
        "objects": np.array([{"a": 1}, None]),
        "args": argparse.Namespace(lr=0.1, out=PosixPath("runs"), kinds=[int, str]),
        "home": PosixPath("/home/someone"),
        "history": rows,
        "model": defaultdict[str, Any](dict, example()),
    }
    torch.save(training, tmp_path / "a.pt")
    assert same(read_checkpoint(tmp_path / "a.pt"), example())
    torch.save({**training, "hook": _Runs("saved")}, tmp_path / "b.pt")
    _Runs.ran.clear()
    with pytest.raises(CheckpointError, match=r"could run code from the file"):
        read_checkpoint(tmp_path / "b.pt")
    assert _Runs.ran == []
    torch.save({"w": torch.ones(2), "lr": np.float64(0.1)}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"no tensors: 'lr' \(scalar\)"):
        read_checkpoint(tmp_path / "c.pt")


def test_names_in_errors_do_nothing_to_a_terminal(tmp_path: Path) -> None:
    weights = {"weight_map": {"w": "a\n\x1b[2Jforged.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(weights))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path)
    assert str(caught.value).isprintable()


# --- links and lists -----------------------------------------------------------------------------


def test_a_shard_that_is_a_link_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    state = write_shards(folder, "safetensors")
    shard = next(folder.glob("*-00002-*"))
    elsewhere = tmp_path / "secret.safetensors"
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=r"is a link to .*secret.*out of its folder"):
        read_checkpoint(folder)
    shard.unlink()
    elsewhere.rename(folder / "held.safetensors")
    shard.symlink_to("held.safetensors")
    assert same(read_checkpoint(folder), state)


def test_the_cache_of_hugging_face_is_made_of_links(tmp_path: Path) -> None:
    folder, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    state = write_shards(folder, "safetensors")
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{i}")
        file.symlink_to(f"../../blobs/{i}")
    assert same(read_checkpoint(folder), state)
    assert set(read_checkpoint(blobs / "1")) < set(state)  # a blob has no suffix


def test_an_index_is_no_shard_of_itself(tmp_path: Path) -> None:
    name = "model.safetensors.index.json"
    (tmp_path / name).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match="names the index"):
        read_checkpoint(tmp_path)


def test_a_folder_of_sentence_transformers_keeps_its_further_modules(tmp_path: Path) -> None:
    modules = [{"idx": i, "path": path} for i, path in enumerate(["", "1_Pooling", "2_Dense"])]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "2_Dense").mkdir()
    save_file(example(), tmp_path / "model.safetensors")
    dense = {"linear.weight": torch.ones(2, 3), "linear.bias": torch.zeros(2)}
    torch.save(dense, tmp_path / "2_Dense" / "pytorch_model.bin")
    state = read_checkpoint(tmp_path)
    assert same(state, {**example(), **{f"2_Dense.{name}": v for name, v in dense.items()}})
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "../elsewhere"}, {"path": ".."}]))
    assert same(read_checkpoint(tmp_path), example())
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        read_checkpoint(tmp_path)


def test_metadata_of_safetensors_never_becomes_a_tensor(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    notes = {"author": "w", "w.best": "w", "main": "head.weight", "head.bias": "head.weight"}
    save_file({"w": torch.ones(2), "head.weight": torch.ones(2)}, path, notes)
    assert set(read_checkpoint(path)) == {"w", "head.weight"}
