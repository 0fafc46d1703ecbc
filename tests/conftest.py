"""What all tests share: repeatable runs, real data where there is some, and which are slow."""

import json
import os
from collections.abc import Generator
from itertools import chain
from pathlib import Path

import hypothesis
import pytest
import torch

# Same sums in the same order on every machine, and no fight over cores.
torch.set_num_threads(1)

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

DATA = os.environ.get("DITHER_DATA", "")

DURATIONS = Path(__file__).with_name("durations.json")
"""Processor seconds that a case of each test function takes on average, by `make durations`."""
SLOW = 0.1
"""Functions whose cases take so many seconds are marked `slow`. One that is not in the table is
not: a new test is quick until it is measured."""
LAST = pytest.StashKey[float]()
"""Processor seconds until the last report."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-durations", action="store_true", help=f"write {DURATIONS.name}")


def pytest_configure() -> None:
    if DATA and not Path(DATA).is_dir():
        raise pytest.UsageError(f"DITHER_DATA={DATA!r} is not a folder; correct it or unset it")


def pytest_report_header() -> str:
    return f"DITHER_DATA: {DATA or 'unset, SO TESTS ON REAL DATA ARE SKIPPED'}"


def function_of(test: str) -> str:
    """The test function that a case belongs to, named as pytest names it."""
    return test.partition("[")[0]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is slow, and what takes `data_dir` as `data`; what is marked so is skipped without.

    Of several processes none shall be left alone with a long test at the end: those come first.
    """
    seconds: dict[str, float] = json.loads(DURATIONS.read_text(encoding="utf-8"))
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: -seconds.get(function_of(item.nodeid), 0.0))
    missing = pytest.mark.skip(reason="NEEDS REAL DATA: set DITHER_DATA to its folder")
    for item in items:
        if seconds.get(function_of(item.nodeid), 0.0) >= SLOW:
            item.add_marker(pytest.mark.slow)
        if "data_dir" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.data)
        if item.get_closest_marker("data") and not DATA:
            item.add_marker(missing)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real models and data."""
    return Path(DATA).resolve()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note processor time, with that of processes which the test has ended, in each report.

    Unlike time by the clock it hardly depends on what else a machine does.
    """
    report = yield
    now = sum(os.times()[:4])
    report.user_properties.append(("seconds", now - item.config.stash.get(LAST, now)))
    item.config.stash[LAST] = now
    return report


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Write the table of durations, or name what has become much slower than it says."""
    cases: dict[str, dict[str, float]] = {}
    for report in chain(*terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            taken = cases.setdefault(function_of(report.nodeid), {})
            seconds = dict(report.user_properties).get("seconds", 0.0)
            taken[report.nodeid] = taken.get(report.nodeid, 0.0) + float(str(seconds))
    means = {
        name: round(sum(taken.values()) / len(taken), 2) for name, taken in sorted(cases.items())
    }
    if config.getoption("--update-durations"):
        kept = {name: mean for name, mean in means.items() if mean >= SLOW}
        DURATIONS.write_text(json.dumps(kept, indent=0) + "\n", encoding="utf-8")
        return
    known = json.loads(DURATIONS.read_text(encoding="utf-8"))
    late = [name for name, mean in means.items() if mean > 10 * SLOW and name not in known]
    if late:
        terminalreporter.write_line(
            f"over {10 * SLOW:g} s and not marked slow: {', '.join(late)}; run `make durations`"
        )
