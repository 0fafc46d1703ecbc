"""Random modules go through everything; `python -m benchmarks.any_model` tries hundreds."""

import pytest

from benchmarks.any_model import WAYS, summary, try_all


@pytest.mark.slow
def test_random_modules_end_in_files_or_in_errors_that_say_why() -> None:
    found = summary(try_all(range(1001, 1005)))
    assert found["failed"] == {}
    assert found["models"] == 4
    assert found["ends"]["the same bits"] >= len(WAYS) * 2


def test_a_failure_is_told_from_an_error_that_says_why() -> None:
    rows = [
        {"seed": 1, "said": "", "ways": {"with data": "file", "with data, read": "the same bits"}},
        {"seed": 2, "said": "", "ways": {"with data": "BudgetError: too small"}},
        {"seed": 3, "said": "x", "ways": {"trained": "FAILED: KeyError: 3"}},
    ]
    found = summary(rows)
    assert found["failures"] == 1
    assert list(found["failed"]) == ["3"]
    assert found["refused"] == {"2, with data": "BudgetError: too small"}
