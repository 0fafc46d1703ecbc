"""A diagnosis finds what was broken on purpose, agrees with work by hand, and leaves no trace."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
from dither import Activation, Affine, SpecError
from dither.activations import apply, observe, remove
from dither.archive import Archive
from dither.calibrate import in_sequence
from dither.core import CheckpointError
from dither.data import divergence, squared
from dither.model import evaluating
from dither.report import Diagnosis, Row
from dither.report.diagnosis import worst_first
from dither.testing import same_bits


class Network(nn.Module):
    """A convolution with batch norm, a layer norm, dropout, a table and a tied pair of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 12)
        self.conv, self.norm = nn.Conv1d(12, 12, 3, padding=1), nn.BatchNorm1d(12)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)
        self.drop, self.sum = nn.Dropout(0.5), nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 16, bias=False)
        self.head.weight = self.table.weight
        self.unused = nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        x = self.sum(x + self.drop(self.down(self.up(x).relu())))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        logits: Tensor = self.head(x)
        return logits


def network() -> Network:
    torch.manual_seed(0)
    model = Network()
    with torch.no_grad():
        model.up.weight[0, 0] = 40.0  # what one scale for the tensor cannot hold
    model.norm.eval()  # a mode of its own
    return model


def batches(count: int = 3) -> list[Tensor]:
    return [torch.arange(10).repeat(4, 1) + i for i in range(count)]


def traces(model: nn.Module) -> list[Any]:
    """Everything that a visit might leave behind."""
    hooks = ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks"]
    flags = [*hooks, "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"]
    return [
        (module.training, list(module._modules), [len(getattr(module, flag)) for flag in flags])
        for module in model.modules()
    ]


def unchanged(model: nn.Module, before: nn.Module) -> bool:
    pairs = zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    grads = [p.grad is None and p.requires_grad for p in model.parameters()]
    return all(same_bits(a, b) for a, b in pairs) and traces(model) == traces(before) and all(grads)


def test_the_worst_weight_is_the_one_with_an_outlier_and_one_scale() -> None:
    found = dither.diagnose(network(), batches(), {"*": Affine(8, axis=0), "up.weight": Affine(4)})
    assert {row.spec for row in found.rows} == {"affine(bits=8, axis=0)"}  # the first rule won
    found = dither.diagnose(network(), batches(), {"up.weight": Affine(4), "*": Affine(8, axis=0)})
    first = found.rows[0]
    assert (first.name, first.spec, first.high) == ("up.weight", "affine(bits=4)", 40.0)
    assert found.activations == ()
    assert [part.name for part in found.overall] == ["original", "weights"]


def test_rows_agree_with_quantizing_by_hand() -> None:
    model, data = network(), batches()
    rules = {"down.weight": Affine(3), "down@in": Activation(3), "conv@out": Activation(4)}
    found = dither.diagnose(model, dither.Data(data, distance=divergence), rules)
    rows = {row.name: row for row in found.rows}
    assert set(rows) == {"down.weight", "down@in", "conv@out"}

    with evaluating(model), torch.no_grad():
        wanted = [model(batch) for batch in data]

        def distance(of: nn.Module) -> float:
            costs = [divergence(of(b), w) for b, w in zip(data, wanted, strict=True)]
            return float(torch.stack(costs).mean())

        for site in ("down@in", "conv@out"):
            by_hand = copy.deepcopy(model).eval()
            apply(by_hand, observe(by_hand, {site: rules[site]}, data))
            assert rows[site].distance == distance(by_hand) > 0
        grids = observe(model, {s: r for s, r in rules.items() if "@" in s}, data)
        by_hand = copy.deepcopy(model).eval()
        before = by_hand.down.weight.clone()
        by_hand.down.weight.copy_(Affine(3).encode(before).decode())
        noise = before - by_hand.down.weight
        assert rows["down.weight"].distance == distance(by_hand) > 0
        decibels = 10 * math.log10(float(before.square().sum() / noise.square().sum()))
        assert rows["down.weight"].sqnr == pytest.approx(decibels, abs=1e-4)
        apply(by_hand, grids)
        assert found.overall[-1].name == "both"
        assert found.overall[-1].distance == distance(by_hand)


def test_noise_of_an_activation_is_what_passed_there() -> None:
    seen: list[Tensor] = []
    model = network()
    handle = model.down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.eval()
    with torch.no_grad():
        for batch in batches():
            model(batch)
    handle.remove()
    values = torch.cat([part.reshape(-1) for part in seen])
    (row,) = dither.diagnose(network(), batches(), {"down@in": Activation(5)}).rows
    assert row.count == values.numel()
    assert (row.low, row.high) == (float(values.min()), float(values.max()))
    step = (row.high - row.low) / 31
    uniform = 10 * math.log10(float(values.double().square().mean()) / (step**2 / 12))
    assert row.sqnr > uniform - 0.5  # zeros of the ReLU are exact, so there is less noise


def test_default_targets() -> None:
    found = dither.diagnose(network(), batches())
    assert {row.name for row in found.weights} == {
        "table.weight", "conv.weight", "up.weight", "down.weight", "unused.weight",
        "attention.in_proj_weight", "attention.out_proj.weight",
    }  # fmt: skip
    assert {row.name for row in found.activations} == {
        "conv@in", "up@in", "down@in", "sum@in", "attention@in", "head@in"
    }  # fmt: skip
    assert next(row for row in found.rows if row.name == "unused.weight").distance == 0
    costs = [row.distance for row in found.rows]
    assert costs == sorted(costs, reverse=True)
    assert [part.name for part in found.overall] == ["original", "weights", "activations", "both"]
    assert found.overall[0].distance == 0
    assert found.batches == 3


def test_scales_of_a_transposed_convolution_are_of_its_outputs() -> None:
    model = nn.ConvTranspose1d(3, 5, 2)
    with torch.no_grad():
        model.weight[:, 1] *= 1000
    (row,) = dither.diagnose(model, [torch.randn(4, 3, 8)]).weights
    assert row.spec == "affine(bits=8, axis=1)"


def test_the_model_is_left_as_it_was() -> None:
    model = network().train()
    model.norm.eval()
    before = copy.deepcopy(model)
    dither.diagnose(model, batches(), evaluate=lambda m: float(m.train() is m), scored=2)
    assert unchanged(model, before)


@pytest.mark.parametrize("fatal", [2, 9, 14, 40])
def test_the_model_is_left_as_it_was_after_an_error(fatal: int) -> None:
    model = network()
    before = copy.deepcopy(model)
    calls = 0

    def forward(of: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        output: Tensor = of(batch)
        if calls == fatal:
            raise KeyboardInterrupt
        return output

    with pytest.raises(KeyboardInterrupt):
        dither.diagnose(model, dither.Data(batches(), forward))
    assert unchanged(model, before)


def test_scores_of_wholes_and_of_the_worst() -> None:
    data = batches()
    model = network().eval()
    wanted = [model(batch).argmax(-1) for batch in data]

    def agreement(of: nn.Module) -> float:
        assert not of.training
        right = [(of(b).argmax(-1) == w).float().mean() for b, w in zip(data, wanted, strict=True)]
        return 100 * float(torch.stack(right).mean())

    found = dither.diagnose(model, data, {"*": Affine(2), "*@in": Activation(8)},
                            evaluate=agreement, scored=1)  # fmt: skip
    assert found.overall[0].score == 100
    assert all(part.score is not None for part in found.overall)
    assert found.overall[1].score is not None
    assert found.overall[1].score < 100
    assert [row.score is None for row in found.rows[:3]] == [False, True, True]
    assert "score" in found.table()


def test_an_archive_is_measured_as_it_is(tmp_path: Path) -> None:
    model = network()
    dither.compress(model, size="5kB").save(tmp_path / "m.dither")
    found = dither.diagnose(model, batches(), tmp_path / "m.dither")
    with Archive.open(tmp_path / "m.dither") as archive:
        again = dither.diagnose(model, batches(), archive)
        floats = {n for n, e in archive.entries.items() if e.dtype == "float32"}
        raw = {
            n for n, e in archive.entries.items() if same_bits(archive[n], model.state_dict()[n])
        }
    assert found == again
    assert {row.name for row in found.rows} == floats
    assert {row.name for row in found.rows if row.sqnr == math.inf} == raw & floats
    loaded = copy.deepcopy(model).eval()
    dither.load_into(loaded, tmp_path / "m.dither")
    # Both on attention's plain path: the fast one rounds otherwise, on some processors.
    with evaluating(model), evaluating(loaded), torch.no_grad():
        costs = [squared(loaded(batch), model(batch)) for batch in batches()]
    assert found.overall[1].distance == float(torch.stack(costs).mean())


def test_a_file_with_sites(tmp_path: Path) -> None:
    model, data = network(), batches()
    run = dither.attach(model, {"up.weight": Affine(3), "*@in": Activation(5)})
    for batch in data:
        model(batch)
    run.step()
    run.finish()
    run.save(tmp_path / "m.dither")
    plain = network()
    found = dither.diagnose(plain, data, tmp_path / "m.dither")
    assert {row.name for row in found.activations} >= {"up@in", "down@in"}
    assert {row.name for row in found.weights if row.distance > 0} == {"up.weight"}
    with pytest.raises(SpecError, match="attached"):
        dither.diagnose(model, data)


def test_encodings_that_exist() -> None:
    model, data = network(), batches()
    encoded = in_sequence(model, data, {"up.weight": Affine(4), "down.weight": Affine(4)})
    grids = observe(model, {"up@in": Activation(4)}, data)
    found = dither.diagnose(model, data, {**encoded, **grids})
    assert {row.name for row in found.rows} == {"up.weight", "down.weight", "up@in"}


def test_what_cannot_be_diagnosed() -> None:
    model, data = network(), batches()
    with pytest.raises(SpecError, match="no batch"):
        dither.diagnose(model, [])
    with pytest.raises(SpecError, match="match no parameter"):
        dither.diagnose(model, data, {"nothing*": Affine(4)})
    grids = observe(model, {"up@in": Activation(4)}, data)
    with pytest.raises(SpecError, match="no module for the sites"):
        dither.diagnose(nn.Linear(16, 2), [torch.randn(2, 16)], {**grids})
    with pytest.raises(CheckpointError, match="give the model that was compressed"):
        dither.diagnose(nn.Linear(3, 2), [torch.randn(2, 3)], dither.compress(model, size="5kB"))
    with pytest.raises(SpecError, match="score is nan"):
        dither.diagnose(model, data, evaluate=lambda _: math.nan)
    broken = network()
    with torch.no_grad():
        broken.head.weight[0, 0] = math.nan
    with pytest.raises(SpecError, match="not finite"):
        dither.diagnose(broken, data, {"up.weight": Affine(4)})
    apply(model, grids)
    with pytest.raises(SpecError, match="quantized already"):
        dither.diagnose(model, data)
    remove(model)
    assert isinstance(dither.diagnose(model, data), Diagnosis)


def test_a_model_that_varies_shows_it() -> None:
    model = nn.Linear(4, 4)

    def noisy(of: nn.Module, batch: Tensor) -> Tensor:
        output: Tensor = of(batch)
        return output + torch.randn_like(output)

    found = dither.diagnose(model, dither.Data([torch.randn(8, 4)], noisy), {"weight": Affine(8)})
    assert found.overall[0].distance > 0.1


def test_progress_begins_at_nothing_and_grows() -> None:
    seen: list[tuple[str, float]] = []
    dither.diagnose(
        network(), batches(1), {"up*": Affine(4), "up@in": Activation(4)},
        progress=lambda name, share: seen.append((name, share)),
    )  # fmt: skip
    names = [name for name, _ in seen]
    assert names == [
        "original", "weights", "activations", "both", "up.bias", "up.weight", "up@in"
    ]  # fmt: skip
    assert [share for _, share in seen] == [i / 7 for i in range(7)]


def test_json_and_table(tmp_path: Path) -> None:
    found = dither.diagnose(network(), batches())
    found.save_json(tmp_path / "d.json")
    document = json.loads((tmp_path / "d.json").read_text())
    assert document == found.to_json()
    assert [row["name"] for row in document["rows"]] == [row.name for row in found.rows]
    text = found.table(limit=2)
    assert found.rows[1].name in text
    assert found.rows[2].name not in text
    assert f"and {len(found.rows) - 2} more" in text
    assert str(found) == found.table()
    assert max(map(len, text.splitlines())) < 140


def test_what_is_no_number_is_worst_and_null() -> None:
    rows = [Row(str(d), "weight", "", 1, d, math.inf, 0, 0) for d in (0.5, math.nan, math.inf)]
    ranked = worst_first(rows)
    assert [row.name for row in ranked] == ["nan", "inf", "0.5"]
    found = Diagnosis(ranked, (), "squared", 1)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["rows"][0]["distance"] is None


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_plot(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    found = dither.diagnose(network(), batches())
    paths = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for path in paths:
        found.plot(path)
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    assert len(first) > 5000


def test_plots_that_cannot_be_drawn(tmp_path: Path) -> None:
    found = dither.diagnose(network(), batches(), {"up.weight": Affine(4)})
    with pytest.raises(SpecError, match="no picture"):
        found.plot(tmp_path / "a.txt")
    with pytest.raises(SpecError, match="nothing to draw"):
        Diagnosis((), (), "squared", 1).plot(tmp_path / "a.svg")
