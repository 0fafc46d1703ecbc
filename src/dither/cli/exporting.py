"""Write what other programs run: ONNX files of archives."""

from __future__ import annotations

from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dither.archive import Archive
from dither.checkpoint import archive_in
from dither.cli.console import Printer
from dither.cli.data import data_of, model_of
from dither.cli.files import check_export_output, make_folder
from dither.cli.folders import folder_model
from dither.core import SpecError
from dither.integrations.model_folder import is_model_folder
from dither.run import to_onnx


def export(
    printer: Printer,
    file: Path,
    output: Path | None,
    *,
    kind: str,
    kernels: str,
    model: str | None,
    data: str | None,
) -> None:
    """Write an archive as an ONNX file, and say what it holds and what it computes."""
    if kind != "onnx":
        raise SpecError(f"--to {kind!r}: expected onnx")
    path = output or Path(f"{file.resolve().name.removesuffix('.dither')}.onnx")
    check_export_output(path, file)
    folder = next((p for p in (Path(model or file), file) if is_model_folder(p)), None)
    if folder is None and model is None:
        raise SpecError(
            f"{str(file)!r} does not say which model it is of: give --model FOLDER, a model folder "
            "with a config.json, or --model MODULE:FUNCTION"
        )
    with Archive.open(archive_in(file)) as archive, printer.progress(f"reading {file}"):
        whole = (
            model_of(model, file, archive.state_dict()) if folder is None else folder_model(folder)
        )
        sample, shapes = _sample(whole, folder or file, data), None
        if isinstance(sample, dict) and "input_ids" in sample:  # of any length
            axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.AUTO}
            shapes = {
                name: axes if value.ndim > 1 else {0: axes[0]} for name, value in sample.items()
            }
        make_folder(path)
        found = to_onnx(whole, archive, sample, path, kernels=kernels, dynamic_shapes=shapes)
    printer.document({**asdict(found), "path": str(path)})
    printer.text(f"{found}\nwrote {path}")


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
    known = signature(model.forward).parameters
    names = [name for name in ("input_ids", "attention_mask") if name in known]
    return {name: torch.ones(2, 8, dtype=torch.int64) for name in names}
