"""The same bits and bytes, whatever a process's surroundings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import dither
from fixtures.make import FOLDER

PROGRAM = """
import hashlib, json
from pathlib import Path
import torch
import dither

found = {{}}
for path in sorted(Path({folder!r}).glob("*.dither")):
    digest = hashlib.sha256()
    for name, value in dither.load(path).items():
        digest.update(name.encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    found[path.stem] = digest.hexdigest()
generator = torch.Generator().manual_seed(0)
state = {{f"layer{{n}}.weight": torch.randn(48, 32 + n, generator=generator) for n in range(3)}}
for size in ("4x", "12x"):
    archive = dither.compress(state, size)
    archive.save("small.dither")
    found[size] = hashlib.sha256(Path("small.dither").read_bytes()).hexdigest()
print(json.dumps(found))
"""

SURROUNDINGS = (
    {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
    {"OMP_NUM_THREADS": "3", "PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "Asia/Tokyo"},
)


def test_threads_hash_seeds_and_locales_change_nothing(tmp_path: Path) -> None:
    runs = []
    for number, some in enumerate(SURROUNDINGS):
        folder = tmp_path / str(number)
        folder.mkdir()
        runs.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM.format(folder=str(FOLDER))],
                cwd=folder,
                env={**os.environ, **some},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    found = [json.loads(run.communicate()[0]) for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert found[0] == found[1]
    assert len(found[0]) == len(list(FOLDER.glob("*.dither"))) + 2


def test_where_numbers_lie_in_memory_changes_nothing() -> None:
    """Buffers at odd addresses, as a mapped file may have them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 48, generator=generator)
    files = set()
    for offset in (0, 4, 12, 60):
        room = np.zeros(weight.numel() * 4 + 64, np.uint8)
        values = np.frombuffer(room.data, np.float32, weight.numel(), offset)
        values[:] = weight.numpy().reshape(-1)
        moved = torch.from_numpy(values).view(64, 48)
        files.add(dither.compress({"weight": moved}, "8x").to_bytes())
    assert len(files) == 1
