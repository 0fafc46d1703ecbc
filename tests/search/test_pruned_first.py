"""What is pruned before the search is exactly 0 in the file, and what costs least goes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dither
from dither import SpecError
from dither.search import PrunedFirst, data_free


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(64, 48), nn.Linear(48, 10)
    )


def matrices(archive: dither.Archive) -> dict[str, Tensor]:
    return {name: archive[name] for name, entry in archive.entries.items() if len(entry.shape) > 1}


@pytest.mark.parametrize("share", [0.3, 0.8, 0.97])
@pytest.mark.parametrize("size", ["6x", "14x"])
def test_at_least_a_share_is_0(share: float, size: str) -> None:
    archive = dither.compress(network(), size, sensitivity=PrunedFirst(share))
    values = matrices(archive).values()
    zeros = sum(int((value == 0).sum()) for value in values)
    assert zeros >= share * sum(value.numel() for value in values)
    whole = torch.cat([network().get_parameter("3.bias"), network().get_parameter("1.weight")])
    assert bool((whole != 0).any())


def test_a_pattern_holds_in_every_row() -> None:
    archive = dither.compress(network(), "8x", sensitivity=PrunedFirst("2:4"))
    for value in matrices(archive).values():
        rows = value.reshape(len(value), -1)
        runs = rows[:, : rows.shape[1] // 4 * 4].reshape(len(rows), -1, 4)
        assert int((runs != 0).sum(-1).max()) <= 2


def test_what_costs_least_goes_first() -> None:
    weights = {"small": torch.randn(64, 64) * 1e-6, "large": torch.randn(64, 64)}
    known = PrunedFirst(0.5)(weights)
    assert not known["small"].value.any()
    assert torch.equal(known["large"].value, weights["large"])
    known = PrunedFirst(0.7)(weights)
    costs = data_free(weights)
    for name, value in weights.items():
        loss = costs[name].sensitivity * value.square()
        kept = known[name].value != 0
        if bool(kept.any()) and not bool(kept.all()):
            assert float(loss[kept].min()) >= float(loss[~kept].max())


def test_the_budget_is_kept_at_few_and_at_many_bytes() -> None:
    for size in ("3x", "12x"):
        archive = dither.compress(network(), size, sensitivity=PrunedFirst(0.9))
        assert archive.nbytes <= archive.original_nbytes / float(size[:-1])


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, "4:2", "half", float("nan")])
def test_refused(share: float | str) -> None:
    with pytest.raises(SpecError, match="above 0 and below 1"):
        PrunedFirst(share)


def test_refused_without_matrices() -> None:
    with pytest.raises(SpecError, match="no matrix"):
        dither.compress({"b": torch.randn(100)}, "4x", sensitivity=PrunedFirst(0.5))
