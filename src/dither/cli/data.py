"""Models and data of the command line: named objects of the user's, or text for a model folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dither.checkpoint import Pages
from dither.cli.folders import folder_model, scored, tokenized
from dither.core import CheckpointError, SpecError
from dither.data import Data
from dither.disk import home_of, on_disk
from dither.model import weights_of


def named(text: str, option: str) -> Any:  # noqa: ANN401 - whatever the user wrote
    """The object that ``module:name`` means, modules of the current folder included.

    Raises:
        SpecError: there is none.
    """
    module, colon, path = text.partition(":")
    if not (module and colon and path):
        raise SpecError(f"{option} {text!r}: write MODULE:NAME, such as mypackage.train:build")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"{option} {text!r}: {error}") from error
    return found


def model_of(
    text: str | None, source: Path, state: Mapping[str, Tensor], disk: Path | None = None
) -> nn.Module:
    """The model that ``--model`` names with the weights of a source; without, that of a folder.

    Args:
        text: ``module:name`` of a module, or of a function that makes one; None for the model that
            a Hugging Face folder describes.
        source: of the weights.
        state: its tensors.
        disk: a folder for the model's parameters, which are then not in memory.

    Raises:
        CheckpointError: the weights do not fit.
        SpecError: there is no such model, or it is in memory already.
    """
    if disk is None:
        return folder_model(source) if text is None else _loaded(_made(text), text, source, state)
    with on_disk(disk, after=Pages.of(state.values()).release):
        if text is None:
            return folder_model(source, state)
        model = _made(text)
        if home_of(model) is None:
            raise SpecError(f"--model {text!r} is in memory; name a function that makes the model")
        return _loaded(model, text, source, state)


def _made(text: str) -> nn.Module:
    made = named(text, "--model")
    model = made if isinstance(made, nn.Module) else made()
    if not isinstance(model, nn.Module):
        raise SpecError(f"--model {text!r} gives {type(model).__name__}, not a torch module")
    return model


def _loaded(model: nn.Module, text: str, source: Path, state: Mapping[str, Tensor]) -> nn.Module:
    """The model with the tensors of a state; of one on a disk, one after another."""
    wanted = {name: value.shape for name, value in weights_of(model.state_dict()).items()}
    missing = [n for n in dict(model.named_parameters()) if n not in state]
    wrong = [n for n, shape in wanted.items() if n in state and state[n].shape != shape]
    if missing or wrong:
        raise CheckpointError(
            f"{str(source)!r} does not fit the model of {text!r}: {(missing or wrong)[:5]} are "
            f"{'missing' if missing else 'of another shape'}"
        )
    found, home = {n: v for n, v in state.items() if n in wanted}, home_of(model)
    pages = Pages.of(() if home is None else state.values())
    for some in [found] if home is None else [{name: value} for name, value in found.items()]:
        model.load_state_dict(some, strict=False)
        if home is not None:
            home.release()
        pages.release()
    return model.eval()


def data_of(text: str, source: Path, model: nn.Module, seed: int | None = None) -> Data:
    """The batches that ``--data`` names, and how the model runs on them.

    Args:
        text: ``module:name`` of a loader or of a function that makes one; or a text file, one
            sample in each line, for a model folder with a ``tokenizer.json``.
        source: that folder.
        model: if it is one of transformers, its scores or last hidden states are what counts.
        seed: is given to a function that has a parameter of this name.

    Raises:
        SpecError: there are none.
    """
    if ":" in text and not Path(text).exists():
        made = named(text, "--data")
        seeded = seed is not None and callable(made) and "seed" in signature(made).parameters
        given = {"seed": seed} if seeded else {}
        loader: Iterable[Any] = made if isinstance(made, Iterable) else made(**given)
        return loader if isinstance(loader, Data) else scored(model, loader)
    path = Path(text)
    if not path.is_file():
        raise SpecError(f"--data {text!r}: there is no such file; or write MODULE:NAME")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return scored(model, list(tokenized([line for line in lines if line], source)))


def evaluate_of(text: str | None) -> Callable[[nn.Module], float] | None:
    """The function that ``--evaluate`` names."""
    if text is None:
        return None
    found: Callable[[nn.Module], float] = named(text, "--evaluate")
    if not callable(found):
        raise SpecError(f"--evaluate {text!r} is {type(found).__name__}, not a function")
    return found
