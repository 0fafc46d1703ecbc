"""Any model: random modules go through everything, and nothing may end in a raw exception.

    python -m benchmarks.any_model --count 300 [--seed 0] [--json FILE]

Each module (`benchmarks.random_models`, one a seed) is compressed without data and with, attached
and trained for five steps to the same size, finished, saved, and loaded in a fresh process. Each of
the three ends in a file within its budget whose weights and outputs are, bit for bit, those that
were evaluated, or in a `DitherError`. Anything else is a failure: a raw exception, a larger file,
other bits, more than two minutes, or more memory than a process may have.

Seeds are dealt out to processes of a few modules, so that a crash costs its seed alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.environment import describe

SECONDS = 120
MEMORY = 6 << 30
"""Bytes of address space that a process may take: torch itself maps about two thirds of it."""

_EACH = 10
WAYS = ("without data", "with data", "trained")


def main() -> None:
    parser = argparse.ArgumentParser(description="Put random modules through everything.")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--make", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--read", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        _each(options.make, lambda seed: make(seed, options.folder))
        return
    if options.read:
        _each(options.read, lambda seed: read(seed, options.folder))
        return
    start = time.perf_counter()
    rows = try_all(range(options.seed, options.seed + options.count))
    report = summary(rows) | {"seconds": round(time.perf_counter() - start), **describe()}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{report['models']} models, {report['failures']} failures, {report['ends']}")
    sys.exit(bool(report["failures"]))


def try_all(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Make files in some processes, and read them in others; a row for each seed."""
    rows: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for at in range(0, len(seeds), _EACH):
            some = list(seeds[at : at + _EACH])
            for row in (*_processes("--make", some, folder), *_processes("--read", some, folder)):
                rows.setdefault(row["seed"], row)["ways"].update(row["ways"])
            for seed in some:
                for way, end in rows[seed]["ways"].items():
                    if end.startswith("FAILED"):
                        print(f"seed {seed}, {way} ({rows[seed]['said']}): {end}", flush=True)
    return [rows[seed] for seed in seeds]


def _processes(flag: str, seeds: list[int], folder: str) -> Iterator[dict[str, Any]]:
    """The rows that a process prints; after a crash another one goes on behind its seed."""
    left = list(seeds)
    while left:
        command = [sys.executable, "-m", "benchmarks.any_model", flag, *map(str, left)]
        done = subprocess.run(
            [*command, "--folder", folder], capture_output=True, text=True, check=False
        )
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        yield from rows
        left = left[len(rows) :]
        if left:
            last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            yield {"seed": left[0], "said": "", "ways": {f"{flag[2:]} crashed": f"FAILED: {last}"}}
            left = left[1:]


def _each(seeds: list[int], act: Callable[[int], dict[str, Any]]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    for seed in seeds:
        print(json.dumps(act(seed)), flush=True)


def make(seed: int, folder: Path) -> dict[str, Any]:
    """Compress and train the module of a seed; what it gives lies beside the files."""
    import torch

    from benchmarks.random_models import build

    torch.set_num_threads(1)
    ends: dict[str, str] = {}
    for way in WAYS:
        case = build(seed)
        with _limited(ends, way):
            _make(way, case, folder / f"{seed}-{WAYS.index(way)}")
            ends[way] = "file"
    return {"seed": seed, "said": f"{case.said}; {case.size}", "ways": ends}


def _make(way: str, case: Any, path: Path) -> None:  # noqa: ANN401 - torch comes late
    import torch

    import dither
    from dither.model import collect
    from dither.search import parse_size

    tensors = collect(case.model)
    values = sum(value.numel() for value in tensors.values.values())
    budget = parse_size(case.size, tensors.nbytes, values)
    if way == "trained":
        run = _trained(case, budget)
        nbytes, model = run.save(path), run.model.eval()
    else:
        data = case.batches if way == "with data" else None
        archive = dither.compress(case.model, case.size, data=data)
        archive.save(path)
        nbytes, model = archive.nbytes, case.model
        dither.load_into(model, path)
    if not nbytes == path.stat().st_size <= budget:
        raise AssertionError(f"{nbytes} bytes, {path.stat().st_size} on the disk, {budget} asked")
    with torch.no_grad():
        outputs = [_leaves(model(batch)) for batch in case.batches]
    torch.save(outputs, path.with_suffix(".pt"))


def _trained(case: Any, budget: int) -> Any:  # noqa: ANN401
    """Five steps on the way to the budget."""
    import torch

    import dither

    learning = [p for p in case.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning or [torch.nn.Parameter(torch.zeros(1))], 1e-4)
    run = dither.attach(case.model, budget=budget, steps=5, optimizer=optimizer)
    for step in range(5):
        found = _leaves(case.model.train()(case.batches[step % len(case.batches)]))
        loss = sum(leaf.float().square().mean() for leaf in found) + run.penalty()
        if loss.requires_grad:
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.step()
    run.finish(case.batches)
    return run


def read(seed: int, folder: Path) -> dict[str, Any]:
    """Load the files of a seed into fresh modules, and compare outputs and weights."""
    import torch

    import dither
    from benchmarks.random_models import build

    torch.set_num_threads(1)
    ends: dict[str, str] = {}
    for number, way in enumerate(WAYS):
        path = folder / f"{seed}-{number}"
        if not path.with_suffix(".pt").exists():
            continue
        with _limited(ends, f"{way}, read"):
            case = build(seed)
            dither.load_into(case.model, path)
            wanted = torch.load(path.with_suffix(".pt"), weights_only=True)
            with torch.no_grad():
                got = [_leaves(case.model(batch)) for batch in case.batches]
            same = [
                _same(a, b)
                for x, y in zip(got, wanted, strict=True)
                for a, b in zip(x, y, strict=True)
            ]
            if not all(same):
                raise AssertionError("outputs are not those that were evaluated")
            state, held = case.model.state_dict(), dither.load(path)
            if wrong := [name for name in held if not _same(state[name], held[name])]:
                raise AssertionError(f"{wrong[:3]} are not what the file holds")
            ends[f"{way}, read"] = "the same bits"
    return {"seed": seed, "said": "", "ways": ends}


def _leaves(output: object) -> list[Any]:
    """The tensors of an output, those in dataclasses too."""
    from dataclasses import fields, is_dataclass

    import torch

    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if is_dataclass(output):
        return [x for f in fields(output) for x in _leaves(getattr(output, f.name))]
    parts = list(output.values()) if isinstance(output, dict) else output
    return [x for part in parts for x in _leaves(part)] if isinstance(parts, list | tuple) else []


def _same(a: Any, b: Any) -> bool:  # noqa: ANN401
    """Bit for bit, NaN and the sign of zero included."""
    import torch

    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.numel():
        return True
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    flat = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return torch.equal(*flat)


@contextmanager
def _limited(ends: dict[str, str], way: str) -> Iterator[None]:
    """Note how something ended, within its time."""
    from dither import DitherError

    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    except DitherError as error:
        ends[way] = f"{type(error).__name__}: {error}"
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is what is looked for
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "dither/" in f.filename]
        last = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        ends[way] = f"FAILED: {type(error).__name__}: {str(error)[:300]}{last}"
    finally:
        signal.alarm(0)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many ended how; every failure and every refusal with its seed."""
    failed = {
        str(row["seed"]): {"said": row["said"]} | row["ways"]
        for row in rows
        if any(end.startswith("FAILED") for end in row["ways"].values())
    }
    refused = {
        f"{row['seed']}, {way}": end
        for row in rows
        for way, end in row["ways"].items()
        if end not in {"file", "the same bits"} and not end.startswith("FAILED")
    }
    ends = Counter(end.partition(":")[0] for row in rows for end in row["ways"].values())
    return {
        "models": len(rows),
        "failures": len(failed),
        "ends": dict(ends),
        "failed": failed,
        "refused": refused,
    }


if __name__ == "__main__":
    main()
