"""Names as a model has them before it is wrapped."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

_PREFIXES = ("module.", "_orig_mod.")


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Names in a state dict, each with the name in the model before it was wrapped.

    An average's count of models has none.

    >>> plain_names(
    ...     ["n_averaged", "module._orig_mod.0.weight", "module._orig_mod.1._orig_mod.bias"]
    ... )
    {'module._orig_mod.0.weight': '0.weight', 'module._orig_mod.1._orig_mod.bias': '1.bias'}
    """
    found = {name: name for name in names}
    while True:
        inside = {name: plain for name, plain in found.items() if plain != "n_averaged"}
        for prefix in _PREFIXES:
            if inside and all(p.startswith(prefix) and p != prefix for p in inside.values()):
                found = {name: plain.removeprefix(prefix) for name, plain in inside.items()}
                break
        else:
            break
    short = {name: plain.replace("._orig_mod.", ".") for name, plain in found.items()}
    return short if len(set(short.values())) == len(short) else found


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what torch.compile, data parallelism and averages of weights add."""
    return {plain: tensors[name] for name, plain in plain_names(tensors).items()}
