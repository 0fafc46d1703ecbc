"""One call with data: everything is tried, the best is kept, and the budget holds."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.activations import Encodings, apply
from dither.archive import code, pack
from dither.data import divergence
from dither.search import Choice, Grid, Knowledge, Ledger, Trial, layer_order
from dither.search.layer_order import LayerOrder
from dither.testing import same_bits


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Images(nn.Module):
    """Convolutions with and without batch norm, a depthwise one, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.second, self.out = nn.Conv2d(16, 32, 3), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.second(self.depthwise(x).relu()).relu()
        logits: Tensor = self.out(x.mean((2, 3)))
        return logits


def network() -> Images:
    torch.manual_seed(0)
    model = Images()
    model.train()(3 * normal(64, 3, 12, 12, seed=5))  # running statistics
    return model


LOADER = [2 * normal(32, 3, 12, 12, seed=i) + 1 for i in range(4)]


def trials_of(archive: dither.Archive) -> list[Trial]:
    return [trial for trial in archive.trials if isinstance(trial, Trial)]


def test_every_stage_is_tried_and_the_best_kept() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    samples = dither.Data(iter(LOADER), distance=divergence)
    archive = dither.compress(model, 2600, data=samples)
    assert 2600 - 64 <= archive.nbytes <= 2600
    assert all(same_bits(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    trials = trials_of(archive)
    stages = [trial.stage for trial in trials]
    assert stages == ["data-free", "equalized", "calibrated", "calibrated, in sequence"]
    best = min(trials, key=lambda trial: trial.distance)
    assert best.kept
    assert best.nbytes == archive.nbytes
    assert trials[3].distance < 0.5 * trials[0].distance
    changed = network().eval()
    dither.load_into(changed, archive)
    with torch.no_grad():
        distances = [divergence(changed(b), model.eval()(b)) for b in LOADER]
    assert float(torch.stack(distances).mean()) == best.distance
    assert "in sequence" in str(trials[3])


def test_the_score_decides_where_there_is_one() -> None:
    scores = iter([1.0, 0.5, 3.0, 2.0])
    archive = dither.compress(network(), 2600, data=LOADER, evaluate=lambda _: next(scores))
    trials = trials_of(archive)
    assert [trial.kept for trial in trials] == [True, False, True, False]
    assert [trial.score for trial in trials] == [1.0, 0.5, 3.0, 2.0]
    assert archive.nbytes == trials[2].nbytes


@pytest.mark.parametrize("activations", ["int8", {"*@in": dither.Activation(4)}])
def test_activations_count_in_the_budget(activations: str | dict[str, dither.Activation]) -> None:
    archive = dither.compress(network(), "3kB", data=LOADER, activations=activations)
    assert archive.nbytes <= 3000
    stages = [trial.stage for trial in trials_of(archive) if "activations" in trial.stage]
    tried = ["activations int8", "activations int8, mse", "activations int8, by token"]
    assert stages == (tried if activations == "int8" else ["activations"])
    kept = [trial for trial in trials_of(archive) if trial.kept][-1]
    assert kept.nbytes == archive.nbytes
    assert "activations" in kept.stage
    encodings = Encodings.from_json(archive.sites)
    assert {"first@in", "second@in", "out@in"} <= set(encodings)
    assert "norm@in" not in encodings or activations != "int8"
    assert encodings["out@in"].spec.bits == (8 if activations == "int8" else 4)
    changed = network()
    with pytest.raises(dither.CheckpointError, match="sites"):
        dither.load_into(changed, archive)
    apply(changed, encodings)
    dither.load_into(changed, archive)


def test_a_file_is_packed_again_to_the_same_bytes() -> None:
    archive = dither.compress(network(), "3kB", data=LOADER)
    assert any(entry.format.name == "trellis" for entry in archive.entries.values())
    again = pack({name: archive.encoded(name) for name in archive.entries}, archive.aliases)
    assert again.nbytes == archive.nbytes


def test_what_needs_data_or_a_model() -> None:
    with pytest.raises(dither.SpecError, match="goes with data="):
        dither.compress(network(), 2600, evaluate=lambda _: 0.0)
    with pytest.raises(dither.SpecError, match="goes with data="):
        dither.compress(network(), 2600, activations="int8")
    with pytest.raises(dither.SpecError, match="give the model"):
        dither.compress(network().state_dict(), 2600, data=LOADER)
    with pytest.raises(dither.SpecError, match='give "int2" to "int16"'):
        dither.compress(network(), 2600, data=LOADER, activations="int1")
    with pytest.raises(dither.SpecError, match="no batch"):
        dither.compress(network(), 2600, data=[])


def test_a_model_without_layers_in_sequence() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(normal(40, 30))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    archive = dither.compress(Scale(), "4x", data=[normal(8, 30)])
    assert [trial.stage for trial in trials_of(archive)] == ["data-free", "calibrated"]


def test_a_way_that_fails_is_a_line_and_the_best_file_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such matrix\nand more")

    monkeypatch.setattr(LayerOrder, "spend", fail)
    archive = dither.compress(network(), 2600, data=LOADER)
    *others, last = trials_of(archive)
    assert (last.error, last.nbytes, last.kept) == ("RuntimeError: no such matrix", 0, False)
    assert "failed after" in str(last)
    assert archive.nbytes == next(t.nbytes for t in reversed(others) if t.kept)


def test_where_every_way_fails_the_first_says_why() -> None:
    def fail(tensors: object) -> dict[str, Knowledge]:
        raise ZeroDivisionError("nothing is known")

    with pytest.raises(ZeroDivisionError, match="nothing is known"):
        dither.compress(network(), 2600, data=LOADER, sensitivity=fail)
    with pytest.raises(dither.BudgetError, match="is impossible"):
        dither.compress(network(), 200, data=LOADER)


def test_not_a_number_is_the_worst_score() -> None:
    scores = iter([math.nan, 0.5, math.nan, 0.4])
    archive = dither.compress(network(), 2600, data=LOADER, evaluate=lambda _: next(scores))
    assert [trial.kept for trial in trials_of(archive)] == [True, True, False, False]
    with pytest.raises(dither.SpecError, match="evaluate gave None"):
        dither.compress(network(), 2600, data=LOADER, evaluate=lambda _: None)  # type: ignore[arg-type,return-value]


def test_a_ledger_knows_the_exact_bytes() -> None:
    tensors = {"w": normal(40, 30), "b": normal(40)}
    ledger = Ledger(tensors, {"tied": "w"}, {"note": 1})
    sizes = {}
    for name in ("b", "w"):
        choice = Choice(0.0, 0.0, Grid(), step=0.5)
        coded = code(choice.encode(Knowledge(tensors[name], 1.0)))
        sizes[name] = ledger.put(name, choice, coded)
        assert sizes[name] == ledger.measured(name) > coded.nbytes
    archive = ledger.archive()
    assert set(archive) == {"w", "tied", "b"}
    assert ledger.nbytes == archive.nbytes == len(archive.to_bytes())
    assert ledger.overhead == ledger.nbytes - sum(sizes.values())
    assert torch.equal(dict(ledger.decoded(["b"]))["b"], archive["b"])
    ledger.clear()
    assert "w" not in ledger


def test_layers_in_sequence_that_stay_too_large_are_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_order, "land", lambda ledger, *_, **__: ledger.nbytes + 10_000)
    archive = dither.compress(network(), 2600, data=LOADER)
    last = trials_of(archive)[-1]
    assert last.stage == "calibrated, in sequence"
    assert "BudgetError: layers in sequence take" in last.error
