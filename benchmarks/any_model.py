"""Random small models from end to end: a file within its budget, or an error that says why.

``python -m benchmarks.any_model --count 300 --json FILE`` builds models of ordinary and odd parts
(:mod:`benchmarks.odd_models`), and takes each three ways: ``compress`` without data, ``compress``
with data, and ``attach`` to a budget, five steps and ``finish``. A process of its own then loads
every file into a model built anew. Failures are

* any exception but ``DitherError``, also one that a trial ends with;
* an error without a text, or a least size that is said to be possible and is not;
* a file above its budget, or, without data, below 98.5 % of it with something left to spend on;
* a source that is no longer what it was after ``compress``;
* weights or outputs that differ by a bit in the other process;
* more memory at the peak than `ALLOWANCE`, or more than a minute of a core.

Every case follows from the seed and its number: ``--only K`` runs one, with tracebacks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import dither
from benchmarks.environment import describe
from benchmarks.odd_models import Specimen, specimen
from benchmarks.peak_memory import Peak, restart_for_exact_peaks
from dither import Archive, BudgetError, DitherError
from dither.model import collect, weights_of
from dither.search import Trial
from dither.search.size import LEAST_SHARE, SLACK_NBYTES, parse_size

ALLOWANCE = 256 << 20
"""Bytes that a model of some kilobytes may take: for two threads factors of Gram matrices of 2,048
inputs, which is the most that one covers, and compiled code."""
SLOW = 60.0
STEPS = 5
WAYS = ("without data", "with data", "trained")
ACCURATE = 60.0
"""Decibels: a file may be smaller than its budget where everything is as near as in float16."""


class Unfit(Exception):  # noqa: N818 - no error
    """A model that this way is not for: it cannot be trained, with or without us."""


@dataclass
class Case:
    """One model, one way, and what came of it.

    Attributes:
        error: what refused it, or nothing.
        faults: what is wrong.
        path: of its file, if there is one.
        digest: of the weights and outputs that were evaluated.
    """

    number: int
    way: str
    error: str = ""
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    path: str = ""
    digest: str = ""


def digest(model_state: dict[str, Any], outputs: object) -> str:
    """Of every bit of both."""
    total = hashlib.sha256()
    for name, value in sorted(model_state.items()):
        total.update(name.encode())
        _add(total.update, value)
    _add(total.update, outputs)
    return total.hexdigest()


def _add(update: Callable[[bytes], object], part: object) -> None:
    if isinstance(part, Tensor):
        update(f"{part.dtype}{tuple(part.shape)}".encode())
        flat = part.detach().resolve_conj().resolve_neg().clone().contiguous().reshape(-1)
        update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif isinstance(part, dict):
        for name, value in part.items():
            update(str(name).encode())
            _add(update, value)
    elif isinstance(part, list | tuple):
        for value in part:
            _add(update, value)
    elif is_dataclass(part):
        for place in fields(part):
            _add(update, getattr(part, place.name))


def evaluated(drawn: Specimen, model: nn.Module) -> str:
    """The digest of a model's own tensors and its outputs."""
    outputs = drawn.outputs(model)
    return digest(dict(weights_of(model.state_dict())), outputs)


@contextmanager
def surroundings(drawn: Specimen) -> Iterator[None]:
    """What a user may have set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(drawn.default_dtype)
    try:
        with torch.inference_mode(drawn.inference):
            yield
    finally:
        torch.set_default_dtype(before)


def compressed(drawn: Specimen, case: Case, *, has_data: bool) -> None:
    """`compress`, and what must be true of the file and of the source."""
    model = drawn.model
    modes = [module.training for module in model.modules()]
    before = digest(dict(weights_of(model.state_dict())), None)
    data = drawn.batches if has_data else None
    with surroundings(drawn):
        try:
            archive = dither.compress(model, drawn.size, data=data)
        except BudgetError as error:
            _go_on(drawn, case, error)
            archive = dither.compress(model, drawn.size, data=data)
    if digest(dict(weights_of(model.state_dict())), None) != before:
        case.faults.append("the source's tensors changed")
    if [module.training for module in model.modules()] != modes:
        case.faults.append("the source's modes changed")
    budget = budget_of(drawn)
    if archive.nbytes > budget:
        case.faults.append(f"{archive.nbytes} bytes, and the budget is {budget}")
    if not has_data:
        _check_filled(archive, model, budget, case)
    for trial in cast("tuple[Trial, ...]", archive.trials):
        if trial.error and not _is_ours(trial.error):
            case.faults.append(f"{trial.stage}: {trial.error}")
    archive.save(case.path)
    case.digest = reread(drawn, case.path)


def _go_on(drawn: Specimen, case: Case, error: BudgetError) -> None:
    """From an impossible budget to the one that is said to be possible."""
    case.error = f"{type(error).__name__}: {error}"
    if error.smallest is None:
        raise error
    drawn.size = error.smallest


def trained(drawn: Specimen, case: Case) -> None:
    """`attach`, some steps, `finish`."""
    model = drawn.model
    _plain_step(drawn)
    parameters = [p for p in model.parameters() if p.is_floating_point() and p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-4)
    with surroundings(drawn):
        try:
            run = dither.attach(model, budget=drawn.size, steps=STEPS, optimizer=optimizer)
        except BudgetError as error:
            _go_on(drawn, case, error)
            run = dither.attach(model, budget=drawn.size, steps=STEPS, optimizer=optimizer)
        model.train()
        for number in range(STEPS):
            batch = drawn.batches[number % len(drawn.batches)]
            loss = _loss(dither.data.call(model, batch)) + run.penalty()
            optimizer.zero_grad()
            if loss.requires_grad:
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            run.step()
        run.finish()
    nbytes = run.save(case.path)
    budget = budget_of(drawn)
    if nbytes > budget or nbytes != Path(case.path).stat().st_size:
        case.faults.append(f"{nbytes} bytes, and the budget is {budget}")
    if run.archive.nbytes != nbytes:
        case.faults.append(f"the archive in memory has {run.archive.nbytes} bytes, not {nbytes}")
    outputs = drawn.outputs(model)
    case.digest = digest(dither.load(case.path), outputs)


def _plain_step(drawn: Specimen) -> None:
    """A step without us, on a copy: what fails there is not ours to train."""
    try:
        model = dither.model.duplicate(drawn.model).train()
        with surroundings(drawn):
            loss = _loss(dither.data.call(model, drawn.batches[0]))
            loss.backward()
            torch.optim.SGD(model.parameters(), lr=1e-4).step()
    except (RuntimeError, DitherError) as error:
        raise Unfit(str(error)) from error
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not all(bool(g.isfinite().all()) for g in [loss, *gradients]):
        raise Unfit("a loss or a gradient is not finite")


def _loss(output: object) -> Tensor:
    found: list[Tensor] = []
    _floats(output, found)
    finite = [value[value.isfinite()] for value in found]
    terms = [value.float().square().mean() for value in finite if value.numel()]
    return torch.stack([torch.zeros((), dtype=torch.float32), *terms]).sum()


def _floats(part: object, found: list[Tensor]) -> None:
    if isinstance(part, Tensor):
        found += [part] * part.is_floating_point()
    elif isinstance(part, dict):
        for value in part.values():
            _floats(value, found)
    elif isinstance(part, list | tuple):
        for value in part:
            _floats(value, found)
    elif is_dataclass(part):
        for place in fields(part):
            _floats(getattr(part, place.name), found)


def budget_of(drawn: Specimen) -> int:
    """In bytes."""
    tensors = collect(dither.model.inner(drawn.model))
    values = sum(value.numel() for value in tensors.values.values())
    return parse_size(drawn.size, tensors.nbytes, values)


def _check_filled(archive: Archive, model: nn.Module, budget: int, case: Case) -> None:
    """The promise: filled, or all as accurate as in float16."""
    if archive.nbytes >= LEAST_SHARE * budget or archive.nbytes >= budget - SLACK_NBYTES:
        return
    held = collect(dither.model.inner(model)).values
    for name, value in held.items():
        if value.is_floating_point() and value.numel() and bool(value.double().isfinite().all()):
            exact, found = value.detach().double(), archive[name].double()
            noise, signal = (exact - found).square().sum(), exact.square().sum()
            if noise > 0 and 10 * torch.log10(signal / noise) < ACCURATE:
                case.faults.append(f"{archive.nbytes} of {budget} bytes, and {name} is not exact")
                return


def _is_ours(said: str) -> bool:
    kind = getattr(dither, said.partition(":")[0], None)
    return isinstance(kind, type) and issubclass(kind, DitherError)


def judge(seed: int, number: int, way: str, path: str, *, loud: bool = False) -> Case:
    """Take one model one way."""
    case = Case(number, way, path=path)
    drawn = specimen(seed, number)
    start, peak = time.process_time(), Peak()
    try:
        if way == "trained":
            trained(drawn, case)
        else:
            compressed(drawn, case, has_data=way == "with data")
    except Unfit as error:
        case.path, case.error = "", f"no plain step: {error}"
    except DitherError as error:
        case.path, case.error = "", f"{type(error).__name__}: {error}"
        if len(str(error)) < 20:
            case.faults.append(f"says too little: {case.error}")
        if loud:
            traceback.print_exc()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a failure
        case.path = ""
        case.faults.append(f"{type(error).__name__}: {error}".splitlines()[0] + _where(error))
        if loud:
            traceback.print_exc()
    case.seconds = time.process_time() - start
    if (grew := peak.grew()) > ALLOWANCE:
        case.faults.append(f"{grew >> 20} MiB more memory at the peak")
    if case.seconds > SLOW:
        case.faults.append(f"{case.seconds:.0f} s")
    return case


def _where(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/dither/" in frame.filename] or frames
    return f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})"


def reread(drawn: Specimen, path: str) -> str:
    """The digest of a file, and of a model that it was loaded into."""
    found = dither.load_into(drawn.model, path)
    assert found.exact, str(found)
    held = dither.load(path)
    for name, value in weights_of(dither.model.inner(drawn.model).state_dict()).items():
        if name in held and digest({name: value}, None) != digest({name: held[name]}, None):
            raise AssertionError(f"{name} is not what the file holds")
    return digest(held, drawn.outputs(drawn.model))


def reread_all(seed: int) -> None:
    """What the other process does: a number and a path on each line, a digest on each."""
    for line in sys.stdin:
        number, path = line.rstrip("\n").split(" ", 1)
        try:
            print(reread(specimen(seed, int(number)), path), flush=True)
        except Exception as error:  # noqa: BLE001 - it is told
            print(f"{type(error).__name__}: {error}".splitlines()[0], flush=True)


def compare(seed: int, cases: list[Case]) -> None:
    """Load all files in a fresh process; what differs is a fault."""
    written = [case for case in cases if case.path]
    command = [sys.executable, "-m", "benchmarks.any_model", "--reread", "--seed", str(seed)]
    lines = "".join(f"{case.number} {case.path}\n" for case in written)
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    for case, found in zip(written, done.stdout.splitlines(), strict=True):
        if found != case.digest:
            is_digest = re.fullmatch("[0-9a-f]{64}", found)
            case.faults.append("another process: " + ("other bits" if is_digest else found))


def run(seed: int, numbers: list[int], *, loud: bool = False) -> list[Case]:
    """All ways of some models."""
    cases = []
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            if loud:
                drawn = specimen(seed, number)
                print(drawn.size, drawn.kinds, drawn.model, sep="\n")
            for way in WAYS:
                path = str(Path(folder, f"{number}-{way.replace(' ', '-')}.dither"))
                cases.append(judge(seed, number, way, path, loud=loud))
                if cases[-1].faults:
                    print(f"{number} {way}: {cases[-1].faults}", flush=True)
        compare(seed, cases)
    return cases


def summary(cases: list[Case]) -> dict[str, Any]:
    """What came of them, in numbers, and every failure."""
    errors = Counter(f"{case.way}: {_kind(case.error)}" for case in cases if case.error)
    failures = [f"{case.number} {case.way}: {fault}" for case in cases for fault in case.faults]
    models = {case.number for case in cases}
    return {
        "models": len(models),
        "models_without_failure": len(models - {case.number for case in cases if case.faults}),
        "cases": len(cases),
        "files": sum(bool(case.path) for case in cases),
        "seconds": round(sum(case.seconds for case in cases), 1),
        "slowest_seconds": round(max(case.seconds for case in cases), 1),
        "refused": dict(errors.most_common()),
        "failures": failures,
    }


def _kind(error: str) -> str:
    """An error without what differs from case to case."""
    plain = re.sub(r"'[^']*'", "'...'", error.splitlines()[0])
    return re.sub(r"\d[\d,.e+-]*", "N", plain)[:160]


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--count", type=int, default=300, help="models (300)")
    parser.add_argument("--first", type=int, default=0, help="number of the first (0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one model, with tracebacks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--reread", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.reread:
        warnings.simplefilter("ignore")
        reread_all(options.seed)
        return 0
    restart_for_exact_peaks()
    numbers = list(range(options.first, options.first + options.count))
    one = options.only is not None
    cases = run(options.seed, [options.only] if one else numbers, loud=one)
    found = summary(cases)
    print(json.dumps(found, indent=1, ensure_ascii=False))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(describe() | {"seed": options.seed} | found, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
