"""Model folders of Hugging Face whose weights are an archive; transformers is not needed here.

The archive stands in ``model.dither.safetensors``, as one tensor of bytes: hubs and caches take it
as they take any weights. ``config.json`` has a ``quantization_config`` that asks for dither.
Whoever knows no dither goes on to ``model.safetensors.index.json``, which names one shard: a file
that does not exist, and whose name says what is to be done. So the error that follows says it, too,
where weights under a plain name would be taken for those of another model, and be drawn at random.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dither.archive import Archive, atomic_write, wrapper
from dither.checkpoint import ADAPTER_IN_FOLDER, ARCHIVE_IN_FOLDER, archive_in, inside_folder
from dither.core import DTYPES, CheckpointError, SpecError

METHOD = "dither"
"""What transformers calls the method in ``quantization_config``."""

_ASKS = "needs `pip install dither` and `import dither.integrations.transformers`.safetensors"
"""The file that is missed where dither is unknown. It must end like weights, and never exists."""
_INDEX = "model.safetensors.index.json"

_CONFIG, _ADAPTER_CONFIG = "config.json", "adapter_config.json"
_WEIGHTS_OF_OTHERS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".npz"),
    *(".onnx", ".onnx_data", ".pb", ".tflite", ".mlmodel", ".xml", ".dither"),
}


def is_model_folder(path: Path) -> bool:
    """Whether transformers, or peft, could read the folder."""
    return (path / _CONFIG).is_file() or (path / _ADAPTER_CONFIG).is_file()


def check_target(target: Path, source: Path | None = None) -> None:
    """Refuse, before any work, a folder that holds anything but an earlier result.

    Args:
        target: the folder.
        source: the model's own, if it has one.

    Raises:
        CheckpointError: it does, or lies in the model's own.
    """
    if source is not None and target.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"the output {str(target)!r} lies in the model's own folder")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"the output {str(target)!r} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()) and archive_in(target) == target:
        raise CheckpointError(
            f"the folder {str(target)!r} exists and holds other files than a model that was "
            "compressed; remove it, or name another"
        )


def copy_rest(source: Path, target: Path) -> None:
    """Copy a model folder without its weights: configuration, tokenizer, code, and so on.

    Modules that a ``modules.json`` of sentence-transformers lists are copied as they are.

    Raises:
        SpecError: the source is no model folder.
        CheckpointError: a file is a link out of it.
    """
    if not is_model_folder(source):
        raise SpecError(
            f"{str(source)!r} is no model folder: it has no {_CONFIG}, and no {_ADAPTER_CONFIG}"
        )
    modules = module_folders(source)
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        if any(part.startswith(".") for part in place.parts) or not path.is_file():
            continue
        if place.parts[0] in modules or not _is_weights(place):
            copied = target / place
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(inside_folder(path, source), copied)


def write_folder(archive: Archive, source: Path, target: Path) -> int:
    """A model folder with an archive for weights, from the folder of the model; returns its bytes.

    Raises:
        SpecError: the source is no model folder.
        CheckpointError: a file is a link out of it, or its weights are quantized already.
    """
    target.mkdir(parents=True, exist_ok=True)
    copy_rest(source, target)
    return write_weights(archive, target)


def module_folders(source: Path) -> set[str]:
    """Folders of the further modules of a model of sentence-transformers."""
    try:
        listed = json.loads((source / "modules.json").read_text(encoding="utf-8"))
        return {str(module["path"]) for module in listed if module["path"]}
    except (OSError, ValueError, TypeError, LookupError):
        return set()


def own_weights(source: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the model itself: those of further modules stay where they are."""
    modules = module_folders(source)
    return {name: value for name, value in state.items() if name.split(".")[0] not in modules}


def write_weights(archive: Archive, target: Path) -> int:
    """Write the archive into a folder that has a configuration, and mark that; returns its bytes.

    Raises:
        CheckpointError: the folder's configuration is none, or of weights that another method has
            quantized.
    """
    path = target / _CONFIG
    if not path.is_file() and (target / _ADAPTER_CONFIG).is_file():
        return _write_archive(archive, target / ADAPTER_IN_FOLDER)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        method = (config.get("quantization_config") or {}).get("quant_method", METHOD)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{str(path)!r} is no configuration of a model: {error}") from error
    if method != METHOD:
        raise CheckpointError(
            f"{str(path)!r} is of a model quantized by {method!r}; take the one that is not"
        )
    nbytes = _write_archive(archive, target / ARCHIVE_IN_FOLDER)
    config["quantization_config"] = {"quant_method": METHOD}
    if not (config.get("dtype") or config.get("torch_dtype")):
        config["dtype"] = _main_dtype(archive)
    index = {"metadata": {}, "weight_map": {"dither": _ASKS}}
    for name, document in ((_INDEX, index), (_CONFIG, config)):
        with atomic_write(target / name) as file:
            file.write((json.dumps(document, indent=2) + "\n").encode())
    return nbytes


def _write_archive(archive: Archive, path: Path) -> int:
    with atomic_write(path) as file:
        file.write(wrapper(archive.nbytes))
        file.write(archive.to_bytes())
    return path.stat().st_size


def _is_weights(place: Path) -> bool:
    name = place.name.lower()
    return place.suffix.lower() in _WEIGHTS_OF_OTHERS or name.endswith(".index.json")


def _main_dtype(archive: Archive) -> str:
    """The floating-point type of most values; loaders look for it in the weights otherwise."""
    counts = Counter[str]()
    for entry in archive.entries.values():
        if DTYPES[entry.dtype].is_floating_point:
            counts[entry.dtype] += entry.numel
    return counts.most_common(1)[0][0] if counts else "float32"
