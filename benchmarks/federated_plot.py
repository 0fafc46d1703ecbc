"""Tables and a plot of what ``benchmarks.federated`` and ``benchmarks.federated_faults`` found."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.plots import MARKS, pyplot, save

NAMES = {
    "plain": "FedAvg",
    "kure": "KURE",
    "qat": "QAT at 4 bits",
    "apqn": "APQN",
    "mqat": "MQAT",
}
FLOAT = "float32"
WIDTHS = ("32", "8", "6", "4", "3", "2")
Found = Mapping[str, Mapping[str, Any]]


def mean(values: Iterable[float]) -> str:
    """Mean with two digits, and the standard deviation of several."""
    some = list(values)
    spread = f" ± {statistics.stdev(some):.2f}" if len(some) > 1 else ""
    return f"{statistics.mean(some):.2f}{spread}"


def seeds(rows: Found, objective: str, wire: str) -> list[Mapping[str, Any]]:
    """Rows that differ in their seed alone."""
    return [r for r in rows.values() if (r["objective"], r["wire"]) == (objective, wire)]


def objectives(rows: Found) -> Iterable[str]:
    """One line of Markdown for each objective: accuracy at each width, and kurtosis."""
    for kind, name in NAMES.items():
        some = seeds(rows, kind, FLOAT)
        if some:
            cells = [mean(row["accuracy"][bits] for row in some) for bits in WIDTHS]
            cells.append(f"{statistics.mean(row['kurtosis'] for row in some):.2f}")
            yield f"| {name} | {len(some)} | " + " | ".join(cells) + " |"


def messages(rows: Found) -> Iterable[str]:
    """One line for each kind of message: bytes of a round and of all, accuracy, and what it lost.

    The loss is to float32 with the same seeds.
    """
    plain = {row["seed"]: row["accuracy"]["32"] for row in seeds(rows, "plain", FLOAT)}
    for wire in dict.fromkeys(r["wire"] for r in rows.values() if r["objective"] == "plain"):
        some = seeds(rows, "plain", wire)
        before, last = some[0]["rounds"][-2:]
        each = sum(last[way] - before[way] for way in ("down", "up"))
        total = statistics.mean(sum(row["bytes"].values()) for row in some)
        score = mean(row["accuracy"]["32"] for row in some)
        gain = statistics.mean(row["accuracy"]["32"] - plain[row["seed"]] for row in some)
        cells = [wire, str(len(some)), f"{each:,}", f"{total / 1e6:.1f} MB", score, f"{gain:+.2f}"]
        yield "| " + " | ".join(cells) + " |"


def faults(cases: Found) -> Iterable[str]:
    """One line for each case of ``benchmarks.federated_faults``."""
    for name, row in cases.items():
        spans = ", ".join(f"{seconds:.1f}" for seconds in row["seconds of rounds"])
        said = "; ".join(f"{what}: {seconds:.1f} s" for what, seconds in row["seconds"].items())
        lost = f"{sum(row['refused'])} refused, {sum(row['failed'])} failed"
        yield f"| {name} | {spans} | {lost} | {'yes' if row['same model'] else 'no'} | {said} |"


def table(rows: Found) -> str:
    """Both, as Markdown."""
    first = ["| objective | seeds | " + " | ".join(WIDTHS) + " | kurtosis |", "|" + " --- |" * 9]
    head = "| messages | seeds | bytes of a round | of all | accuracy, % | to float32 |"
    second = ["", head, "|" + " --- |" * 6]
    return "\n".join([*first, *objectives(rows), *second, *messages(rows)])


def draw(rows: Found, path: Path) -> None:
    """Accuracy over width for each objective, and over bytes for each kind of message."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4.2))
    for number, (kind, name) in enumerate(NAMES.items()):
        some = seeds(rows, kind, FLOAT)
        if some:
            grey = str(round(0.15 * number, 2))
            scores = [[row["accuracy"][bits] for row in some] for bits in WIDTHS]
            left.errorbar(
                range(len(WIDTHS)),
                [statistics.mean(values) for values in scores],
                [statistics.stdev(values) if len(values) > 1 else 0 for values in scores],
                marker=MARKS[number],
                color=grey,
                label=name,
                capsize=2,
            )
    wires = dict.fromkeys(r["wire"] for r in rows.values() if r["objective"] == "plain")
    left.set_xticks(range(len(WIDTHS)), WIDTHS)
    left.set(xlabel="bits of a weight", ylabel="accuracy, %")
    for number, wire in enumerate(wires):
        some = seeds(rows, "plain", wire)
        rounds = list(zip(*(row["rounds"] for row in some), strict=True))
        nbytes = [statistics.mean(one["down"] + one["up"] for one in each) for each in rounds]
        score = [statistics.mean(one["accuracy"] for one in each) for each in rounds]
        right.plot(
            [count / 1e6 for count in nbytes],
            score,
            marker=MARKS[number],
            color=str(0.15 * number),
            label=wire,
            ms=3,
        )
    right.set(xlabel="bytes both ways, MB", ylabel="accuracy, %", xscale="log")
    for axes in (left, right):
        axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    save(figure, path)
