"""Whatever holds weights is a source: files and folders of every kind give the dict's bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import dither
from dither import CheckpointError, SpecError


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (40, 24), "a.bias": (40,), "b.weight": (8, 40)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def torch_file(folder: Path) -> Path:
    torch.save({"state_dict": weights(), "epoch": 3}, folder / "model.pt")
    return folder / "model.pt"


def safetensors_file(folder: Path) -> Path:
    save_file(weights(), folder / "model.safetensors")
    return folder / "model.safetensors"


def numpy_file(folder: Path) -> Path:
    arrays: dict[str, Any] = {name: value.numpy() for name, value in weights().items()}
    np.savez(folder / "model.npz", **arrays)
    return folder / "model.npz"


def model_folder(folder: Path) -> Path:
    safetensors_file(folder)
    return folder


def sharded_folder(folder: Path) -> Path:
    shards = {name: f"model-{i}.safetensors" for i, name in enumerate(weights())}
    for name, shard in shards.items():
        save_file({name: weights()[name]}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}), encoding="utf-8")
    return folder


FILES = [torch_file, safetensors_file, numpy_file, model_folder, sharded_folder]


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("write", FILES)
def test_a_path_is_a_source(
    write: Callable[[Path], Path], kind: Callable[[Path], str | Path], tmp_path: Path
) -> None:
    path = kind(write(tmp_path))
    made, expected = (dither.compress(source, "8x") for source in (path, weights()))
    assert set(made) == set(weights())
    assert made.nbytes <= expected.nbytes + 8  # the order of names is the file's
    assert [row.size for row in dither.plan(path, ["8x"]).sizes] == ["8x"]


def test_an_archive_is_a_source(tmp_path: Path) -> None:
    dither.compress(weights(), "4x").save(tmp_path / "a.dither")
    stored = dither.load(tmp_path / "a.dither")
    again = dither.compress(str(tmp_path / "a.dither"), "8x")
    assert again.to_bytes() == dither.compress(stored, "8x").to_bytes()


def test_data_need_a_model(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"model\.pt' holds weights: load them into the model"):
        dither.compress(torch_file(tmp_path), "8x", data=[torch.ones(1, 24)])


@pytest.mark.parametrize("source", [5, None, [torch.ones(3)], torch.ones(3)])
def test_what_is_no_source(source: object) -> None:
    for ask in (lambda: dither.compress(source, "8x"), lambda: dither.plan(source)):  # type: ignore[arg-type]
        with pytest.raises(SpecError, match="takes a model, a dict of tensors or the path"):
            ask()


def test_a_path_that_is_not_there() -> None:
    with pytest.raises(CheckpointError, match=r"there is no file or folder 'nowhere\.pt'"):
        dither.compress("nowhere.pt", "8x")
