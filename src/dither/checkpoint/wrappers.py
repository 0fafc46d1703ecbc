"""Names as a model has them before it is wrapped."""

from __future__ import annotations

from torch import Tensor

_WRAPPERS = ("module.", "_orig_mod.")


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes that DistributedDataParallel and torch.compile add."""
    while tensors:
        for prefix in _WRAPPERS:
            if all(name.startswith(prefix) and name != prefix for name in tensors):
                tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
                break
        else:
            break
    return tensors
