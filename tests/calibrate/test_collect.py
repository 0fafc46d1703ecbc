"""Calibration: moments are those of the layer's own inputs, and the model is left as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dither.calibrate import collect, input_vectors
from dither.core import SpecError
from dither.data import Data
from dither.testing import same_bits


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 11)),
    (nn.Conv1d(4, 6, 3, padding="same", dilation=2), (2, 4, 11)),
    (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 8)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), groups=2), (2, 4, 7, 8)),
    (nn.Conv2d(4, 4, 3, groups=4, padding="valid"), (2, 4, 7, 8)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7, 8)),
    (nn.Conv3d(2, 3, 2, stride=2, dilation=2), (2, 2, 6, 7, 6)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 4)),
    (nn.ConvTranspose2d(4, 6, 2, padding=1, dilation=3), (2, 4, 5, 4)),
    (nn.ConvTranspose3d(2, 3, 2, stride=2), (1, 2, 3, 3, 2)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=str)
def test_vectors_times_the_weight_are_the_outputs(
    layer: nn.Conv2d | nn.ConvTranspose2d, shape: tuple[int, ...]
) -> None:
    values = normal(*shape)
    with torch.no_grad():
        expected = layer(values).movedim(1, -1)
        vectors = torch.cat(list(input_vectors(layer, values)), 1)
        weight = layer.weight
        if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            # (inputs, outputs of a group, taps) to (groups, outputs, inputs and taps)
            parts = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(2)
        else:
            parts = weight.unflatten(0, (layer.groups, -1)).flatten(2)
        found = torch.einsum("gvi,goi->vgo", vectors, parts).flatten(1)
        assert layer.bias is not None
        found += layer.bias
    assert torch.allclose(found, expected.reshape(found.shape), atol=1e-5)
    stats = collect(layer, [values, values])["weight"]
    gram = vectors.transpose(1, 2) @ vectors / vectors.shape[1]
    assert stats.gram is not None
    assert stats.mean is not None
    assert torch.allclose(stats.gram, gram.squeeze(0), atol=1e-4)
    assert torch.allclose(stats.mean, vectors.mean(1).squeeze(0), atol=1e-5)
    assert stats.samples == 2 * vectors.shape[1]
    assert (stats.low, stats.high) == (float(vectors.min()), float(vectors.max()))


class Everything(nn.Module):
    """An embedding, dropout, batch norm, a tied head, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.norm = nn.BatchNorm1d(8)
        self.twice = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(tokens).mean(1))
        logits: Tensor = self.head(self.dropout(self.twice(self.twice(hidden))))
        return logits


def everything() -> Everything:
    torch.manual_seed(0)
    return Everything()


def test_the_model_is_left_as_it_was() -> None:
    model = everything()
    model.norm.eval()
    model.head.weight.requires_grad_(False)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random = torch.get_rng_state()
    tokens = torch.arange(20).reshape(4, 5)
    collect(model, [tokens], loss=lambda output, _: output.square().mean())
    assert all(same_bits(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_hooks_go_after_an_error() -> None:
    model = everything()
    with pytest.raises(IndexError):
        collect(model, [torch.tensor([[0, 1]]), torch.tensor([[20]])])
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_token_counts_ties_and_what_is_never_called() -> None:
    model = everything()
    tokens = torch.tensor([[1, 1, 2], [1, 3, 3]])
    stats = collect(model, [tokens, tokens])
    assert set(stats) == {"embedding.weight", "twice.weight"}
    table = stats["embedding.weight"]
    assert table.counts is not None
    assert table.counts.tolist() == [0, 6, 2, 4] + [0] * 16
    assert table.importance is not None
    assert table.importance[:2].tolist() == [[0.5], [6.0]]
    assert table.gram is not None  # as a head
    assert table.samples == 4
    assert stats["twice.weight"].samples == 8


def test_the_fisher_information() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    batches = [(normal(1, 4, seed=i), torch.tensor([i % 2])) for i in range(5)]

    def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(output, batch[1])

    found = collect(model, batches, loss=loss)
    for name, parameter in model.named_parameters():
        squares = []
        for batch in batches:
            value = loss(model(batch[0]), batch)
            squares.append(torch.autograd.grad(value, parameter)[0].square())
        importance = found[name].importance
        assert importance is not None
        assert torch.allclose(importance, torch.stack(squares).mean(0), rtol=1e-4)
    assert found["0.bias"].gram is None
    with pytest.raises(SpecError, match="a loss is a scalar"):
        collect(model, batches, loss=lambda output, _: output)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kdim", [None, 6])
def test_attention(kdim: int | None, batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=kdim, vdim=kdim)
    query = normal(5, 3, 8)
    key = query if kdim is None else normal(5, 3, 6)
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    if batch_first:
        query, key = query[:3], key[:3]  # sizes that tell time from batch: (3, 3) and (5, 5)
        query, key = normal(3, 5, 8), normal(3, 5, 8) if kdim is None else normal(3, 5, 6)

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        output: Tensor = model(batch, key, value=key, attn_mask=mask)[0]
        return output

    seen: list[Tensor] = []
    stats = collect(layer, Data([query], forward))
    assert len(stats) == (2 if kdim is None else 4)
    if kdim is None:
        gram = stats["in_proj_weight"].gram
        assert gram is not None
        assert gram.shape == (3, 8, 8)
        rows = query.reshape(-1, 8)
        assert torch.allclose(gram[0], rows.T @ rows / 15, atol=1e-5)
    # The output's moments follow from those of what the output projection multiplies.
    with torch.no_grad():
        output = layer(query, key, key, attn_mask=mask)[0].reshape(-1, 8) - layer.out_proj.bias
        seen.append(output)
        inner = stats["out_proj.weight"].gram
        assert inner is not None
        weight = layer.out_proj.weight
        assert torch.allclose(weight @ inner @ weight.T, output.T @ output / 15, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_recurrent(kind: type[nn.LSTM], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = kind(4, 5, batch_first=True, **options)
    values = normal(3, 6, 4)
    stats = collect(layer, [values])
    assert set(stats) == {name for name, _ in layer.named_parameters() if "weight" in name}
    # The last layer's hidden states are its output.
    last = layer.num_layers - 1
    with torch.no_grad():
        output = layer(values)[0][..., :5]
        states = torch.cat([torch.zeros(3, 1, 5), output[:, :-1]], 1).reshape(-1, 5)
    gram = stats[f"weight_hh_l{last}"].gram
    assert gram is not None
    assert torch.allclose(gram, states.T @ states / 18, atol=1e-5)
    if layer.num_layers == 2:
        assert stats["weight_ih_l1_reverse"].gram is not None
        assert stats["weight_ih_l1_reverse"].gram.shape == (10, 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_weights_of_any_type(kind: type[nn.LSTM], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = kind(4, 5, num_layers=2)
    values = normal(6, 3, 4)
    expected = collect(layer, [values])
    found = collect(layer.to(dtype), [values.to(dtype)])
    assert set(found) == set(expected)
    for name, stats in found.items():
        plain = expected[name].gram
        assert stats.gram is not None
        assert plain is not None
        assert torch.allclose(stats.gram, plain, atol=0.03)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projected_lstm() -> None:
    layer = nn.LSTM(4, 5, proj_size=3)
    stats = collect(layer, [normal(6, 2, 4)])
    assert set(stats) == {"weight_ih_l0", "weight_hh_l0"}


def test_wide_layers_have_blocks_and_memory_is_bounded() -> None:
    layer, values = nn.Linear(10, 2), normal(50, 10)
    stats = collect(layer, [values], most_inputs=4)["weight"]
    gram = values.T @ values / 50
    assert stats.gram is not None
    assert stats.gram.shape == (3, 4, 4)
    assert torch.allclose(stats.gram[1], gram[4:8, 4:8], atol=1e-5)
    assert torch.allclose(stats.gram[2, :2, :2], gram[8:, 8:], atol=1e-5)
    assert not bool(stats.gram[2, 2:].any())


def test_conv1d_of_gpt2_is_transposed() -> None:
    transformers = pytest.importorskip("transformers")
    layer = transformers.pytorch_utils.Conv1D(6, 4)
    values = normal(7, 4)
    stats = collect(layer, [values])["weight"]
    assert stats.outputs == 1
    assert stats.gram is not None
    assert torch.allclose(stats.gram, values.T @ values / 7, atol=1e-5)


def test_loaders() -> None:
    layer, values = nn.Linear(3, 2), normal(4, 3)
    for batch in (values, (values, 1), [values], {"input": values}):
        assert collect(layer, [batch])["weight"].samples == 4
    assert collect(layer, Data([values] * 5, batches=2))["weight"].samples == 8
    with pytest.raises(SpecError, match="no batch"):
        collect(layer, [])
    with pytest.raises(SpecError, match="batches=0"):
        collect(layer, Data([values], batches=0))


def test_an_attached_model_runs_as_it_is() -> None:
    import dither

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
    run = dither.attach(model, {"*weight": dither.StraightThrough(dither.Affine(2))})
    stats = collect(model, [normal(9, 6)])
    assert {"0.weight", "1.weight"} <= set(stats)
    with torch.no_grad():
        hidden = model.eval()[0](normal(9, 6))
    gram = stats["1.weight"].gram
    assert gram is not None
    assert torch.allclose(gram, hidden.T @ hidden / 9, atol=1e-5)
    run.detach()
