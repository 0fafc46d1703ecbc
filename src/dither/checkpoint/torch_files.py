"""Files of ``torch.save``, of which no code is run."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dither.checkpoint.kinds import PICKLE_MARK, ZIP_MARK, guarded
from dither.checkpoint.wrappers import unwrapped
from dither.core import CheckpointError, without_extra_state
from dither.terminal import some_names

_MODEL_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "model_state",
    "net",
    "network",
    "params",
    "params_ema",
    "ema",
    "ema_state_dict",
    "module",
    "weights",
)
_TRAINING_KEYS = re.compile(r"optim|sched|scaler|callbacks|loops|(^|_)rng", re.IGNORECASE)
_DEEPEST = 4


class _Left:
    """What stands in a training file for a value that is no tensor: it holds and does nothing."""

    def __new__(cls, *_: object, **__: object) -> Self:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _empty(*_: object) -> dict[object, object]:
    """For a dict that makes its values: a plain one, into which its items are put."""
    return {}


_LEFT = (
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    *("numpy.dtype", "numpy.ndarray", "argparse.Namespace", "types.SimpleNamespace", "_io.BytesIO"),
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    ),
    *(f"builtins.{name}" for name in ("list", "dict", "tuple", "int", "float", "str", "bool")),
)
"""What training loops save beside weights. None of it is made: each is a :class:`_Left`."""

_ALLOWED: list[Any] = [
    *((type(name.rpartition(".")[2], (_Left,), {}), name) for name in _LEFT),
    (_empty, "collections.defaultdict"),
]
_allowing = threading.Lock()  # what torch allows, it allows in the whole process


def read_torch(path: Path, key: str | None) -> dict[str, Tensor]:
    """The state dict of a file, which stands under ``key`` where there are several."""
    with path.open("rb") as file:
        head = file.read(len(ZIP_MARK))

    def read() -> object:
        try:
            with (
                _allowing,
                torch.serialization.safe_globals(_ALLOWED),
                warnings.catch_warnings(),
            ):
                # Of another protocol; what cannot be read of it is an error anyhow.
                warnings.filterwarnings("ignore", "Detected pickle protocol")
                mapped = head == ZIP_MARK
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:
            _refuse_pickle(path, str(error), is_pickle=head.startswith(PICKLE_MARK))
            raise

    found, state = _find_state(path, guarded(path, "PyTorch file", read), key)
    state = without_extra_state(state)
    wrong = [f"{name!r} ({type(v).__name__})" for name, v in state.items() if not _is_tensor(v)]
    if wrong:
        raise CheckpointError(
            f"{str(path)!r}{found} has entries that are no tensors: {some_names(wrong)}; save a "
            "state dict of tensors only"
        )
    return unwrapped({name: value.detach() for name, value in state.items()})


def _refuse_pickle(path: Path, reason: str, *, is_pickle: bool) -> None:
    """Say what to do about a file that only pickle can read, if that is the reason."""
    unsupported = re.search(r"Unsupported (?:global|class)[^\n]*?([\w]+(?:\.[\w<>]+)+)", reason)
    scripted = "TorchScript" in reason
    foreign = is_pickle and re.search("magic number|Unsupported operand|not enough", reason)
    if foreign and not unsupported:
        raise CheckpointError(
            f"{str(path)!r} is a pickle that torch.save did not write, and reading it could run "
            "code from the file, which dither does not do. If you trust it, load it yourself and "
            "save its tensors: torch.save(state_dict, 'weights.pt')"
        )
    if not (unsupported or scripted or ".tar" in reason):
        return
    if unsupported:
        holds = f"it holds an object of type {unsupported[1]}"
    else:
        holds = "it is a TorchScript archive" if scripted else "it has the .tar form of 2017"
    load = "torch.jit.load(path)" if scripted else "torch.load(path, weights_only=False)"
    raise CheckpointError(
        f"{str(path)!r} is more than tensors: {holds}, and reading it could run code from the "
        f"file, which dither does not do. If you trust it, load it yourself with {load} and save "
        "its state dict: torch.save(model.state_dict(), 'weights.pt')"
    )


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _find_state(path: Path, loaded: object, key: str | None) -> tuple[str, Mapping[Any, Any]]:
    """The state dict in what a file holds, and where it was found."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{str(path)!r} holds a {type(loaded).__name__}, not a state dict; save "
            "model.state_dict()"
        )
    choices = {".".join(where): state for where, state in _states(loaded)}
    if key is not None:
        if key not in choices:
            raise CheckpointError(
                f"{str(path)!r} has no state dict under {key!r}; there are "
                f"{some_names([repr(where) for where in choices]) or 'none'}"
            )
    elif not choices:
        raise CheckpointError(
            f"{str(path)!r} holds no state dict; it has the entries "
            f"{some_names([repr(name) for name in loaded]) or '(none)'}"
        )
    elif "" in choices:
        key = ""
    else:
        named = [where for where in choices if where.split(".")[0] in _MODEL_KEYS]
        likely = named or list(choices)
        if len(likely) > 1:
            raise CheckpointError(
                f"{str(path)!r} holds several state dicts: {some_names([repr(x) for x in likely])}"
                "; say which with key=... (on the command line: --key)"
            )
        key = likely[0]
    state = choices[key]
    if strange := [repr(name) for name in state if not isinstance(name, str)]:
        raise CheckpointError(
            f"{str(path)!r} has names that are no strings: {some_names(strange)}; save a state dict"
        )
    return (f" (under {key!r})" if key else ""), state


def _states(
    value: Mapping[Any, Any], where: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """All mappings that hold tensors, outermost only; what training left is passed over.

    A mapping that also nests a model's state dict under a usual name is not itself one: its
    tensors are an epoch, a score.
    """
    nested = [(name, item) for name, item in value.items() if isinstance(item, Mapping)]
    nests_model = any(name in _MODEL_KEYS and any(_states(item)) for name, item in nested)
    if not nests_model and any(map(_is_tensor, value.values())):
        yield where, value
        return
    if len(where) >= _DEEPEST:
        return
    for name, item in nested:
        if not isinstance(name, str) or _TRAINING_KEYS.search(name) or "param_groups" in item:
            continue
        yield from _states(item, (*where, name))
