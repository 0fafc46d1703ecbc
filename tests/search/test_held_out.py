"""Files are judged by samples that they were not fitted to, where samples are few."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.archive import pack
from dither.core import Stats
from dither.data import squared
from dither.formats import Raw
from dither.search import Trial
from dither.search.held_out import LEAST, MANY, enough, hold_out, rows_of
from dither.search.trials import Bench


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    body = [layer for _ in range(2) for layer in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(*body, nn.Linear(32, 8)).eval()


MIX = normal(32, 32, seed=9) * torch.linspace(0, 2, 32) ** 4
"""Inputs that lie in few directions: what a few samples say of them is mostly chance."""


def samples(count: int, seed: int) -> Tensor:
    return normal(count, 32, seed=seed) @ MIX


def trials_of(archive: dither.Archive) -> list[Trial]:
    return [trial for trial in archive.trials if isinstance(trial, Trial)]


def held_out_error(model: nn.Module, archive: dither.Archive) -> float:
    changed, others = network(), samples(2000, 77)
    dither.load_into(changed, archive)
    with torch.no_grad():
        return float(squared(changed(others), model(others)))


@pytest.mark.parametrize("count", [4, 16])
def test_what_few_samples_report_is_what_others_see(count: int) -> None:
    model, ratios = network(), []
    plain = held_out_error(model, dither.compress(model, "10x"))
    for seed in range(3):
        archive = dither.compress(model, "10x", data=[samples(count, seed)])
        kept = [trial for trial in trials_of(archive) if trial.kept][-1]
        assert archive.nbytes == kept.nbytes
        error = held_out_error(model, archive)
        assert error < 1.05 * plain
        ratios.append(error / kept.distance)
    assert sorted(ratios)[1] < 1.6


def test_the_way_that_wins_is_gone_again_with_all_samples() -> None:
    model, given = network(), samples(32, 0)
    archive = dither.compress(model, "12x", data=[given])
    *tried, last = trials_of(archive)
    before = [trial for trial in tried if trial.kept][-1]
    assert before.stage + ", anew" == last.stage
    assert last.kept
    assert last.distance == before.distance
    assert "fitted to all 32 samples" in last.note
    assert last.note in str(last)


def test_what_is_right_for_some_samples_alone_is_not_kept() -> None:
    table = nn.Embedding(16, 8)
    values = table.weight.detach()
    fair = 0.7 * values
    overfitted = torch.cat([values[:8], 0.65 * values[8:]])  # nearer to all together
    bench = Bench(table, dither.Data([torch.arange(16)]), None)
    for stage, weight in (("fair", fair), ("overfitted", overfitted)):
        bench.attempt(stage, partial(pack, {"weight": Raw().encode(weight)}))
    assert [trial.kept for trial in bench.trials] == [True, False]
    assert [trial.distance for trial in bench.trials] == pytest.approx([0.3**2, 0.35**2])


def test_few_samples_are_called_few() -> None:
    few, many = (
        trials_of(dither.compress(network(), "12x", data=[samples(count, 0)]))
        for count in (16, MANY)
    )
    notes = {trial.stage: trial.note for trial in few}
    assert notes["calibrated"] == "16 samples are few: about 64 would do"
    assert notes["calibrated, in sequence"] == notes["calibrated"]
    assert not notes["data-free"]
    assert [trial.note for trial in many] == [""] * len(many)
    alone = trials_of(dither.compress(network(), "12x", data=[samples(1, 0)]))
    assert "no sample could be held out" in alone[-1].note


def test_a_score_decides_by_itself() -> None:
    archive = dither.compress(network(), "12x", data=[samples(16, 0)], evaluate=lambda _: 1.0)
    assert not any("anew" in trial.stage for trial in trials_of(archive))


class Centred(nn.Module):
    """Takes the mean of its batch away: samples are not one for each row."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def whole_only(_: nn.Module, batch: Tensor) -> Tensor:
    if len(batch) != 16:
        raise ValueError(len(batch))
    return batch


BATCHES: dict[str, Any] = {
    "tensor": normal(16, 3),
    "with labels": [normal(16, 3), torch.arange(16)],
    "dict": {"input": normal(16, 3), "names": ["a"]},
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("count", [1, 3])
def test_batches_are_cut_between_their_samples(batch: object, count: int) -> None:
    def forward(_: nn.Module, given: Any) -> Tensor:  # noqa: ANN401
        first = given["input"] if isinstance(given, dict) else given
        found: Tensor = (first[0] if isinstance(first, list) else first) * 2
        return found

    data = dither.Data([copy.deepcopy(batch)] * count, forward=forward)
    split = hold_out(nn.Identity(), data)
    fit, judge = list(split.fit), list(split.judge)
    assert split.held == sum(map(rows_of, judge)) == max(LEAST, 16 * count // 4)
    assert split.rows == 16 * count == sum(map(rows_of, fit)) + split.held
    for one, other in zip(fit, judge, strict=True):
        joined = torch.cat([forward(nn.Identity(), part) for part in (one, other)])
        assert torch.equal(joined, forward(nn.Identity(), batch))


@pytest.mark.parametrize("forward", [None, whole_only], ids=["mean of the batch", "one size only"])
def test_other_batches_stay_whole(forward: Any) -> None:  # noqa: ANN401
    batches = [normal(16, 3, seed=i) for i in range(3)]
    data = dither.Data(batches, **({} if forward is None else {"forward": forward}))
    split = hold_out(Centred(), data)
    assert [next(iter(part)).shape for part in (split.fit, split.judge)] == [(16, 3)] * 2
    assert (len(list(split.fit)), len(list(split.judge))) == (2, 1)
    alone = hold_out(Centred(), dither.Data(batches[:1], forward=data.forward))
    assert alone.held == 0
    assert list(alone.judge) == batches[:1]


def test_many_samples_all_fit_and_judge() -> None:
    split = hold_out(nn.Identity(), dither.Data([normal(MANY // 2, 3)] * 2))
    assert (split.held, split.rows) == (0, MANY)


def test_enough_is_two_vectors_for_each_input_of_half_of_the_weights() -> None:
    data = dither.Data([normal(5, 3)] * 2)
    wide, narrow = (Stats(gram=torch.eye(n), samples=n) for n in (32, 8))
    assert enough({"a": wide, "b": narrow}, data) == 20
    assert enough({"a": Stats(gram=torch.eye(32), samples=320), "b": narrow}, data) == 2
    assert enough({"t": Stats(counts=torch.ones(4))}, data) == 0
