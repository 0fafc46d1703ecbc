"""What is compressed: a model, tensors by name, or a file of them."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn

from dither.archive import load_weights
from dither.core import SpecError
from dither.model import inner, refuse_attached

Source = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]
"""A model, a dict of tensors by name, or the path of weights."""


def weights_in(source: Source, what: str, *, run: bool = False) -> nn.Module | Mapping[str, Tensor]:
    """A model out of its wrappers, or tensors by name, read from a file if a path is given.

    Args:
        source: any of these.
        what: is to be done.
        run: it is to be run, which a file cannot.

    Raises:
        CheckpointError: the file cannot be read.
        SpecError: the source is none of these, a file that is to be run, or a model that is
            attached to a run.
    """
    if isinstance(source, str | os.PathLike):
        if run:
            raise SpecError(
                f"data runs through a model, and {os.fspath(source)!r} holds weights: load them "
                "into the model, and give that"
            )
        return load_weights(source)
    if not isinstance(source, nn.Module | Mapping):
        raise SpecError(
            f"{what} takes a model, a dict of tensors or the path of a file or folder of weights, "
            f"not {type(source).__name__}"
        )
    refuse_attached(source, what)
    return inner(source) if isinstance(source, nn.Module) else source
