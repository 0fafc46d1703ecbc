"""Recurrent layers that start from a state, and cells that are called step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import dither
from dither.calibrate import collect
from dither.data import Data
from dither.search import Trial


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gram_of(vectors: Tensor) -> Tensor:
    flat = vectors.reshape(-1, vectors.shape[-1])
    return flat.T @ flat / len(flat)


KINDS = [nn.RNN, nn.GRU, nn.LSTM]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_layers_start_from_their_state(kind: type[nn.LSTM], by_name: bool, batched: bool) -> None:
    torch.manual_seed(0)
    layer = kind(4, 5, num_layers=2, bidirectional=True)
    shape = (3,) if batched else ()
    values, start = normal(6, *shape, 4), 3 * normal(4, *shape, 5, seed=1)
    state: Any = (start, 2 * normal(4, *shape, 5, seed=2)) if kind is nn.LSTM else start

    def forward(model: nn.Module, x: Tensor) -> object:
        return model(hx=state, input=x) if by_name else model(x, state)

    stats = collect(layer, Data([values], forward))
    with torch.no_grad():
        output = layer(values, state)[0]
    ahead = torch.cat([start[2:3], output[:-1, ..., :5]])
    back = torch.cat([output[1:, ..., 5:], start[3:4]])
    for name, wanted in (("weight_hh_l1", ahead), ("weight_hh_l1_reverse", back)):
        found = stats[name].gram
        assert found is not None
        assert torch.allclose(found, gram_of(wanted), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_sequences_are_their_sequences(kind: type[nn.LSTM], batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = kind(4, 5, num_layers=2, bidirectional=True, batch_first=batch_first)
    rows = [normal(length, 4, seed=length) for length in (3, 6, 2)]
    starts = [normal(2, 4, 3, 5, seed=9)[i] for i in range(2 if kind is nn.LSTM else 1)]

    def forward(model: nn.Module, batch: list[int]) -> object:
        packed = pack_sequence([rows[i] for i in batch], enforce_sorted=False)
        state = tuple(start[:, batch].contiguous() for start in starts)
        return model(packed, state if kind is nn.LSTM else state[0])

    whole, single = (collect(layer, Data(data, forward)) for data in ([[0, 1, 2]], [[0], [1], [2]]))
    alone = [
        (rows[i].unsqueeze(0 if batch_first else 1), [start[:, i : i + 1] for start in starts])
        for i in range(3)
    ]

    def plain(model: nn.Module, batch: tuple[Tensor, list[Tensor]]) -> object:
        return model(batch[0], tuple(batch[1]) if kind is nn.LSTM else batch[1][0])

    wanted = collect(layer, Data(alone, plain))
    for name, stats in wanted.items():
        for found in (whole[name], single[name]):
            assert found.samples == stats.samples == 11
            assert found.gram is not None
            assert stats.gram is not None
            assert torch.allclose(found.gram, stats.gram, atol=1e-5)


CELLS = [nn.RNNCell, nn.GRUCell, nn.LSTMCell]


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("shape", [(3,), ()])
def test_cells(kind: type[nn.LSTMCell], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    cell, values = kind(4, 5), normal(6, *shape, 4)
    states = [torch.zeros(*shape, 5)]

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        state: Any = None
        for step in x:
            state = model(step, state)
            states.append(state[0] if kind is nn.LSTMCell else state)
        return states[-1]

    stats = collect(cell, Data([values], forward))
    for name, wanted in (("weight_ih", values), ("weight_hh", torch.stack(states[:-1]))):
        found = stats[name].gram
        assert found is not None
        assert torch.allclose(found, gram_of(wanted), atol=1e-5)


class Translator(nn.Module):
    """A decoder that starts from what an encoder made, and cells after it."""

    def __init__(self, kind: type[nn.LSTM], cell: type[nn.LSTMCell]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(30, 16)
        self.encoder, self.decoder = (kind(16, 24, batch_first=True) for _ in range(2))
        self.cell, self.head = cell(24, 24), nn.Linear(24, 30)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        state = self.encoder(self.table(source))[1]
        outputs, hidden = self.decoder(self.table(target), state)[0], None
        for step in outputs.unbind(1):
            hidden = self.cell(step, hidden)
        last = hidden[0] if isinstance(hidden, tuple) else hidden
        found: Tensor = self.head(last)
        return found


@pytest.mark.parametrize(("kind", "cell"), list(zip(KINDS, CELLS, strict=True)))
def test_an_encoder_and_a_decoder_are_compressed(
    kind: type[nn.LSTM], cell: type[nn.LSTMCell]
) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [tuple(torch.randint(30, (8, n), generator=generator) for n in (5, 7)) for _ in range(3)]
    archive = dither.compress(Translator(kind, cell).eval(), "6x", data=data)
    trials = [trial for trial in archive.trials if isinstance(trial, Trial)]
    assert not any(trial.error for trial in trials)
    assert trials[2].distance < trials[0].distance
