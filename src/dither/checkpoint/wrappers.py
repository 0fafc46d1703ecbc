"""Names as a model has them before it is wrapped."""

from __future__ import annotations

from torch import Tensor

from dither.model import plain_names


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what torch.compile, data parallelism and averages of weights add."""
    return {plain: tensors[name] for name, plain in plain_names(tensors).items()}
