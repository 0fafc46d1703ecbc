"""Random models from end to end: a slice of the fuzz, and that it sees what it is to see."""

from pathlib import Path

import pytest
import torch
from torch import nn

import dither
from benchmarks import any_model
from benchmarks.odd_models import Specimen, specimen


def test_a_file_within_the_budget_or_an_error_that_says_why() -> None:
    cases = any_model.run(0, list(range(12)))
    assert [f"{case.number} {case.way}: {fault}" for case in cases for fault in case.faults] == []
    assert sum(bool(case.path) for case in cases) > len(cases) / 2
    assert {case.way for case in cases if case.path} == set(any_model.WAYS)


def drawn(model: nn.Module, size: int | str = "4x") -> Specimen:
    return Specimen(model, [torch.randn(4, 20)], size, (), torch.float32, inference=False)


def test_other_bits_in_another_process_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "0.dither"
    first = specimen(0, 0)
    case = any_model.Case(0, "without data", path=str(path))
    any_model.compressed(first, case, has_data=False)
    assert case.faults == []
    case.digest = case.digest[::-1]
    any_model.compare(0, [case])
    assert case.faults == ["another process: other bits"]


def test_larger_files_and_changed_sources_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(20, 30)
    true = dither.compress

    def wrong(source: nn.Module, size: int, **_: object) -> dither.Archive:
        archive = true(source, "2x")
        source.get_parameter("bias").data.add_(1)
        source.eval()
        return archive

    monkeypatch.setattr(dither, "compress", wrong)
    case = any_model.Case(0, "without data", path=str(tmp_path / "a.dither"))
    any_model.compressed(drawn(model), case, has_data=False)
    assert [fault.split(",")[0].split(" bytes")[-1] for fault in case.faults[:2]] == [
        "the source's tensors changed",
        "the source's modes changed",
    ]
    assert "the budget is" in case.faults[2]
