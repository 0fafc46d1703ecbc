"""What the commands do once their arguments are known; this imports torch, so it comes late."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dither.archive import WRAPPER_NBYTES, Archive, load_weights
from dither.archive import verify as find_faults
from dither.cli import report
from dither.cli.cells import METHODS, cells_of
from dither.cli.compare import compare as compare_tensors
from dither.cli.console import Printer
from dither.cli.data import data_of, evaluate_of, model_of
from dither.cli.files import (
    check_archive_output,
    check_folder_output,
    check_page_output,
    check_tensor_output,
    make_folder,
    names_folder,
    open_archive,
    open_source,
    write_tensors,
)
from dither.cli.sweep import sweep as run_sweep
from dither.core import BudgetError, SpecError
from dither.demo.story import run
from dither.disk import memory_nbytes
from dither.integrations.model_folder import own_weights, write_folder
from dither.model import collect
from dither.report import check_picture, draw_sizes, save_page, save_pair
from dither.search import (
    Offering,
    PrunedFirst,
    Sensitivity,
    SparseProducts,
    Trial,
    compress_to,
    parse_size,
)
from dither.search import compress as search
from dither.search import plan as predict
from dither.team import Team, joined

FEW_BITS = 1.3
"""Bits for each value below which files that are made without data are poor: samples help most."""

FLOAT32 = 4
MOST_OF_MEMORY = 0.25
"""Share of memory that a model may take: while it is compressed, there are up to three copies."""


@dataclass(frozen=True)
class Given:
    """What the user gives beside weights: names of objects, or files."""

    data: str | None = None
    model: str | None = None
    evaluate: str | None = None
    activations: str | None = None
    on_disk: bool | None = None
    base: Path | None = None
    tune: bool = False

    def goes_on_disk(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the model of a state is to be on a disk, as it is asked for, or by its size."""
        if self.on_disk is not None:
            return self.on_disk
        values = sum(value.numel() for value in collect(state).values.values())
        return FLOAT32 * values > MOST_OF_MEMORY * memory_nbytes()


def compress(
    printer: Printer,
    source: Path,
    output: str | None,
    *,
    size: str,
    key: str | None,
    given: Given,
    way: Sensitivity | None = None,
) -> None:
    """Compress a source to ``size``, with data if any are given; all processes of torchrun do."""
    with joined("the command") as team:
        told = printer if team.rank == 0 else Printer(as_json=False, quiet=True)
        _compress(told, source, output, size=size, key=key, given=given, way=way, team=team)


def sensitivity_of(prune: str | None, *, factors: bool) -> Sensitivity | None:
    """What the search weighs errors by, and offers, if anything is asked of it; else None.

    Args:
        prune: a share as ``"0.9"`` or ``"90%"``, or a pattern as ``"2:4"``.
        factors: whether sparse factors are tried.

    Raises:
        SpecError: both, which would not leave zeros where they are; no share.
    """
    if prune is None:
        return Offering(SparseProducts()) if factors else None
    if factors:
        raise SpecError("--prune and --factors exclude each other: a product has other zeros")
    text = prune.removesuffix("%")
    try:
        share: float | str = float(text) / (100 if text != prune else 1)
    except ValueError:
        share = prune
    return PrunedFirst(share)


def _compress(
    printer: Printer,
    source: Path,
    output: str | None,
    *,
    size: str,
    key: str | None,
    given: Given,
    way: Sensitivity | None,
    team: Team,
) -> None:
    target = Path(output or f"{_stem(source)}.dither")
    to_folder = output is not None and names_folder(output)
    (check_folder_output if to_folder else check_archive_output)(target, source)
    if to_folder and (given.model is not None or given.base is not None):
        option = "--model" if given.model is not None else "--base"
        raise SpecError(f"a model folder has its own model, and no base; with {option} name a file")
    with printer.progress(f"reading {source}"):
        if team.rank == 0:
            make_folder(target)
        how: dict[str, Any] = {}
        weights: Path | Mapping[str, Tensor] | nn.Module = source
        wanted: int | str = size
        if given.data is not None or key is not None or to_folder:
            state = load_weights(source, key)
            weights = state = own_weights(source, state) if to_folder else state
            wanted = _budget(size, state) - to_folder * WRAPPER_NBYTES
        if given.data is not None:
            disk = target.absolute().parent if given.goes_on_disk(state) else None
            weights = model = model_of(given.model, source, state, disk)
            how["data"] = data_of(given.data, source, model)
            how["evaluate"] = evaluate_of(given.evaluate)
            how["activations"] = given.activations
            how["tune"] = given.tune
        if way is not None:
            how["sensitivity"] = way
        if to_folder or way is not None or given.base is not None:
            archive = search(weights, wanted, base=given.base, **how)
            if team.rank == 0 and to_folder:
                write_folder(archive, source, target)
            elif team.rank == 0:
                archive.save(target)
        else:
            archive = compress_to(target, weights, wanted, **how)
            archive.close()
    values = sum(entry.numel for entry in archive.entries.values())
    budget = parse_size(wanted, archive.original_nbytes, values)
    document = report.archive_document(archive, budget)
    trials = [trial for trial in archive.trials if isinstance(trial, Trial)]
    tried = {"trials": [asdict(trial) for trial in trials]} if trials else {}
    printer.document({"output": str(target), **document, **tried})
    for trial in trials:
        printer.text(str(trial))
    report.print_summary(printer, archive)
    if given.data is None and given.base is None and 8 * budget < FEW_BITS * values:
        printer.text(
            f"less than {FEW_BITS} bits per value, where the weights alone say too little of "
            "what matters: give a few hundred samples with --data, or a larger size"
        )
    printer.text(f"wrote {target}")


def _budget(size: str, state: Mapping[str, Tensor]) -> int:
    """A size in bytes, of tensors as their source has them."""
    tensors = collect(state)
    values = sum(value.numel() for value in tensors.values.values())
    return parse_size(size, tensors.nbytes, values)


def plan(
    printer: Printer, source: Path, sizes: Sequence[str], *, key: str | None, picture: Path | None
) -> None:
    """Predict what sizes would do to a source."""
    if picture is not None:
        check_picture(picture)
    with printer.progress(f"reading {source}"):
        found = predict(load_weights(source, key), sizes)
    if picture is not None:
        make_folder(picture)
        draw_sizes(found, picture)
    printer.document({"source": str(source), **found.to_json()})
    report.print_outlook(printer, found)
    if picture is not None:
        printer.text(f"wrote {picture}")


@dataclass(frozen=True)
class Wanted:
    """What a sweep goes through, and what its cells share."""

    methods: Sequence[str]
    sizes: Sequence[str]
    seeds: Sequence[str]
    data: str | None = None
    model: str | None = None
    evaluate: str | None = None
    keep: Path | None = None


def sweep(
    printer: Printer,
    sources: Sequence[Path],
    wanted: Wanted,
    results: Path,
    **how: Any,
) -> bool:
    """Whether all cells of a sweep came to something.

    Raises:
        SpecError: there are no cells, or seeds that are no numbers.
    """
    try:
        seeds = [int(seed) for seed in wanted.seeds]
    except ValueError:
        raise SpecError(f"seeds are whole numbers, not {', '.join(wanted.seeds)!r}") from None
    if not (wanted.methods and wanted.sizes and seeds):
        raise SpecError("a sweep has at least one method, one size and one seed")
    for method in wanted.methods:
        if method not in METHODS and ":" not in method:
            raise SpecError(f"there is no method {method!r}: {', '.join(METHODS)}, or MODULE:NAME")
    cells = cells_of(
        map(str, sources),
        wanted.methods,
        wanted.sizes,
        seeds,
        data=wanted.data,
        model=wanted.model,
        evaluate=wanted.evaluate,
        keep=None if wanted.keep is None else str(wanted.keep),
    )
    if wanted.keep is not None:
        wanted.keep.mkdir(parents=True, exist_ok=True)
    return run_sweep(printer, cells, results, **how)


def inspect(printer: Printer, file: Path, max_size: str | None, *, as_tree: bool) -> None:
    """Show an archive's index."""
    with Archive.open(file, _limit(max_size)) as archive:
        budget = archive.metadata.get("budget")
        printer.document({"file": str(file), **report.archive_document(archive, budget)})
        (report.print_tree if as_tree else report.print_tensors)(printer, archive)


def decompress(
    printer: Printer,
    file: Path,
    output: Path | None,
    max_size: str | None,
    base: Path | None = None,
) -> None:
    """Write an archive's tensors in the kind that the output's suffix names."""
    target = output or Path(f"{_stem(file)}.safetensors")
    check_tensor_output(target, file, named=output is not None)
    with (
        Archive.open(file, _limit(max_size), base) as archive,
        printer.progress(f"decoding {file}"),
    ):
        make_folder(target)
        write_tensors(target, archive)
        tensors, aliases = len(archive.entries), dict(archive.aliases)
    nbytes = target.stat().st_size
    printer.document(
        {"output": str(target), "nbytes": nbytes, "tensors": tensors, "aliases": aliases}
    )
    printer.text(f"wrote {target}: {tensors} tensors, {nbytes:,} bytes")


def verify(printer: Printer, file: Path, max_size: str | None, base: Path | None = None) -> bool:
    """Whether an archive is without faults."""
    with printer.progress(f"verifying {file}"):
        faults = find_faults(file, _limit(max_size), base)
    printer.document({"file": str(file), "good": not faults, "faults": faults})
    for fault in faults:
        printer.text(f"fault: {fault}")
    printer.text(f"{file}: {f'faults: {len(faults)}' if faults else 'good'}")
    return not faults


@dataclass(frozen=True)
class Beside:
    """What is given beside archives: a checkpoint, a bound on memory, a base."""

    against: Path | None = None
    max_size: str | None = None
    base: Path | None = None


def compare(printer: Printer, a: Path, b: Path, given: Beside, *, min_sqnr: float | None) -> bool:
    """Whether two sources have the same names and shapes, and no tensor is below ``min_sqnr``."""
    limit = _limit(given.max_size)
    with (
        printer.progress("reading"),
        open_source(a, limit, given.base) as left,
        open_source(b, limit, given.base) as right,
    ):
        found = compare_tensors(left, right)
    below = [] if min_sqnr is None else found.below(min_sqnr)
    printer.document(report.comparison_document(found, below))
    report.print_comparison(printer, found, below, min_sqnr)
    return found.same_names and not below


def write_page(printer: Printer, file: Path, output: Path | None, given: Beside) -> None:
    """Write a page about an archive, compared with a checkpoint if there is one."""
    target, against = output or Path(f"{_stem(file)}.html"), given.against
    check_page_output(target, file, against)
    limit = _limit(given.max_size)
    with (
        printer.progress(f"reading {file}"),
        open_archive(file, limit, given.base) as archive,
        nullcontext() if against is None else open_source(against, limit) as source,
    ):
        make_folder(target)
        found = save_page(
            target,
            archive,
            title=file.name,
            against=source,
            checkpoint="" if against is None else against.name,
        )
    printer.document(
        {
            "output": str(target),
            "nbytes": found.nbytes,
            "original_nbytes": found.original_nbytes,
            "tensors": len(found.tensors),
            "sqnr_db": found.sqnr,
            "lacking": list(found.lacking),
        }
    )
    printer.text(f"wrote {target}: {len(found.tensors)} tensors, {found.nbytes:,} bytes")


def write_pair(
    printer: Printer,
    files: tuple[Path, Path],
    output: Path | None,
    given: Beside,
) -> None:
    """Write a page about two archives, compared with a checkpoint if there is one."""
    target, against = output or Path(f"{_stem(files[0])}.html"), given.against
    for file in files:
        check_page_output(target, file, against)
    limit = _limit(given.max_size)
    with (
        printer.progress(f"reading {files[0]} and {files[1]}"),
        open_archive(files[0], limit, given.base) as one,
        open_archive(files[1], limit, given.base) as other,
        nullcontext() if against is None else open_source(against, limit) as source,
    ):
        make_folder(target)
        named = None if against is None or source is None else (against.name, source)
        found = save_pair(target, (one, other), (str(files[0]), str(files[1])), named)
    sides = [{"file": f.title, "nbytes": f.nbytes, "sqnr_db": f.sqnr} for f in found]
    printer.document({"output": str(target), "files": sides})
    printer.text(f"wrote {target}: {found[0].nbytes:,} and {found[1].nbytes:,} bytes")


def demo(printer: Printer, out: Path, *, quick: bool) -> bool:
    """Whether every file of the demo predicted the same in a fresh process."""
    with printer.progress("starting") as advance:
        results = run(out, quick=quick, progress=advance)
    printer.document(results)
    report.print_demo(printer, results, out)
    return bool(results["bit_equal"])


def _stem(source: Path) -> str:
    """The name of a default output, in the current folder."""
    resolved = source.resolve()  # "." has no name of its own
    if resolved.is_dir():
        return resolved.name or "model"
    return Path(resolved.name.removesuffix(".index.json")).stem


def _limit(max_size: str | None) -> int | None:
    if max_size is None:
        return None
    if max_size.strip()[-1:] in {"%", "x", "X"}:
        raise BudgetError(f"--max-size is a number of bytes, such as 16GB, not {max_size!r}")
    return parse_size(max_size, 0)
