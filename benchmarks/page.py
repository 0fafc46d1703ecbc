"""The results page and its plots, from the JSON files alone.

    python -m benchmarks.page
    python -m benchmarks.page --results out/results

writes ``README.md`` and ``plots/`` into the folder of results. Rows that another folder lacks are
those recorded in the repository; commit and machine of each are in the tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import plots
from benchmarks.methods import METHODS, RESULTS, SEEDS, TASKS, peers, runs
from benchmarks.rows import Group, Row, groups, is_ours, read
from benchmarks.verdicts import DATA_FREE, SAME, at_its_size, beaten, verdicts

HEAD = """# Results

Made by `python -m benchmarks.page` from the JSON files beside it; no number was typed. `make bench`
and `make bench-full` with `RESULTS=benchmarks/results` measure what is missing, and make it anew.

Bytes are those of whole files. A peer's are the smaller of its files as it writes them and after
`zstd -19`. A peer's row is compared with the best of ours that takes no more bytes; a difference
counts, however small. Of several seeds, the score is the mean, ± their standard deviation, and the
bytes are those of the largest file. The distance is that of outputs from fp32's on training samples
that no file was fitted to (divergence in nats; for STS-B twice the cosine error), where it was
measured: scores stand still, or move, by chance. Scores are on test data, of what a file holds;
the runner (`benchmarks.measure`) and the peers' (`benchmarks.peers.contract`) load it into a model
whose numbers were all made NaN before. A commit with a plus had changes that were not committed.

Tasks whose model is trained here have one model for each seed; ours and peers compress the same
ones, and a peer that was run with some of the seeds is compared with ours of these seeds. Some of
our sizes were measured by two programs, a few bytes apart: both rows are shown, and count.
"""


def score_of(group: Group) -> str:
    """Mean and standard deviation."""
    if group.score is None:
        return "not a number"
    return f"{group.score:.2f}" + ("" if group.spread is None else f" ± {group.spread:.2f}")


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def cells(group: Group, original: Group | None) -> list[str]:
    """One line of the table."""
    times = change = ""
    if original is not None and group is not original:
        times = f"{original.nbytes / group.nbytes:.1f}"
        base = original.of(group.seeds) or original  # the same models, where they are trained
        if group.score is not None and base.score is not None:
            change = f"{group.score - base.score:+.2f}"
    label = f"**{group.label}**" if is_ours(group) else group.label
    seconds = _mean(row.seconds for row in group.rows)
    peak = _mean(row.peak_mb for row in group.rows)
    commits = sorted({row.commit for row in group.rows})
    remarks = sorted({row.remark for row in group.rows if row.remark})
    return [
        f"{group.nbytes:,}",
        times,
        label,
        score_of(group),
        change,
        "" if group.distance is None else f"{group.distance:.3g}",
        " ".join(map(str, group.seeds)),
        _number(seconds, 0 if seconds is None or seconds >= 10 else 1),
        _number(peak),
        ", ".join(commits) + "".join(f" ({remark})" for remark in remarks),
    ]


TITLES = (
    "bytes",
    "smaller",
    "method, setting",
    "score",
    "- fp32",
    "distance",
    "seeds",
    "s",
    "MB of memory",
    "commit or version",
)


def table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Markdown."""
    made = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    return [*made, *(f"| {' | '.join(line)} |" for line in lines)]


def original_of(found: Sequence[Group]) -> Group | None:
    """The fp32 row."""
    return next((group for group in found if group.run.method == "fp32"), None)


def missing(rows: Sequence[Row], task: str) -> list[str]:
    """Peers without a score, with their exact errors, and our runs that nobody ran."""
    here = [row for row in rows if row.run.task == task]
    lines = []
    errors = [row for row in here if row.error]
    if errors:
        lines += ["", "Errors, word for word:", ""]
        told = {(f"{r.run.method} {r.run.setting}", _quoted(r.error)) for r in errors}
        lines += table(("method, setting", "error"), sorted(told))
    absent = sorted(set(peers()) - {row.run.method for row in here})
    if absent:
        lines += ["", f"Peers not run on this task: {', '.join(absent)}."]
    known = {row.run for row in here}
    left: dict[str, list[int]] = {}
    for run in runs("full"):
        if run.task == task and run not in known:
            left.setdefault(f"{run.method} {run.setting}", []).append(run.seed)
    if left:
        told_seeds = [f"{name} ({' '.join(map(str, seeds))})" for name, seeds in left.items()]
        lines += ["", f"Ours not run yet, with the seeds: {'; '.join(told_seeds)}."]
    return lines


def _quoted(text: str) -> str:
    """As code in a cell of a table."""
    return "`" + " ".join(text.replace("|", "\\|").replace("`", "'").split()) + "`"


def summary(rows: Sequence[Row]) -> list[str]:
    """How often peers are better, by task; the sections say where."""
    told = []
    for task, facts in TASKS.items():
        found = groups(rows, task)
        some = (
            verdicts(found, task),
            verdicts(found, task, share=SAME),
            verdicts(found, task, [DATA_FREE]),
        )
        counts = [sum(v.peer_wins for v in one) for one in some]
        compared = [sum(v.margin is not None for v in one) for one in some]
        shown = [f"{w} of {n}" if n else "none" for w, n in zip(counts, compared, strict=True)]
        told.append((facts.title, *shown))
    titles = (
        "peers' rows better than",
        "the best of ours within their bytes",
        f"ours of {100 * SAME:.0f} to 100 % of their bytes",
        f"the best of `{DATA_FREE}`, without data, within their bytes",
    )
    return ["", *table(titles, told)]


def section(rows: Sequence[Row], task: str) -> list[str]:
    """A task: first where peers are better, then everything."""
    facts, found = TASKS[task], groups(rows, task)
    lines = ["", f"## {facts.title}", "", f"Score: {facts.metric}."]
    original = original_of(found)
    if original is not None:
        nbytes, score = f"{original.nbytes:,}", score_of(original)
        lines[-1] += f" The model in fp32 takes {nbytes} bytes and scores {score}."
    lines += ["", "Against all our methods:", "", *beaten(verdicts(found, task))]
    lines += at_its_size(found, task)
    if any(group.run.method == DATA_FREE for group in found):
        alone = verdicts(found, task, [DATA_FREE])
        lines += ["", f"Against `{DATA_FREE}` alone, which sees no data:", "", *beaten(alone)]
        lines += at_its_size(found, task, [DATA_FREE])
    lines += ["", f"![Score against bytes](plots/{task}.png)", ""]
    shown = [cells(group, original) for group in reversed(found)]
    lines += table(TITLES, shown)
    return lines + missing(rows, task)


def sources(rows: Sequence[Row]) -> list[str]:
    """Machines and versions, with the number of rows of each."""
    counts: dict[tuple[str, str, str], int] = {}
    for row in rows:
        whose = "ours" if row.run.ours else "peers"
        key = (row.machine or "not recorded", row.torch or "not recorded", whose)
        counts[key] = counts.get(key, 0) + 1
    told = [(*key, str(count)) for key, count in sorted(counts.items())]
    return ["", "## Machines", "", *table(("machine", "torch", "whose", "rows"), told)]


def more(folders: Sequence[Path]) -> list[str]:
    """What noise costs, and how far coding is from the bound, where that was measured."""
    lines = []
    noise, gap = (plots.newest(folders, name) for name in ("noise_cost.json", "gaussian.json"))
    if noise:
        where = noise["environment"]
        lines += ["", "## What noise costs", "", "![Overhead](plots/noise_overhead.png)", ""]
        lines.append(
            "CPU time of one training step of MiniLM (batch 32 x 64 tokens) over that of a plain "
            f"step, medians (`{where['command']}`, {where['commit']}, {where['machine']})."
        )
        told = [
            (name, f"{row['ratio']:.3f}", f"{row['limit']:.2f}", f"{row['extra_megabytes']:,}")
            for name, row in noise["methods"].items()
        ]
        lines += ["", *table(("method", "time, ratio", "limit", "more memory, MB"), told)]
    if gap:
        lines += ["", "## Distance from the rate-distortion bound", ""]
        lines += ["![Gap](plots/coding_gap.png)", ""]
        lines.append(f"Source: {plots.GAUSSIAN} independent normal numbers; bits for each weight.")
        every = [
            [method, *(f"{y:.3f} at {x:.2f}" for x, y in points)]
            for method, points in plots.gaps(gap).items()
        ]
        most = max((len(line) for line in every), default=1)
        heads = ["method", *["bits above the bound, at bits"] * (most - 1)]
        lines += ["", *table(heads, [line + [""] * (most - len(line)) for line in every])]
    return lines


def page(rows: Sequence[Row], folders: Sequence[Path]) -> str:
    """The whole page as Markdown."""
    lines = [HEAD.rstrip(), *summary(rows), "", "Ours:", ""]
    lines += table(("method", "what it is"), METHODS.items())
    seeds = ", ".join(map(str, SEEDS))
    lines += ["", f"Seeds are {seeds} wherever something is random; the tables say which were run."]
    for task in TASKS:
        lines += section(rows, task)
    lines += more(folders) + sources(rows)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page and the plots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    folders = list(dict.fromkeys([RESULTS, options.results.absolute()]))
    rows = read(folders)
    options.results.mkdir(parents=True, exist_ok=True)
    plots.draw(rows, folders, options.results / "plots")
    path = options.results / "README.md"
    path.write_text(page(rows, folders), encoding="utf-8")
    print(f"{len(rows)} rows: {path}")


if __name__ == "__main__":
    main()
