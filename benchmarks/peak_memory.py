"""The memory that this process takes at its peak, as Linux tells it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"


def restart_for_exact_peaks() -> None:
    """Start this program anew, once, so that what is freed goes back to the system.

    Else it stays with the process, and hides what is taken next.
    """
    if not os.environ.get(_THRESHOLD):
        os.environ[_THRESHOLD] = str(1 << 16)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - itself


class Peak:
    """Grows from now on are seen.

    >>> peak = Peak()
    >>> peak.grew() < 1 << 20
    True
    """

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self._before = _status("VmRSS")

    def grew(self) -> int:
        """By how many bytes the process was larger at its peak than at the start."""
        return _status("VmHWM") - self._before

    @staticmethod
    def whole() -> int:
        """How many bytes it has had at its peak."""
        return _status("VmHWM")


def _status(what: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(what):
            return int(line.split()[1]) << 10
    raise OSError(f"the system does not tell {what}")
