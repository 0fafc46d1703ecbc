"""What a result depends on: commit, versions, machine. Packages are imported when asked for."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path


def describe() -> dict[str, object]:
    """Command, commit, versions and machine, for the head of a results file."""
    import numpy as np
    import torch

    import dither

    return {
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "commit": commit(),
        "dither": dither.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
    }


def commit(folder: Path | None = None) -> str:
    """Of the repository, or that around a folder; with a plus where files differ from it."""
    at = ["-C", str(folder or Path())]
    return _git(*at, "rev-parse", "--short", "HEAD") + ("+" if _git(*at, "diff", "--stat") else "")


def machine() -> str:
    """Processor and cores."""
    return f"{_processor()}, {os.cpu_count()} cores"


def _module() -> str:
    main = sys.modules["__main__"]
    return main.__spec__.name if main.__spec__ else Path(sys.argv[0]).stem


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
