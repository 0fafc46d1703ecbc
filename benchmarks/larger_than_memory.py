"""Compress a folder of shards that is larger than memory should be, and kill it on the way.

``python -m benchmarks.larger_than_memory --gb 6 --kill 10 --json FILE`` makes a folder of weights
like a language model's (bfloat16; heavy tails, rows of different scale; seeded), compresses it
without data in a process of its own, and notes that process's peak of resident memory, files that
it maps included. ``--kill N`` then does the same job under another name, kills it (SIGKILL) N times
at random moments, lets it end, and compares the SHA-256 of both files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SHARD = 1 << 29
"""Values of a shard, at most, but for a tensor that has more."""

TAIL, ROWS = 0.25, 0.4
"""Deviations of the logarithm of scales: of each value and of each row."""

Named = tuple[str, tuple[int, ...]]
"""A tensor's name and shape."""


def layers(gb: float, width: int) -> list[Named]:
    """Names and shapes of bfloat16 tensors of about so many gigabytes: a table, and layers."""
    inner, left = width * 43 // 16, int(gb * 1e9 / 2)
    found: list[Named] = [("model.embed_tokens.weight", (8 * width, width))]
    left -= 8 * width * width
    for number in range(10**6):
        within = f"model.layers.{number}"
        block: list[Named] = []
        block += [(f"{within}.self_attn.{part}_proj.weight", (width, width)) for part in "qkvo"]
        block += [(f"{within}.mlp.{part}_proj.weight", (inner, width)) for part in ("gate", "up")]
        block += [(f"{within}.mlp.down_proj.weight", (width, inner))]
        block += [(f"{within}.input_layernorm.weight", (width,))]
        for name, shape in block:
            if left <= 0:
                return found
            found.append((name, shape))
            left -= math.prod(shape)
    return found


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    """Values of a layer, bfloat16."""
    import torch

    noise = torch.Generator().manual_seed(seed)
    if len(shape) == 1:
        return (1 + 0.1 * torch.randn(shape, generator=noise)).bfloat16()
    rows = torch.randn(shape[0], 1, generator=noise).mul_(ROWS).exp_()
    tails = torch.randn(shape, generator=noise).mul_(TAIL).exp_()
    values = torch.randn(shape, generator=noise).mul_(tails).mul_(rows)
    return values.mul_(shape[1] ** -0.5).bfloat16()


def make(folder: Path, listed: list[Named]) -> None:
    """Write the shards and their index."""
    from safetensors.torch import save_file

    placed: dict[str, str] = {}
    for number, part in enumerate(_shards(listed)):
        file = f"model-{number:05}.safetensors"
        tensors = {name: drawn(shape, len(placed) + i) for i, (name, shape) in enumerate(part)}
        save_file(tensors, folder / file)
        placed |= dict.fromkeys(tensors, file)
    index = json.dumps({"weight_map": placed})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def _shards(listed: list[Named]) -> Iterator[list[Named]]:
    part: list[Named] = []
    for name, shape in listed:
        if part and sum(math.prod(s) for _, s in part) + math.prod(shape) > SHARD:
            yield part
            part = []
        part.append((name, shape))
    yield part


def start(source: Path, output: Path, size: str) -> subprocess.Popen[bytes]:
    """Begin the job."""
    command = [sys.executable, "-m", "dither", "compress", str(source), "-q"]
    return subprocess.Popen([*command, "--size", size, "-o", str(output)])


def measured(source: Path, output: Path, size: str) -> tuple[float, int]:
    """Seconds of a job, and the bytes of its peak of resident memory."""
    begin = time.monotonic()
    process = start(source, output, size)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the job ended with status {process.returncode}")
    return time.monotonic() - begin, usage.ru_maxrss << 10


def killed(
    source: Path, output: Path, size: str, *, seconds: float, count: int, seed: int
) -> dict[str, Any]:
    """Kill a job at random moments, and let it end at last.

    Two times of three the clock starts when the journal has grown, so that there is progress even
    where a busy machine takes long to begin; the third kill may come before.
    """
    chance = random.Random(seed)  # noqa: S311 - it picks moments, no secrets
    journal = output.with_name(f"{output.name}.journal")
    begin, moments, sizes = time.monotonic(), [], []
    for number in range(count):
        moment = chance.uniform(0.3, 1.7) * seconds / (count + 1)
        process, before = start(source, output, size), nbytes_of(journal)
        while number % 3 < 2 and process.poll() is None and nbytes_of(journal) <= before:
            time.sleep(0.05)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        moments.append(round(moment, 1))
        sizes.append(nbytes_of(journal))
        print(f"killed after {moment:.1f} s, journal of {sizes[-1]:,} bytes", flush=True)
    last, peak = measured(source, output, size)
    return {
        "kills_after_s": moments,
        "journal_nbytes": sizes,
        "last_s": round(last, 1),
        "seconds": round(time.monotonic() - begin, 1),
        "last_peak_nbytes": peak,
        "journal_left": journal.exists(),
    }


def nbytes_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All of it, in a folder."""
    source = folder / "weights"
    source.mkdir()
    own = [sys.executable, "-m", "benchmarks.larger_than_memory", "--make", str(source)]
    # In a process of its own: a child's peak begins with the memory of its parent.
    subprocess.run([*own, "--gb", str(options.gb), "--width", str(options.width)], check=True)
    shapes = [shape for _, shape in layers(options.gb, options.width)]
    values, largest = sum(map(math.prod, shapes)), max(map(math.prod, shapes))
    output = folder / "whole.dither"
    seconds, peak = measured(source, output, options.size)
    result = {
        "size": options.size,
        "width": options.width,
        "tensors": len(shapes),
        "values": values,
        "source_nbytes": sum(path.stat().st_size for path in source.glob("*.safetensors")),
        "largest_float32_nbytes": 4 * largest,
        "bound_nbytes": 10 * largest + 10**9,
        "peak_nbytes": peak,
        "seconds": round(seconds, 1),
        "source_mb_per_s": round(2 * values / seconds / 1e6, 2),
        "hours_for_7e9_values": round(seconds / values * 7e9 / 3600, 2),
        "nbytes": output.stat().st_size,
        "sha256": digest(output),
    }
    print(json.dumps(result, indent=1), flush=True)
    if options.kill:
        other = folder / "killed.dither"
        found = killed(
            source, other, options.size, seconds=seconds, count=options.kill, seed=options.seed
        )
        result["killed"] = found | {"same_sha256": digest(other) == result["sha256"]}
    return result


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--gb", type=float, default=0.3, help="gigabytes of bfloat16 (0.3)")
    parser.add_argument("--width", type=int, default=4096, help="of the model (4096)")
    parser.add_argument("--size", default="4x", help="of the file (4x)")
    parser.add_argument("--kill", "--kills", type=int, default=0, help="how often (0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where there is room on a disk")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make, layers(options.gb, options.width))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        result = run(Path(temporary), options)
    from benchmarks.environment import describe  # torch comes last: see run

    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(describe() | result, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    killed_well = result.get("killed", {"same_sha256": True})["same_sha256"]
    return 0 if killed_well and result["peak_nbytes"] <= result["bound_nbytes"] else 1


if __name__ == "__main__":
    sys.exit(main())
