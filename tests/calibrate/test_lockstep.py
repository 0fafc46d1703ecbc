"""Passes that wait for each other bring what passes from the beginning bring, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dither.calibrate import spill
from dither.calibrate.layerwise import Layerwise
from dither.core import SpecError, Stats
from dither.data import Data
from dither.disk import Disk
from dither.encoders import Nearest
from dither.formats import Affine
from dither.testing import same_bits


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Counted(nn.Linear):
    """Counts its calls."""

    calls = 0

    def forward(self, values: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(values)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.deep, self.wide = nn.Conv2d(6, 6, 3, padding=1, groups=3), nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, values: Tensor) -> Tensor:
        values = self.norm(self.first(values)).relu()
        values = values + self.wide(self.deep(values).relu())
        out: Tensor = self.head(values.mean((2, 3)))
        return out


class Attention(nn.Module):
    """Queries, keys and values of one input, torch's own attention, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(12, 8), nn.LayerNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head, self.last = nn.Linear(8, 12, bias=False), nn.Linear(12, 3)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        values = self.norm(self.table(ids))
        values = values + functional.scaled_dot_product_attention(
            self.q(values), self.k(values), self.v(values)
        )
        values = values + self.attention(values, values, values)[0]
        out: Tensor = self.last(self.head(values) + self.table.weight.sum())
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.gru = nn.Linear(5, 6), nn.GRU(6, 4, 2, batch_first=True)
        self.lstm, self.out = nn.LSTM(4, 4, bidirectional=True), nn.Linear(8, 2)

    def forward(self, values: Tensor) -> Tensor:
        out: Tensor = self.out(self.lstm(self.gru(self.into(values))[0])[0])
        return out


class Twice(nn.Module):
    """One layer is called again behind another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, values: Tensor) -> Tensor:
        out: Tensor = self.c(self.a(self.b(self.a(values).relu()).relu()))
        return out


class Choosing(nn.Module):
    """Which layers run, and in which order, depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, values: Tensor) -> Tensor:
        if values[0, 0] > 0:
            values = self.b(self.a(values).relu())
        else:
            values = self.a(self.b(values).relu()) if values[0, 1] > 0 else self.b(values)
        if values.sum() > 0:
            values = self.c(values).relu()
        out: Tensor = self.d(values)
        return out


class Stateful(nn.Module):
    """Keeps something of a batch in itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, values: Tensor) -> Tensor:
        self.kept = values.clone()
        out: Tensor = self.b(self.a(values).relu()) + self.kept
        return out


class Noisy(Stateful):
    """Draws random numbers."""

    def forward(self, values: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(values) + torch.randn(6))
        return out


def images(count: int = 5) -> list[Tensor]:
    return [normal(2, 3, 6, 6, seed=n) for n in range(count)]


def vectors(count: int = 9) -> list[Tensor]:
    return [normal(4, 6, seed=n) for n in range(count)]


def tokens() -> list[Tensor]:
    return [torch.randint(12, (2, 7), generator=torch.Generator().manual_seed(n)) for n in range(4)]


CASES: dict[str, tuple[Callable[[], nn.Module], list[Any]]] = {
    "residual": (Residual, images()),
    "attention": (Attention, tokens()),
    "recurrent": (Recurrent, [normal(3, 7, 5, seed=n) for n in range(4)]),
    "twice": (Twice, vectors()),
    "choosing": (Choosing, vectors()),
    "stateful": (Stateful, vectors()),
    "one batch": (Residual, images(1)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(4, 2, 3)),
        images(),
    ),
}


@dataclass
class Made:
    """What a walk told, and where it left biases."""

    stats: dict[str, Stats] = field(default_factory=dict)
    moved: dict[str, Tensor] = field(default_factory=dict)


def walked(
    model: nn.Module, data: list[Any] | Data, *, biases: bool, **how: Any
) -> tuple[Made, Layerwise]:
    layers, made = Layerwise(model, data, **how), Made()
    names = layers.order.names
    with layers.walk(names, corrected=True, biases=biases) as walk:
        for layer in walk:
            made.stats[layer.name] = layer.stats
            layer.commit(Nearest(Affine(None), 0.25).encode(layer.weight))
    made.moved = walk.moved
    return made, layers


def assert_equal(one: Made, other: Made) -> None:
    assert list(one.stats) == list(other.stats)
    for name, stats in one.stats.items():
        for part in fields(Stats):
            a, b = getattr(stats, part.name), getattr(other.stats[name], part.name)
            assert type(a) is type(b), (name, part.name)
            assert same_bits(a, b) if isinstance(a, Tensor) else a == b, (name, part.name)
    assert one.moved.keys() == other.moved.keys()
    assert all(same_bits(value, other.moved[name]) for name, value in one.moved.items())


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_passes_from_the_beginning(case: str, biases: bool) -> None:
    make, batches = CASES[case]
    torch.manual_seed(0)
    model = make()
    plain, _ = walked(model, batches, biases=biases, most_kept=0)
    found, layers = walked(model, batches, biases=biases)
    assert layers.waiting == (case != "stateful")
    assert_equal(found, plain)
    bounded, _ = walked(model, batches, biases=biases, most_kept=1000)
    assert_equal(bounded, plain)


@pytest.mark.parametrize("most_kept", [0, 1000])
@pytest.mark.parametrize("case", CASES)
def test_equals_with_what_passes_hold_on_disk(
    case: str, most_kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "_SMALL", 1)
    make, batches = CASES[case]
    torch.manual_seed(0)
    model, disk = make(), Disk(tmp_path)
    found, layers = walked(model, batches, biases=True, most_kept=most_kept, disk=disk)
    assert layers.waiting == (case != "stateful")
    assert disk.nbytes > 0 or most_kept or not layers.waiting
    assert_equal(found, walked(model, batches, biases=True)[0])
    assert not list(tmp_path.iterdir())


def test_nothing_that_passes_hold_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "_SMALL", 1)
    held: list[int] = []
    plain = spill.Tracked.leave_memory

    def noted(self: spill.Tracked) -> None:
        plain(self)
        self.count()
        held.append(self.nbytes)
        assert self.most > 0

    monkeypatch.setattr(spill.Tracked, "leave_memory", noted)
    torch.manual_seed(0)
    walked(Residual(), images(), biases=False, most_kept=0, disk=Disk(tmp_path))
    assert len(held) > 20
    assert not any(held)


class Strict(nn.Linear):
    """Takes no part in what watches its tensors."""

    def forward(self, values: Tensor) -> Tensor:
        if torch._C._is_torch_function_mode_enabled():
            raise RuntimeError("watched")
        return super().forward(values)


def test_models_that_cannot_be_watched_keep_their_passes_in_memory(tmp_path: Path) -> None:
    disk, model = Disk(tmp_path), nn.Sequential(Strict(6, 6), Strict(6, 6))
    found, layers = walked(model, vectors(), biases=False, most_kept=200, disk=disk)
    assert layers.waiting
    assert layers.room.tracked() is None
    assert_equal(found, walked(model, vectors(), biases=False)[0])
    none, layers = walked(model, vectors(), biases=False, most_kept=0, disk=disk)
    assert not layers.waiting
    assert_equal(none, found)


def test_passes_that_fit_into_memory_are_not_watched(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    layers = Layerwise(Residual(), images(), disk=disk)
    assert layers.room.tracked() is None
    assert layers.waiting
    assert disk.nbytes == 0


def test_a_model_that_draws_numbers_does_not_wait() -> None:
    assert not Layerwise(Noisy(), vectors()).waiting


def test_a_model_that_runs_in_its_own_thread_alone_does_not_wait() -> None:
    home = threading.get_ident()

    def forward(model: nn.Module, batch: Tensor) -> object:
        if threading.get_ident() != home:
            raise RuntimeError("settings of another thread")
        return model(batch)

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    found, layers = walked(model, Data(vectors(), forward), biases=False)
    assert not layers.waiting
    assert_equal(found, walked(model, vectors(), biases=False)[0])


def test_each_layer_runs_once_for_each_batch() -> None:
    def runs(layers: int, **how: Any) -> int:
        model = nn.Sequential(*(Counted(6, 6) for _ in range(layers)))
        made = Layerwise(model, vectors(), **how)
        Counted.calls = 0
        with made.walk(made.order.names) as walk:
            for layer in walk:
                layer.commit(Nearest(Affine(None), 0.25).encode(layer.weight))
        return Counted.calls

    # The last layer need not run, and the first of a walk runs in the original as well.
    assert runs(8) == 2 * 9 * 7
    assert runs(16) == 2 * 9 * 15
    assert runs(16, most_kept=0) == 2 * 9 * sum(range(16))


def test_threads_end_whatever_happens() -> None:
    before = threading.active_count()
    layers = Layerwise(Residual(), images())

    def stop() -> None:
        with layers.walk(layers.order.names) as walk:
            next(iter(walk))
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        stop()
    assert threading.active_count() == before


def test_errors_of_a_pass_are_raised() -> None:
    def forward(model: nn.Module, batch: Tensor) -> object:
        middle = model.get_submodule("0")(batch)
        if broken and batch is batches[3]:
            raise SpecError("the fourth batch")
        return model.get_submodule("1")(middle)

    batches, broken = vectors(), False
    layers = Layerwise(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), Data(batches, forward))
    broken = True
    with (
        pytest.raises(SpecError, match="the fourth batch"),
        layers.walk(["0.weight", "1.weight"]) as walk,
    ):
        list(walk)
