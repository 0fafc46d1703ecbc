"""Padding that a mask hides: statistics are those of the sequences without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.calibrate import Layerwise, collect
from dither.core import Stats
from dither.data import Data
from dither.search import Trial

LENGTHS = [3, 7, 5, 2]


def rows(width: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, width, generator=generator) for length in LENGTHS]


def padded(some: list[Tensor], *, time_first: bool = False) -> dict[str, Tensor]:
    """One batch of all, with a mask, in which padding would be seen."""
    most = max(map(len, some))
    values = torch.full((len(some), most, *some[0].shape[1:]), 9, dtype=some[0].dtype)
    mask = torch.zeros(len(some), most, dtype=torch.long)
    for number, row in enumerate(some):
        values[number, : len(row)], mask[number, : len(row)] = row, 1
    return {"x": values.transpose(0, 1) if time_first else values, "attention_mask": mask}


def forward(model: nn.Module, batch: dict[str, Tensor]) -> object:
    return model(batch["x"])


def attended(model: nn.Module, batch: dict[str, Tensor]) -> object:
    x, hidden = batch["x"], batch["attention_mask"] == 0
    return model(x, x, x, key_padding_mask=hidden, need_weights=False)[0]


def flattened(model: nn.Module, batch: dict[str, Tensor]) -> object:
    return model(batch["x"].flatten(0, 1))


def channels(model: nn.Module, batch: dict[str, Tensor]) -> object:
    shown = batch["x"] * batch["attention_mask"][..., None]
    return model(shown.transpose(1, 2))


def heads(model: nn.Module, batch: dict[str, Tensor]) -> object:
    return model(batch["x"].unflatten(2, (2, 3)))


LAYERS: dict[str, tuple[nn.Module, Any, bool]] = {
    "linear": (nn.Linear(6, 5), forward, False),
    "linear, flat": (nn.Linear(6, 5), flattened, False),
    "linear, heads": (nn.Linear(3, 5), heads, False),
    "linear, time first": (nn.Linear(6, 5), forward, True),
    "conv": (nn.Conv1d(6, 5, 3, padding=1), channels, False),
    "attention": (nn.MultiheadAttention(6, 2, batch_first=True), attended, False),
    "attention, time first": (nn.MultiheadAttention(6, 2), attended, True),
    "gru": (nn.GRU(6, 5, num_layers=2, batch_first=True), forward, False),
    "lstm, time first": (nn.LSTM(6, 5), forward, True),
}


def same(one: Stats, other: Stats) -> None:
    assert one.samples == other.samples
    for found, wanted in ((one.gram, other.gram), (one.mean, other.mean)):
        assert found is not None
        assert wanted is not None
        assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_moments_are_those_without_padding(name: str) -> None:
    model, run, time_first = LAYERS[name]
    single = [padded([row], time_first=time_first) for row in rows()]
    whole = padded(rows(), time_first=time_first)
    wanted, found = (collect(model, Data(data, run)) for data in (single, [whole]))
    assert set(found) == set(wanted)
    for key, stats in found.items():
        scale = 2 if name == "linear, heads" else 1
        assert wanted[key].samples == scale * sum(LENGTHS)
        if scale == 1:
            same(stats, wanted[key])
        else:
            assert stats.gram is not None
            gram = wanted[key].gram
            assert gram is not None
            assert torch.allclose(stats.gram, gram, atol=1e-5)
    unmasked = collect(model, Data([whole], run, mask=None))
    assert all(stats.samples > found[key].samples for key, stats in unmasked.items())


def test_padding_tokens_are_not_counted() -> None:
    tokens = [torch.tensor(row) for row in ([1, 2], [3, 3, 3], [4])]
    batch = padded(tokens)
    counts = collect(nn.Embedding(10, 4), Data([batch], forward))["weight"].counts
    assert counts is not None
    assert counts.tolist() == [0, 1, 1, 3, 1, 0, 0, 0, 0, 0]


class Sentences(nn.Module):
    """Two layers, and attention that a mask keeps away from padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.first = nn.Embedding(40, 32), nn.Linear(32, 32)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.first(self.table(input_ids)).relu()
        found: Tensor = self.attention(x, x, x, key_padding_mask=attention_mask == 0)[0]
        return found


def sentences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(10, 40, (n,), generator=generator) for n in LENGTHS * 6]


def batch_of(some: list[Tensor]) -> dict[str, Tensor]:
    made = padded(some)
    return {"input_ids": made["x"], "attention_mask": made["attention_mask"]}


def test_in_sequence_sees_no_padding() -> None:
    model = Sentences().eval()
    alone = [batch_of([row]) for row in sentences()]
    together = [batch_of(sentences()[start : start + 8]) for start in range(0, 24, 8)]
    found: list[dict[str, Stats]] = []
    for data in (alone, together):
        layers = Layerwise(model, data)
        with layers.walk(layers.order.names) as walk:
            found.append({layer.name: layer.stats for layer in walk})
    assert list(found[0]) == list(found[1])
    for name, stats in found[0].items():
        assert stats.gram is not None
        assert stats.cross is not None
        other = found[1][name]
        assert other.gram is not None
        assert other.cross is not None
        assert torch.allclose(stats.gram, other.gram, atol=1e-4)
        assert torch.allclose(stats.cross, other.cross, atol=1e-4)


def test_what_padding_holds_changes_no_byte() -> None:
    """Neither moments, nor frequencies, nor sensitivities, nor distances see it."""
    made = []
    for filler in (0, 9):
        data = [batch_of(sentences()[start : start + 8]) for start in range(0, 24, 8)]
        for batch in data:
            batch["input_ids"].masked_fill_(batch["attention_mask"] == 0, filler)
        made.append(dither.compress(Sentences().eval(), "8x", data=data))
    trials = [[t for t in one.trials if isinstance(t, Trial)] for one in made]
    assert not any(t.error for t in trials[0])
    for one, other in zip(*trials, strict=True):
        assert one.nbytes == other.nbytes
        assert one.distance == pytest.approx(other.distance, rel=1e-6)
