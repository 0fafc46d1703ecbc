"""Token tables in a rotated basis: when it pays, what is predicted, and budgets that are met."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import dither
from dither.archive import code
from dither.formats import Affine, Factors
from dither.search import data_free
from dither.search.knowledge import Knowledge
from dither.search.ladder import Ladder
from dither.search.predict import GRID_INDEX_NBYTES, TURNED_LEVEL
from dither.search.sensitivity import MOST_COLUMNS, token_axes, token_counts


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mixed(rows: int = 6000, columns: int = 32) -> Tensor:
    """A table whose columns are mixtures, of falling size."""
    basis: Tensor = torch.linalg.qr(normal(columns, columns, seed=1))[0]
    return (normal(rows, columns) * torch.linspace(0, -4, columns).exp2()) @ basis


def test_a_table_of_mixtures_is_rotated() -> None:
    tensor = data_free({"wte.weight": mixed()})["wte.weight"]
    assert tensor.axes is not None
    assert tensor.relative().shape == (6000, 32)
    stored = Ladder.of(tensor).choices[30].encode(tensor)
    assert isinstance(stored.format, Factors)


@pytest.mark.parametrize(
    "table",
    [
        normal(6000, 32),
        mixed(2100, 512),
        torch.zeros(6000, 8),
        torch.full((6000, 8), torch.nan),
        torch.full((6000, 8), 0.3),
        normal(6000, 1),
        normal(2048, 8) * 1e-40,
        torch.cat([normal(6000, 32), torch.full((1, 32), math.inf)]),
    ],
)
def test_where_it_does_not_pay_there_is_none(table: Tensor) -> None:
    tensor = data_free({"wte.weight": table})["wte.weight"]
    assert tensor.axes is None or len(table.unique()) == 1
    dither.compress({"wte.weight": table}, size="100%")


def test_wide_tables_stay_as_they_are() -> None:
    table = torch.ones(1, 1).expand(2 * MOST_COLUMNS + 2, MOST_COLUMNS + 1)
    assert token_axes(table, torch.ones(len(table))) is None


def test_counts_move_the_basis() -> None:
    state = {"wte.weight": torch.cat([mixed(3000), mixed(3000).flip(1)])}
    late = token_counts({"wte.weight": torch.arange(6000)})(state)["wte.weight"].axes
    early = data_free(state)["wte.weight"].axes
    assert late is not None
    assert early is not None
    assert float((late[:, 0] @ early[:, 0]).abs()) < 0.99


def test_predictions_are_near_what_is_coded() -> None:
    tensor = data_free({"wte.weight": mixed()})["wte.weight"]
    options = [o for o in Ladder.of(tensor).choices if o.step is not None and o.loss < 9]
    assert len(options) > 50
    for option in options[:: len(options) // 8]:
        encoded = option.encode(tensor)
        assert option.nbytes == pytest.approx(code(encoded).nbytes + GRID_INDEX_NBYTES, rel=0.15)
        assert tensor.rows is not None
        error = ((encoded.decode() - tensor.value) / tensor.rows[:, None]).square().sum()
        share = float(error / (tensor.value / tensor.rows[:, None]).square().sum())
        loss = TURNED_LEVEL * tensor.sensitivity * float(error) / (1 - share)
        assert option.loss == pytest.approx(loss, rel=0.1)


def test_what_is_dropped_takes_next_to_nothing() -> None:
    tensor = Knowledge(mixed(), 1.0, axes=data_free({"wte.weight": mixed()})["wte.weight"].axes)
    first = Ladder.of(tensor).choices[0]
    assert not first.encode(tensor).decode().any()
    assert first.nbytes == pytest.approx(code(first.encode(tensor)).nbytes, abs=150)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", ["45%", "12x", "25x", "60x"])
def test_budgets_are_met(size: str, dtype: torch.dtype) -> None:
    state = {"wte.weight": mixed().to(dtype), "h.weight": normal(96, 96).to(dtype)}
    budget = sum(v.numel() * v.element_size() for v in state.values())
    budget = int(budget * float(size[:-1]) / 100) if "%" in size else int(budget / float(size[:-1]))
    archive = dither.compress(state, size)
    assert 0.985 * budget <= archive.nbytes <= budget or budget - archive.nbytes <= 64
    for name, value in state.items():
        assert archive[name].dtype == value.dtype
        assert bool(archive[name].isfinite().all())


def test_less_is_lost_than_without() -> None:
    state = {"wte.weight": mixed()}
    plain = Knowledge(state["wte.weight"], 1.0)
    files = [
        dither.compress(state, "12x", sensitivity=s)
        for s in (data_free, lambda _: {"wte.weight": plain})
    ]
    assert [type(f.encoded("wte.weight").format) for f in files] == [Factors, Affine]
    losses = [float((f["wte.weight"] - state["wte.weight"]).square().sum()) for f in files]
    assert losses[0] < 0.6 * losses[1]
