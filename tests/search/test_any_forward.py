"""Models that choose their steps, give odd outputs or no gradients: every way with data runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dither
from dither.calibrate import Layerwise, collect
from dither.calibrate.moments import Moments
from dither.core import SpecError
from dither.data import Data, Distance, divergence, squared
from dither.model import own_class
from dither.search import Trial, calibrated, data_free


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Greedy(nn.Module):
    """Decodes until a token says so: another number of steps where weights are rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell = nn.Embedding(40, 32), nn.GRUCell(32, 48)
        self.first, self.head = nn.Linear(48, 48), nn.Linear(48, 40)

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden, token = torch.tanh(self.first(x)), torch.zeros(len(x), dtype=torch.long)
        scores = []
        for _ in range(9):
            hidden = self.cell(self.table(token), hidden)
            scores.append(6 * self.head(hidden))
            token = scores[-1].argmax(1)
            if int(token[0]) % 4 == 0:
                break
        return scores


class Halting(nn.Module):
    """Goes on until every sample has had enough (Graves 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.halt, self.out = nn.Linear(48, 48), nn.Linear(48, 1), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(len(x))
        while not bool((total > 2).all()):
            x = torch.tanh(1.5 * self.body(x))
            total = total + 0.3 + self.halt(x).sigmoid()[:, 0]
        found: Tensor = self.out(x)
        return found


class Detector(nn.Module):
    """Gives as many boxes as there are scores above a threshold."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.score, self.box = nn.Linear(48, 48), nn.Linear(48, 1), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        hidden = self.body(x).relu()
        kept = self.score(hidden)[:, 0] > 0
        return [{"boxes": self.box(hidden[kept]), "labels": kept.nonzero()[:, 0]}]


class Experts(nn.Module):
    """Each token goes to one expert, which the encoded copy may choose otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(48, 48), nn.Linear(48, 4)
        self.experts = nn.ModuleList(nn.Linear(48, 48) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        chosen = self.router(x).argmax(1)
        found = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if bool((chosen == number).any()):
                found[chosen == number] = expert(x[chosen == number])
        return x + found


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(48, 32), nn.Linear(24, 32), nn.Linear(32, 5)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        found: Tensor = self.out((self.a(a) + self.b(b)).relu())
        return found


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(48, 32), nn.Linear(32, 5)

    def scores(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.body(x).relu())
        return found

    def forward(self, x: Tensor) -> object:
        return self.scores(x)


@dataclass
class Output:
    logits: Tensor
    inner: dict[str, dict[str, list[Tensor]]]


class DataClass(Plain):
    def forward(self, x: Tensor) -> Output:
        hidden = self.body(x)
        return Output(self.out(hidden.relu()), {"a": {"b": [hidden]}})


class NoGradients(Plain):
    @torch.no_grad()
    def forward(self, x: Tensor) -> object:
        return self.scores(x)


class Inference(Plain):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> object:
        return self.scores(x)


class Detached(Plain):
    def forward(self, x: Tensor) -> object:
        return self.scores(x).detach()


class Numpy(Plain):
    def forward(self, x: Tensor) -> object:
        return self.scores(x).detach().numpy()


class Detour(Plain):
    """Calls numpy within, which torch refuses while gradients are wanted."""

    def forward(self, x: Tensor) -> object:
        return self.out(torch.from_numpy(np.maximum(self.body(x).numpy(), 0)))


class Frozen(Plain):
    """A body that runs without gradients, and a head with."""

    def forward(self, x: Tensor) -> object:
        with torch.no_grad():
            hidden = self.body(x).relu()
        return self.out(hidden)


MANY = [normal(24, 48, seed=i) for i in range(3)]
PAIRS = [(batch, normal(24, 24, seed=9 + i)) for i, batch in enumerate(MANY)]
FEW = [normal(8, 48, seed=i) for i in range(6)]
WITHOUT = [NoGradients, Inference, Detached, Numpy, Detour, Frozen]
CASES: dict[str, tuple[type[nn.Module], list[Any]]] = {
    "greedy": (Greedy, MANY),
    "halting": (Halting, MANY),
    "detector": (Detector, MANY),
    "experts": (Experts, FEW),
    "two inputs": (Two, PAIRS),
    "two inputs and a label": (Two, [(*pair, 3) for pair in PAIRS]),
    "data class": (DataClass, MANY),
    **{kind.__name__: (kind, MANY) for kind in WITHOUT},
}


def model_of(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


@pytest.mark.parametrize("name", CASES)
def test_every_way_of_using_data_runs(name: str) -> None:
    kind, data = CASES[name]
    archive = dither.compress(model_of(kind), "10x", data=data)
    trials = [trial for trial in archive.trials if isinstance(trial, Trial)]
    assert [trial.error for trial in trials] == [""] * len(trials)
    assert "calibrated, in sequence" in [trial.stage for trial in trials]
    assert all(trial.distance >= 0 for trial in trials)


@pytest.mark.parametrize("kind", WITHOUT)
@pytest.mark.parametrize("distance", [squared, divergence])
def test_noise_says_what_gradients_would(kind: type[nn.Module], distance: Distance) -> None:
    """Sensitivities are as if the same function had gradients."""
    plain = Data(MANY, distance=distance)
    with torch.no_grad():
        model, same = model_of(kind), model_of(Plain)
        for one in (model, same):
            assert isinstance(one, Plain)
            one.body.weight[16:] *= 8
            one.out.weight[:, 16:] *= 0.01
    state = same.state_dict()
    found, wanted, prior = (
        made(state) for made in (calibrated(model, plain), calibrated(same, plain), data_free)
    )
    names = ["body.weight", "out.weight"]
    ratios = [w[names[0]].sensitivity / w[names[1]].sensitivity for w in (found, wanted, prior)]
    assert ratios[0] == pytest.approx(ratios[1], rel=0.3)
    assert ratios[2] != pytest.approx(ratios[1], rel=0.5)


def test_a_loss_without_a_gradient_is_named() -> None:
    with pytest.raises(SpecError, match="the loss has no gradient"):
        collect(model_of(NoGradients), MANY, loss=lambda output, _: output.sum())


def test_moments_of_other_calls_are_not_crossed() -> None:
    moments = Moments()
    moments.add(normal(1, 5, 4), normal(1, 5, 4, seed=1))
    assert moments.cross() is not None
    moments.add(normal(1, 3, 4))
    assert moments.cross() is None
    assert moments.wanted() is None
    moments.add(normal(1, 5, 4), normal(1, 5, 4, seed=1))
    assert moments.cross() is None
    assert moments.samples == 13


def test_a_layer_that_the_encoded_model_does_not_reach_is_encoded() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.rare = nn.Linear(8, 1), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.rare(x + 1) if bool((self.gate(x) > 0).any()) else x
            return found

    model = Gate().eval()
    nn.init.zeros_(model.gate.weight)
    nn.init.constant_(model.gate.bias, 0.5)
    layers = Layerwise(model, [normal(4, 8)])
    start = {"gate.bias": torch.tensor([-1.0])}
    with layers.walk(["rare.weight"], start=start.items()) as walk:
        (layer,) = list(walk)
        assert layer.name == "rare.weight"
        assert layer.stats.gram is None
        layer.commit(dither.GPTQ(0.1).encode(layer.weight, layer.stats))


class Bounded(nn.Linear):
    """A linear layer whose forward takes something else first."""

    def forward(self, lengths: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * lengths[:, None]


@pytest.mark.parametrize("lengths", [torch.ones(5), torch.ones(5).long(), torch.ones(5, 3)[:, 0]])
def test_layers_that_are_called_otherwise_get_no_moments(lengths: Tensor) -> None:
    forward = lambda model, x: model(lengths, x)  # noqa: E731
    assert collect(Bounded(8, 4), Data([normal(5, 8)], forward)) == {}


def test_attached_tables_are_still_counted() -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4))
    run = dither.attach(model, {"*weight": dither.StraightThrough(dither.Affine(2))})
    assert own_class(model[0]) is nn.Embedding
    counts = collect(model, [torch.tensor([[3, 3, 5]])])["0.weight"].counts
    assert counts is not None
    assert counts.nonzero().flatten().tolist() == [3, 5]
    run.detach()


class Scaled(nn.Embedding):
    def forward(self, input_ids: Tensor) -> Tensor:
        return 8 * super().forward(input_ids)


class Positions(nn.Embedding):
    """As in OPT, BART and Whisper: what goes in says how many positions there are."""

    def forward(self, given: Tensor) -> Tensor:
        return super().forward(torch.arange(given.shape[1]).expand(given.shape[0], -1) + 2)


IDS = torch.tensor([[7, 7, 4], [9, 4, 0]])


@pytest.mark.parametrize("given", [IDS, IDS.float(), IDS > 4, IDS[:, :, None].float(), 30 + IDS])
def test_only_rows_that_are_read_are_counted(given: Tensor) -> None:
    table = Positions(20, 8)
    assert collect(table, [given]) == {}


def test_scaled_rows_are_counted() -> None:
    counts = collect(Scaled(20, 8), [IDS])["weight"].counts
    assert counts is not None
    assert torch.equal(counts, torch.bincount(IDS.flatten(), minlength=20))
