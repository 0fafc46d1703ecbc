"""What all tests share: repeatable runs, and the folder of real data where there is one."""

import os
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


def pytest_configure() -> None:
    if DATA and not Path(DATA).is_dir():
        raise pytest.UsageError(f"DITHER_DATA={DATA!r} is not a folder; correct it or unset it")


def pytest_report_header() -> str:
    return f"DITHER_DATA: {DATA or 'unset, SO TESTS ON REAL DATA ARE SKIPPED'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that takes `data_dir` is marked `data`, and one marked `data` is skipped without."""
    missing = pytest.mark.skip(reason="NEEDS REAL DATA: set DITHER_DATA to its folder")
    for item in items:
        if "data_dir" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.data)
        if item.get_closest_marker("data") and not DATA:
            item.add_marker(missing)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real models and data."""
    return Path(DATA).resolve()
