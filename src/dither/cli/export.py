"""Write what other programs run: ONNX files of archives."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dither.archive import Archive
from dither.checkpoint import archive_in
from dither.cli.console import Printer
from dither.cli.data import data_of, model_of
from dither.cli.files import check_export_output, make_folder, memory_limit
from dither.cli.folders import folder_model
from dither.core import SpecError
from dither.integrations.model_folder import is_model_folder
from dither.run import to_onnx


@dataclass(frozen=True)
class Target:
    """What is to be written: a kind of file, and how weights stand in it."""

    kind: str
    kernels: str
    half: bool


def export(
    printer: Printer,
    file: Path,
    output: Path | None,
    *,
    target: Target,
    model: str | None,
    data: str | None,
    max_size: str | None,
) -> None:
    """Write an archive as an ONNX file, and say what it holds and what it computes."""
    if target.kind != "onnx":
        raise SpecError(f"--to {target.kind!r}: expected onnx")
    path = output or Path(f"{file.resolve().name.removesuffix('.dither')}.onnx")
    check_export_output(path, file)
    limit = memory_limit(max_size)
    with (
        Archive.open(archive_in(file), limit) as archive,
        printer.progress(f"reading {file}"),
    ):
        folder = next((p for p in (file, Path(model or "")) if is_model_folder(p)), None)
        if folder is not None and ":" not in (model or ""):
            made = folder_model(folder)
        elif model is None:
            raise SpecError(
                f"{str(file)!r} does not say which model it is of: give --model FOLDER, a model "
                "folder with a config.json, or --model MODULE:FUNCTION"
            )
        else:
            made = model_of(model, file, archive.state_dict())
        sample = _sample(made, folder or file, data)
        make_folder(path)
        shapes = (
            {name: _axes(value) for name, value in sample.items()} if _is_text(sample) else None
        )
        found = to_onnx(
            made,
            archive,
            sample,
            path,
            kernels=target.kernels,
            half=target.half,
            dynamic_shapes=shapes,
        )
    document = {**asdict(found), "path": str(path), "sites": dict(found.sites)}
    document["output"] = document.pop("path")
    printer.document(document)
    printer.text(str(found))
    printer.text(f"wrote {path}")


def _sample(model: nn.Module, source: Path, data: str | None) -> Any:  # noqa: ANN401 - a batch
    """The first batch of the user's; for a model that reads text, a few tokens."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # of what was read before, which nobody asks for
    if data is not None:
        return next(iter(data_of(data, source, model)))
    if getattr(model, "main_input_name", "") != "input_ids":
        raise SpecError(
            f"a batch for {type(model).__name__} is needed, to follow what it computes: give "
            "--data MODULE:NAME of a loader"
        )
    ids = torch.ones(2, 8, dtype=torch.int64)
    mask = {"attention_mask": torch.ones_like(ids)}
    return {
        "input_ids": ids,
        **(mask if "attention_mask" in signature(model.forward).parameters else {}),
    }


def _is_text(sample: object) -> bool:
    return isinstance(sample, dict) and "input_ids" in sample


def _axes(value: Tensor) -> dict[int, Any]:
    """Sentences, and their tokens, in any number."""
    kinds = (torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO)
    return {axis: kinds[axis] for axis in range(min(value.ndim, 2))}
