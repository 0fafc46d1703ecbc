"""Loops that numba compiles where it is installed, and where the work is worth the wait.

A *twin* computes what the plain code beside it computes, to the last bit; the plain code is the
definition, and what is run where numba is missing. A twin is an ordinary function of arrays and
numbers. It is compiled when it is first worth it, and kept on disk, as numba keeps it: beside the
source, or in the user's folder of caches where that is read-only, or in ``NUMBA_CACHE_DIR``.

What is compiled checks no bounds. A twin therefore proves or checks every index that a file could
lead astray.

``DITHER_COMPILED`` is ``auto``, ``never`` (always the plain code) or ``always`` (for tests).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from threading import RLock
from typing import Any, Generic, ParamSpec, TypeVar

import numpy as np

if sys.platform != "win32":
    import fcntl

P = ParamSpec("P")
R = TypeVar("R")

LOADING = 1.0
"""Seconds of plain code for which loading numba is worth it: loading takes about half of them."""

FIRST = 0.1
"""Seconds that reading a compiled function from disk takes, at most; compiling it takes one or two,
once on each machine."""

_lock = RLock()


class _Ledger:
    """What a process has spent on plain code that has a twin, and whether numba is there."""

    seconds = 0.0
    numba: Any = None
    missing = False


def mode() -> str:
    """``auto``, ``never`` or ``always``."""
    return os.environ.get("DITHER_COMPILED", "auto")


def _load() -> bool:
    """Import numba; False where that fails, as it does beside a version of NumPy it is not for."""
    with _lock:
        if _Ledger.numba is None and not _Ledger.missing:
            try:
                _Ledger.numba = importlib.import_module("numba")
            except ImportError:
                _Ledger.missing = True
    return not _Ledger.missing


def expect(seconds: float) -> None:
    """Tell how long plain code would take for all that is about to come: then nobody tries first.

    Args:
        seconds: about; less than :data:`LOADING` change nothing.
    """
    if seconds >= LOADING:
        _Ledger.seconds = max(_Ledger.seconds, LOADING)


class Twin(Generic[P, R]):
    """A function that may be compiled.

    >>> Twin(abs).chosen(0.0) is None  # not worth it
    True
    """

    def __init__(self, function: Callable[P, R], *parts: Callable[..., object]) -> None:
        """Keep a function of arrays and numbers, and those that it calls, of one module."""
        self.function, self._parts = function, parts
        self._owed = 0.0
        self._compiled: Any = None
        self._known: set[tuple[object, ...]] = set()

    def chosen(self, seconds: float) -> Callable[P, R] | None:
        """The compiled function where it is worth it, else None: run the plain code.

        As long as all that could have been saved so far is less than what compiled code takes to
        load, plain code runs. So nobody waits more than twice as long as with the better choice.

        Args:
            seconds: what the plain code is about to take.
        """
        if self._compiled is not None and mode() != "never":
            return self._call
        if _Ledger.missing or mode() == "never":
            return None
        _Ledger.seconds += seconds
        self._owed += seconds
        if mode() != "always":
            waiting = _Ledger.seconds < LOADING if _Ledger.numba is None else self._owed < FIRST
            if waiting:
                return None
        if _Ledger.numba is None and find_spec("numba") is None:
            _Ledger.missing = True
        return self._call if _load() and self._prepared() else None

    def _prepared(self) -> bool:
        with _lock:
            if self._compiled is None:
                for part in self._parts:
                    importlib.import_module("numba.extending").register_jitable(part)
                options = {"nogil": True, "error_model": "numpy"}
                try:
                    self._compiled = _Ledger.numba.njit(cache=True, **options)(self.function)
                except RuntimeError:  # no folder to keep it in
                    self._compiled = _Ledger.numba.njit(**options)(self.function)
        return True

    def _call(self, *args: P.args, **kwargs: P.kwargs) -> R:
        key = tuple(_kind(argument) for argument in args)
        if key not in self._known:
            with _lock, _alone(self._compiled.stats.cache_path):
                self._compiled.compile(tuple(map(_Ledger.numba.typeof, args)))
                self._known.add(key)
        result: R = self._compiled(*args, **kwargs)
        return result


def _kind(argument: object) -> object:
    """What numba compiles anew for."""
    if isinstance(argument, np.ndarray):
        return argument.dtype, argument.flags.num, argument.ndim
    return type(argument)


@contextmanager
def _alone(folder: str | None) -> Iterator[None]:
    """Let no two processes write to a folder of compiled code at once.

    Numba would let two that compile a function for different types give both the same file.
    """
    with ExitStack() as opened:
        if folder is not None and sys.platform != "win32":
            with suppress(OSError):  # then numba cannot write there either
                Path(folder).mkdir(parents=True, exist_ok=True)
                held = opened.enter_context((Path(folder) / ".dither.lock").open("w"))
                fcntl.flock(held, fcntl.LOCK_EX)
        yield
