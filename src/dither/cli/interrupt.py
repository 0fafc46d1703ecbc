"""Ctrl-C, and being told to end: the process answers within a second, whatever it is in."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

GRACE = 0.7
"""Seconds that work has to end by itself, as an exception does, before the process ends it."""

SIGNALLED = 128
"""Exit status of a signal, with its number added."""

INTERRUPTED = SIGNALLED + signal.SIGINT
SAID = "interrupted"


def answer_signals() -> None:
    """End the process soon after SIGINT, SIGTERM or SIGHUP, and what it was writing with it.

    Python's handlers wait for the main thread to come back from what it computes, and an exception
    in it waits for the threads that it started: seconds or minutes, in a loop over a large tensor.
    The system's own part of a handler is told at once, and wakes a thread that waits for it. Where
    another handler is set already, it stays.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    answered = {signal.SIGINT} if signal.getsignal(signal.SIGINT) is _usual else set()
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)
            answered.add(number)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def wait() -> None:
        with ours, theirs:
            number = 0
            while number not in answered:
                number = ours.recv(1)[0]
            time.sleep(GRACE)  # most often the process is gone by then
            _leave(number)

    threading.Thread(target=wait, name="dither-signals", daemon=True).start()


_usual: Callable[[int, FrameType | None], object] = signal.default_int_handler


def _end(number: int, _: object) -> None:
    """End as an exception does: what is being written is removed."""
    raise SystemExit(SIGNALLED + number)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """End the process with a block that a signal ended.

    By itself Python would wait for its threads, and take down torch with care, for seconds.
    """
    try:
        yield
    except SystemExit as end:
        if isinstance(end.code, int) and end.code > SIGNALLED:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(end.code)
        raise


class _Told:
    """Whether the user was told."""

    is_so = False


def told() -> None:
    """Note that the user was told of the interruption."""
    _Told.is_so = True


def _leave(number: int) -> None:
    """End now; nothing that another thread may hold is waited for."""
    # Found, not imported: before it has loaded, nothing is being written.
    for path in list(getattr(sys.modules.get("dither.archive.atomic"), "UNFINISHED", ())):
        path.unlink(missing_ok=True)
    if number == signal.SIGINT and not _Told.is_so:
        os.write(2, f"{SAID}\n".encode())
    os._exit(SIGNALLED + number)
