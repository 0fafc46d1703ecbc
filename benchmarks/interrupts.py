"""Kill the compressor at random moments: every file is the old one, the new one, or not there.

``python -m benchmarks.interrupts --count 40`` starts ``dither compress`` over a good archive and,
in turn, over a fresh name, and kills it (SIGKILL) at moments spread over its run, half of them near
its end, where the file is written. As many kills again hit a process that does nothing but replace
archives, by small writes into ``atomic_write``, so that most fall within a write. After each kill:

* a file that was there is, byte for byte, the old archive or the new one, and verifies;
* a fresh name is absent, or such an archive too;
* whatever else was left carries a temporary name of its own (``.NAME.*.tmp``).

``--ctrl-c 20`` interrupts as many runs instead (SIGINT), and says how long each took to end: with
status 130, one line, and nothing left behind.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

import dither
from benchmarks.environment import describe

ROWS, COLUMNS, TENSORS = 512, 512, 4
OLD_SIZE, NEW_SIZE = 300_000, 500_000
CHUNK = 1 << 12
STARTED = "writing"

Process = subprocess.Popen[str] | subprocess.Popen[bytes]


class Bench:
    """A folder with a checkpoint, two good archives of it, and the commands that are killed."""

    def __init__(self, folder: Path) -> None:
        noise = torch.Generator().manual_seed(0)
        self.folder, self.source = folder, folder / "model.safetensors"
        state = {f"w{i}": torch.randn(ROWS, COLUMNS, generator=noise) for i in range(TENSORS)}
        save_file(state, self.source)
        self.old_path, self.new_path = folder / "old.dither", folder / "new.dither"
        self.compress(self.old_path, OLD_SIZE)
        begin = time.monotonic()
        self.compress(self.new_path, NEW_SIZE)
        self.seconds = time.monotonic() - begin
        self.old, self.new = self.old_path.read_bytes(), self.new_path.read_bytes()
        assert self.old != self.new
        assert not dither.verify(self.old_path)
        assert not dither.verify(self.new_path)

    def command(self, target: Path, size: int) -> list[str]:
        start = [sys.executable, "-m", "dither", "compress", str(self.source), "-q"]
        return [*start, "--size", str(size), "-o", str(target)]

    def compress(self, target: Path, size: int) -> None:
        subprocess.run(self.command(target, size), check=True)

    def kill_command(self, target: Path, share: float) -> str:
        """Kill ``dither compress`` after a share of its usual time; near 1, watch for the write."""
        process = subprocess.Popen(self.command(target, NEW_SIZE))
        deadline = time.monotonic() + min(share, 1.0) * self.seconds
        if share < 1:
            _wait(process, lambda: time.monotonic() >= deadline)
        else:  # wait for the temporary file, and then a little
            pattern = f".{target.name[:40]}.*.tmp"
            _wait(process, lambda: any(target.parent.glob(pattern)), pause=0.0)
            time.sleep((share - 1) * 0.004)
        return _kill(process)

    def kill_writer(self, target: Path, delay: float) -> str:
        """Kill a process that replaces archives without end, some time after its first write."""
        command = [sys.executable, "-m", "benchmarks.interrupts", "--replace", str(target)]
        command += [str(self.old_path), str(self.new_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == STARTED
        time.sleep(delay)
        return _kill(process)

    def judge(self, target: Path, *, existed: bool) -> str:
        """What the target is now, or what is wrong with it."""
        if not target.exists():
            return "FAILED: the file has gone" if existed else "absent"
        data = target.read_bytes()
        faults = dither.verify(target)
        if faults:
            return f"FAILED: {faults[0]}"
        if data not in (self.old, self.new):
            return "FAILED: neither the old archive nor the new one"
        return "old" if data == self.old else "new"

    def leftovers(self, inside: Path, target: Path) -> tuple[int, list[str]]:
        """Temporary files, and names that nothing should have."""
        others = [path.name for path in inside.iterdir() if path != target]
        wrong = [n for n in others if not (n.startswith(f".{target.name}.") and n.endswith(".tmp"))]
        return len(others), wrong


def _wait(process: Process, ready: Callable[[], bool], pause: float = 0.0005) -> None:
    while process.poll() is None and not ready():
        time.sleep(pause)


def _kill(process: Process) -> str:
    """Kill a process; says whether it was still running."""
    process.kill()
    process.communicate()
    return "finished" if process.returncode == 0 else "killed"


def replace_for_ever(target: Path, sources: list[Path]) -> None:
    """Write archives over a file in turn, in small pieces, until killed."""
    from dither.archive import atomic_write

    contents = [source.read_bytes() for source in reversed(sources)]
    print(STARTED, flush=True)
    while True:
        for data in contents:
            with atomic_write(target) as file:
                for start in range(0, len(data), CHUNK):
                    file.write(data[start : start + CHUNK])
                    file.flush()
                    time.sleep(0.0002)


def run(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Counts of what happened, and failures."""
    chance = random.Random(seed)  # noqa: S311 - it picks moments, no secrets
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary))
        print(f"one compression takes {bench.seconds:.1f} s", flush=True)
        for i in range(2 * count):
            writer, existed = i >= count, i % 2 == 0
            inside = Path(temporary, f"case{i}")
            inside.mkdir()
            target = inside / "model.dither"
            if existed:
                target.write_bytes(bench.old)
            if writer:
                moment = chance.uniform(0, 0.3)
                fate = bench.kill_writer(target, moment)
            else:  # half over the whole run, half while the file is being written
                moment = chance.uniform(0, 1) if i // 2 % 2 else chance.uniform(1, 2)
                fate = bench.kill_command(target, moment)
            outcome = bench.judge(target, existed=existed)
            files, wrong = bench.leftovers(inside, target)
            kind = "atomic_write" if writer else "dither compress"
            where = "over an archive" if existed else "fresh name"
            left = ", left a temporary file" if files else ""
            outcomes[f"{kind}, {where}, {fate}: {outcome[:60]}{left}"] += 1
            if outcome.startswith("FAILED") or wrong:
                failures.append(f"number {i}, {kind}, at {moment:.3f}: {outcome} {wrong}")
            print(f"{i:4} {kind:16} {where:16} {fate:9} {outcome}{left}", flush=True)
    return outcomes, failures


def interrupt(count: int, seed: int) -> tuple[list[float], list[str]]:
    """Seconds from SIGINT, at moments spread over a run, to the end; and failures."""
    chance = random.Random(seed)  # noqa: S311 - it picks moments, no secrets
    taken: list[float] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary))
        for i in range(count):
            inside = Path(temporary, f"case{i}")
            inside.mkdir()
            command = bench.command(inside / "model.dither", NEW_SIZE)
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            moment = chance.uniform(0.3, 0.95)  # before, Python itself is loading
            time.sleep(moment * bench.seconds)
            begin = time.monotonic()
            process.send_signal(signal.SIGINT)
            said = process.communicate()[1]
            if (inside / "model.dither").exists() and not dither.verify(inside / "model.dither"):
                continue  # it was done, if not gone
            taken.append(time.monotonic() - begin)
            left = [path.name for path in inside.iterdir()]
            if (process.returncode, said, left) != (130, "interrupted\n", []):
                failures.append(f"number {i} at {moment:.2f}: {process.returncode} {said!r} {left}")
    return taken, failures


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--count", type=int, default=40, help="kills of each kind (40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ctrl-c", type=int, help="interrupt as many runs, and time their ends")
    parser.add_argument("--replace", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.replace:
        target, *sources = options.replace
        replace_for_ever(target, sources)
    if options.ctrl_c:
        taken, failures = interrupt(options.ctrl_c, options.seed)
        print(f"{len(taken)} interrupted: {median(taken):.2f} s to end, {max(taken):.2f} s at most")
        print("\n".join(failures), file=sys.stderr)
        return 1 if failures else 0
    start = time.monotonic()
    outcomes, failures = run(options.count, options.seed)
    seconds = time.monotonic() - start
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:6}  {outcome}")
    print(f"{len(failures)} failures of {2 * options.count} kills in {seconds:.0f} s")
    for failure in failures:
        print(failure, file=sys.stderr)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"seconds": round(seconds, 1), "outcomes": outcomes, "failures": failures}
        text = json.dumps(describe() | result, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
