"""Names and shapes as a model of transformers has them, from those that its folder has on disk."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def converted(
    model: nn.Module, read: Callable[[], Mapping[str, Tensor]]
) -> dict[str, Tensor] | None:
    """Tensors by the names that the model has, where transformers knows how to convert them.

    Folders may hold one matrix for each expert where the model has all in one tensor, or names of
    an earlier version. The library's own loading converts them, on a model of its own.

    Args:
        model: is left as it was.
        read: gives all tensors by the names of the folder; is called only for such a model.

    Returns:
        What the model has and the state too; what the model does not know under its own name; None
        if the model is none of transformers, or the state does not fit it.
    """
    library = sys.modules.get("transformers")  # it made the model, if it is one of its own
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    state = read()
    types = [value.dtype for value in state.values() if value.is_floating_point()]
    try:
        with _silent(library), torch.random.fork_rng(devices=[]):
            made, info = type(model).from_pretrained(
                None,
                config=copy.deepcopy(model.config),
                state_dict=dict(state),
                dtype=types[0] if types else None,
                output_loading_info=True,
            )
    except Exception:  # noqa: BLE001 - whatever the library says of a state that does not fit
        return None
    lacking, unknown = set(info["missing_keys"]), set(info["unexpected_keys"])
    found: dict[str, Tensor] = {n: v for n, v in made.state_dict().items() if n not in lacking}
    return found | {name: value for name, value in state.items() if name in unknown}


@contextmanager
def _silent(library: object) -> Iterator[None]:
    """No bars and tables of the library's: what differs is said by ours."""
    logging = library.utils.logging  # type: ignore[attr-defined]
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
