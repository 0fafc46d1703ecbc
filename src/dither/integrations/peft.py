"""PEFT: adapters whose weights are an archive, in folders beside their ``adapter_config.json``.

    archive = dither.compress("adapter", "50KB")
    save_pretrained(archive, "small-adapter", "adapter")
    model = from_pretrained(base, "small-adapter")

``dither compress adapter --size 50KB -o small-adapter/`` writes such a folder, too. peft alone does
not read it: it looks for ``adapter_model.safetensors``, here and on the hub, and raises an error.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn

from dither.archive import Archive, pack
from dither.checkpoint import ADAPTER_IN_FOLDER as ADAPTER
from dither.core import CheckpointError
from dither.integrations.model_folder import check_target, copy_rest, write_weights
from dither.terminal import some_names
from dither.train import Run

__all__ = ["ADAPTER", "adapter_archive", "from_pretrained", "save_pretrained"]

Path_ = str | os.PathLike[str]


def save_pretrained(
    archive: Archive, folder: Path_, adapter: Any, adapter_name: str = "default"
) -> int:
    """Write a folder that :func:`from_pretrained` reads; returns the bytes of its weights.

    Args:
        archive: of an adapter's tensors, by the names of its folder.
        folder: where to; a folder that was written before is written over.
        adapter: the ``PeftModel``, or the adapter's own folder, for the configuration.
        adapter_name: which of a model's.

    Raises:
        CheckpointError: ``folder`` holds something else.
    """
    target = Path(folder)
    is_model = isinstance(adapter, nn.Module)
    check_target(target, None if is_model else Path(adapter))
    target.mkdir(parents=True, exist_ok=True)
    if is_model:
        adapter.peft_config[adapter_name].save_pretrained(target)
    else:
        copy_rest(Path(adapter), target)
    return write_weights(archive, target)


def from_pretrained(
    model: nn.Module, folder: Path_, adapter_name: str = "default", *, is_trainable: bool = False
) -> PeftModel:
    """Put an adapter on a base model, as ``PeftModel.from_pretrained`` does.

    Args:
        model: the base; its parameters are frozen.
        folder: that :func:`save_pretrained` wrote.
        adapter_name: what to call it.
        is_trainable: whether the adapter's are not.

    Raises:
        CheckpointError: the folder has no archive, or one that does not fit the adapter.
    """
    path = Path(folder) / ADAPTER
    if not path.is_file():
        raise CheckpointError(f"{os.fspath(folder)!r} has no {ADAPTER}; is it one of peft's own?")
    with Archive.open(path) as archive:
        state = archive.state_dict()
    config = PeftConfig.from_pretrained(os.fspath(folder))
    config.inference_mode = not is_trainable
    made = get_peft_model(model, config, adapter_name=adapter_name)
    wanted = get_peft_model_state_dict(made, adapter_name=adapter_name)
    if lacking := [name for name in wanted if name not in state]:
        raise CheckpointError(f"the adapter's archive lacks {some_names(lacking)}")
    found = set_peft_model_state_dict(made, state, adapter_name=adapter_name)
    if found.unexpected_keys:
        raise CheckpointError(f"the adapter has no {some_names(list(found.unexpected_keys))}")
    return made.train(is_trainable)


def adapter_archive(run: Run, adapter_name: str = "default") -> Archive:
    """The adapter alone of a run on a ``PeftModel``, whose base was not trained.

    After ``run.finish()`` it holds what evaluation computes with.
    """
    encoded = run.encode()
    held = {name: p for name, p in run.model.named_parameters() if name in encoded}
    names = {id(parameter): name for name, parameter in held.items()}
    kept = get_peft_model_state_dict(run.model, state_dict=held, adapter_name=adapter_name)
    return pack({name: encoded[names[id(value)]] for name, value in kept.items()})
