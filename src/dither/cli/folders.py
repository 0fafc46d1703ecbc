"""Models of Hugging Face folders, with their heads, and text as they read it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dither.archive import is_archive
from dither.core import CheckpointError, DitherError, SpecError
from dither.data import Data, call, divergence, squared
from dither.model import evaluating
from dither.terminal import some_names

_ROWS = 32
_MOST_TOKENS = 256
_NO_SCORES = ("regression", "multi_label_classification")
"""Kinds of problems whose logits are no shares of one whole."""


def folder_model(source: Path, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The model of a folder in float32, of the class that its configuration names, if it does.

    Args:
        source: the folder.
        state: its tensors, to be taken one after another; by default transformers reads them all.

    Raises:
        CheckpointError: the folder lacks weights of the model.
        SpecError: it is no model folder.
        DitherError: transformers is missing, or does not read the folder.
    """
    if not (source / "config.json").is_file():
        raise SpecError(
            f"data run through a model, and {str(source)!r} is not a model folder with a "
            "config.json; name the model: --model MODULE:FUNCTION"
        )
    try:
        import transformers
    except ImportError as error:
        raise DitherError(
            'a model folder is built by transformers; run: pip install "dither[hf]"'
        ) from error
    if is_archive(source):
        importlib.import_module("dither.integrations.transformers")  # which teaches it to read them
    try:
        config = transformers.AutoConfig.from_pretrained(str(source))  # type: ignore[no-untyped-call,unused-ignore]
        named = [getattr(transformers, name, None) for name in config.architectures or ()]
        kind: Any = next((kind for kind in named if kind is not None), transformers.AutoModel)
        if state is None:
            where, how = str(source), {}
        else:
            where, how = None, {"config": config, "state_dict": dict(state)}
            # No tensor is read before the one before it is in its place.
            os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
        model, info = kind.from_pretrained(
            where, dtype=torch.float32, output_loading_info=True, local_files_only=True, **how
        )
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        raise DitherError(
            f"transformers does not read {str(source)!r} ({type(error).__name__}: {said}); build "
            "the model yourself: --model MODULE:FUNCTION"
        ) from error
    if lacking := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{str(source)!r} does not fit the model: {some_names(lacking)} are missing, of its "
            f"{type(model).__name__}; fix its config.json, or name the model: "
            "--model MODULE:FUNCTION"
        )
    made: nn.Module = model.eval()
    return made


def scored(model: nn.Module, loader: Iterable[Any]) -> Data:
    """Data of a model of transformers: its scores count, or where there are none, hidden states.

    Scores are told from others by their name in the output, ``logits`` or ``start_logits``. They
    are shares of one whole, and compared as such (:func:`~dither.data.divergence`), but for those
    of regression and of several labels.

    Args:
        model: any other is run as it is.
        loader: of batches as the model takes them.

    Raises:
        SpecError: there is no batch.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "problem_type"):
        return Data(loader)
    if not hasattr(config, "pad_token_id") or config.pad_token_id is None:
        config.pad_token_id = -1  # none is padded: classifiers of decoders read the last token
    data = Data(loader)
    with evaluating(model), torch.no_grad():
        output = _outputs(model, next(iter(data)))
    scores = [name for name in output if name.endswith("logits")]
    hidden = [name for name in output if name == "last_hidden_state"]
    names = tuple(scores or hidden)
    if not names:
        return data
    is_one = config.problem_type in _NO_SCORES or any(output[n].shape[-1] == 1 for n in scores)
    distance = divergence if scores and not is_one else squared
    return Data(loader, forward=partial(_chosen, names=names), distance=distance)


def _chosen(model: nn.Module, batch: object, names: tuple[str, ...]) -> list[Tensor]:
    output = _outputs(model, batch)
    return [output[name] for name in names]


def _outputs(model: nn.Module, batch: object) -> dict[str, Tensor]:
    """Tensors by name; encoder-decoders predict the text that they read, if given no other."""
    if isinstance(batch, Mapping) and "input_ids" in batch:
        begin: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if getattr(model.config, "is_encoder_decoder", False) and not any(
            name.startswith(("decoder_", "labels")) for name in batch
        ):
            ids = batch["input_ids"]
            batch = {**batch, "decoder_input_ids": ids if begin is None else begin(ids)}
    output = call(model, batch)
    parts = output if isinstance(output, Mapping) else {}
    return {name: part for name, part in parts.items() if isinstance(part, Tensor)}


def tokenized(lines: list[str], source: Path) -> Iterable[dict[str, Tensor]]:
    """Batches of sentences of one length, so that none is padded.

    Raises:
        SpecError: the folder has no ``tokenizer.json``.
        DitherError: tokenizers is missing.
    """
    vocabulary = source / "tokenizer.json"
    if not vocabulary.is_file():
        raise SpecError(f"a text file as --data needs {str(vocabulary)!r}; or write MODULE:NAME")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DitherError('text is cut by tokenizers; run: pip install "dither[hf]"') from error
    tokenizer = Tokenizer.from_file(str(vocabulary))
    tokenizer.no_padding()
    tokenizer.enable_truncation(_MOST_TOKENS)
    rows = sorted((row.ids for row in tokenizer.encode_batch(lines) if row.ids), key=len)
    for _, same in groupby(rows, key=len):
        alike = list(same)
        for start in range(0, len(alike), _ROWS):
            ids = torch.tensor(alike[start : start + _ROWS])
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
