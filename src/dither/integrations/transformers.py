"""transformers: folders that ``from_pretrained`` reads, and training in its ``Trainer``.

Importing this module is what teaches transformers to read such folders: it has no other way to
learn of them. A model that was read is a plain one, with exactly the numbers of the archive.

    import dither.integrations.transformers
    model = AutoModel.from_pretrained("folder")
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dither.activations import apply
from dither.archive import Archive
from dither.checkpoint import ARCHIVE_IN_FOLDER as WEIGHTS
from dither.core import CheckpointError, DitherError, SpecError
from dither.integrations.loop import RUN_STATE, add_penalty, begin, withhold_extras
from dither.integrations.model_folder import (
    METHOD,
    check_target,
    copy_rest,
    write_weights,
)
from dither.model import SHADOWS, collect
from dither.terminal import some_names
from dither.train import Run

__all__ = [
    "WEIGHTS",
    "DitherCallback",
    "DitherConfig",
    "DitherQuantizer",
    "push_to_hub",
    "save_pretrained",
]

Path_ = str | os.PathLike[str]


def save_pretrained(
    source: Archive | Run | Path_,
    folder: Path_,
    model: nn.Module | Path_ | None = None,
    tokenizer: Any = None,
) -> int:
    """Write a folder that ``from_pretrained`` reads wherever this module is imported.

    Args:
        source: an archive or its path; or a finished run, whose archive and model are taken.
        folder: where to; a folder that was written before is written over.
        model: the model that was compressed, or its folder, of which everything but the weights
            is taken: configuration, generation settings, tokenizer, code of its own.
        tokenizer: a tokenizer or processor to save beside it.

    Returns:
        Bytes of the file of weights, 128 more than the archive has.

    Raises:
        SpecError: there is no model to take the configuration from, or it is none of transformers.
        CheckpointError: the archive lacks weights of the model, or ``folder`` holds something else.
    """
    if isinstance(source, Run):
        model = source.model if model is None else model
        source = source.archive
    if not isinstance(source, Archive):
        with Archive.open(source) as archive:
            return save_pretrained(archive, folder, model, tokenizer)
    target = Path(folder)
    check_target(target, None if model is None or isinstance(model, nn.Module) else Path(model))
    if isinstance(model, nn.Module):
        whole = _fitting(model, source)
        # Everything that it would write but weights: those of an empty state.
        whole.save_pretrained(target, state_dict={})
    elif model is not None:
        target.mkdir(parents=True, exist_ok=True)
        copy_rest(Path(model), target)
    else:
        raise SpecError("name the model that was compressed, or its folder: model=...")
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    return write_weights(source, target)


def push_to_hub(folder: Path_, repo_id: str, **options: Any) -> str:
    """Upload a folder that :func:`save_pretrained` wrote; returns the address of the commit.

    Args:
        folder: what to upload.
        repo_id: ``user/name``; made if it does not exist.
        options: of ``huggingface_hub.HfApi.create_repo``, such as ``private=True``, and ``token``.
    """
    from huggingface_hub import HfApi

    if not (Path(folder) / WEIGHTS).is_file():
        raise CheckpointError(f"{os.fspath(folder)!r} has no {WEIGHTS}: save_pretrained writes it")
    api = HfApi(token=options.pop("token", None))
    made = api.create_repo(repo_id, exist_ok=True, **options)
    return str(api.upload_folder(folder_path=folder, repo_id=made.repo_id))


def _fitting(model: nn.Module, archive: Archive) -> Any:
    if not isinstance(model, PreTrainedModel):
        raise SpecError(
            f"a {type(model).__name__} is no model of transformers; give its folder instead, or "
            "save the archive with archive.save(path) and load it with dither.load_into"
        )
    names = [name for name in collect(model).values if SHADOWS not in name.split(".")]
    if lacking := [name for name in names if name not in archive]:
        raise CheckpointError(
            f"the archive lacks {some_names(lacking)} of this {type(model).__name__}; give the "
            "model that was compressed, or the folder, if that was what was compressed"
        )
    return model


# --- training ----------------------------------------------------------------------------------


class DitherCallback(TrainerCallback):  # type: ignore[misc]
    """A run in transformers' ``Trainer``: penalty, steps, logs, checkpoints, and the file.

    Attach before the ``Trainer`` is made. Whatever it evaluates is computed with what the file
    would hold; checkpoints resume exactly. Name it before callbacks that should see what it logs,
    predicted bytes and lambda.

    Args:
        run: of the model that the trainer gets.
        folder: where the finished model goes, for ``from_pretrained``; None leaves it to you.
        data: training batches for batch norm's statistics: see ``Run.finish``.
        checkpoint: the folder that training resumes from, if that is none in ``output_dir``.
    """

    def __init__(
        self,
        run: Run,
        folder: Path_ | None = None,
        data: Any = None,
        checkpoint: Path_ | None = None,
    ) -> None:
        self.run = run
        self.nbytes: int | None = None
        self._folder, self._data, self._checkpoint = folder, data, checkpoint
        self._withheld = [p for p in run.extras.parameters() if p.requires_grad]

    def on_init_end(self, *_: object, model: nn.Module, **__: object) -> None:
        """The trainer has its model, and no optimizer yet."""
        if model is not self.run.model:
            raise SpecError("the callback's run is of another model than the trainer's")
        withhold_extras(self.run)

    def on_train_begin(self, args: Any, state: Any, *_: object, **given: Any) -> None:
        """Before the first step, after a checkpoint was read."""
        optimizer = getattr(given["optimizer"], "optimizer", given["optimizer"])
        begin(self.run, state.max_steps, self._withheld, [optimizer])
        if state.global_step:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self._restore(Path(self._checkpoint or folder))

    def on_pre_optimizer_step(self, *_: object, optimizer: Any, **__: object) -> None:
        """Gradients are complete, unscaled and clipped."""
        scaler = getattr(optimizer, "scaler", None)
        add_penalty(self.run, 1.0 if scaler is None else scaler.get_scale())

    def on_optimizer_step(self, *_: object, **__: object) -> None:
        """Gradients are still there."""
        self.run.step()

    def on_log(self, _: object, state: Any, *__: object, logs: dict[str, Any], **___: Any) -> None:
        """Add to what callbacks behind this one, and the history, are told."""
        if "loss" in logs:
            logs.update(self.run.metrics())
            state.log_history[-1].update(self.run.metrics())

    def on_save(self, args: Any, state: Any, *_: object, **__: object) -> None:
        """A checkpoint is written."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save(self.run.state_dict(), folder / RUN_STATE)

    def on_train_end(self, args: Any, state: Any, *_: object, **given: Any) -> None:
        """After the last step, and after the best checkpoint was read, if that is asked for."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._restore(Path(state.best_model_checkpoint))
        self.nbytes = self.run.finish(self._data)
        if self._folder is not None and state.is_world_process_zero:
            save_pretrained(self.run, self._folder, tokenizer=given.get("processing_class"))

    def _restore(self, folder: Path) -> None:
        if not (folder / RUN_STATE).is_file():
            raise CheckpointError(
                f"{str(folder)!r} has no {RUN_STATE}, without which the run cannot go on; name the "
                "checkpoint that training resumes from: DitherCallback(run, checkpoint=...)"
            )
        self.run.load_state_dict(torch.load(folder / RUN_STATE, weights_only=True))


# --- reading -----------------------------------------------------------------------------------


@register_quantization_config(METHOD)
class DitherConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``config.json`` says of a folder whose weights are an archive."""

    def __init__(self, **_: object) -> None:
        self.quant_method = METHOD


@register_quantizer(METHOD)
class DitherQuantizer(HfQuantizer):  # type: ignore[misc]
    """Gives transformers' own loading the decoded tensors, as a file that goes when it is done.

    So names are converted, types and devices chosen and ties made as for any other weights.
    """

    requires_calibration = True  # it reads what is compressed, and compresses nothing itself

    @property
    def is_trainable(self) -> bool:
        """The model is a plain one."""
        return True

    def is_serializable(self, *_: object, **__: object) -> bool:
        """Plain weights are."""
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before the files are looked for: says which to take."""
        config.transformers_weights = WEIGHTS
        return config

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        **_: object,
    ) -> None:
        if not checkpoint_files:
            raise DitherError(
                "this transformers does not say which files it reads; install 5.0 or later"
            )
        with Archive.open(checkpoint_files[0]) as archive, _plain_settings():
            self._sites = dict(archive.sites)
            folder = tempfile.mkdtemp(prefix="dither-")
            self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            ties = getattr(model, "all_tied_weights_keys", None) or {}
            decoded = Path(folder) / "model.safetensors"
            save_file(_apart(archive, set(ties)), decoded, {"format": "pt"})
        checkpoint_files[:] = [str(decoded)]

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: object
    ) -> PreTrainedModel:
        placed = getattr(model, "hf_device_map", None) or {}
        if "disk" in placed.values():
            model.__dict__["_dither_decoded"] = self  # weights are read from the file, later on
        else:
            # Out of the file's memory, which ends with it, and whose odd places in memory let
            # kernels sum in another order than for the model that was evaluated.
            for value in (*model.parameters(), *model.buffers()):
                value.data = value.detach().clone()
            self._remove()
        self.remove_quantization_config(model)
        vars(model.config).pop("transformers_weights", None)
        if self._sites:
            apply(model, _sites_of(model, self._sites))
        return model


@contextmanager
def _plain_settings() -> Iterator[None]:
    """Those that decoding expects: transformers calls while new tensors have no memory."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _apart(archive: Archive, ties: Collection[str]) -> dict[str, Tensor]:
    """Tensors with memory of their own, without names that the model itself ties."""
    state = archive.state_dict()
    for alias in archive.aliases:
        if alias in ties:
            del state[alias]
        else:
            state[alias] = state[alias].clone()
    return {name: value.contiguous() for name, value in state.items()}


def _sites_of(model: PreTrainedModel, sites: Mapping[str, Any]) -> dict[str, Any]:
    """Sites by the paths of a model with, or without, the head that was compressed with it."""
    paths = {path for path, _ in model.named_modules()}
    prefix = model.base_model_prefix
    found = {}
    for site, grid in sites.items():
        path, _, end = site.rpartition("@")
        for name in (path, f"{prefix}.{path}" if path else prefix, path.removeprefix(f"{prefix}.")):
            if name in paths:
                found[f"{name}@{end}"] = grid
                break
    return found
