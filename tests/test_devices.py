"""Models that are elsewhere: on a pretend device, and on a GPU where there is one.

Forward passes there differ from the CPU's in last bits; what is encoded and searched does not.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dither import (
    GPTQ,
    LSQ,
    Activation,
    AdaRound,
    DiffQ,
    QuantNoise,
    StraightThrough,
    attach,
    compress,
    diagnose,
    encoders,
    load,
    load_into,
)
from dither.activations import apply, observe
from dither.calibrate import collect, in_sequence
from dither.core import Encoder, Format, SpecError, Stats
from dither.formats import Affine, Product
from dither.model import collect as collected
from dither.recipes.bayesian_bits import multiplications
from dither.rewrite import absorb_biases, correct_biases, equalize, fold_batch_norm
from dither.search import Trial
from dither.testing import awkward_weights, check_device, check_surrogate, same_bits
from dither.train.method import Method
from dither.train.plan import Rule
from tests.encoders.test_laws import ENCODERS, InSteps
from tests.fake_device import pretend
from tests.formats.test_laws import FORMATS_TO_TEST
from tests.train.layers import EXAMPLES

DEVICES = ["pretend", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return pretend(monkeypatch) if request.param == "pretend" else torch.device(request.param)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def known_of(weight: Tensor) -> list[Stats | None]:
    """What data may say about a matrix."""
    inputs = normal(64, weight.shape[1])
    gram = inputs.T @ inputs / 64 + 0.1 * torch.eye(weight.shape[1])
    rows = torch.arange(1.0, len(weight) + 1)
    return [
        None,
        Stats(importance=weight.square() + 0.1),
        Stats(gram=gram, mean=inputs.mean(0), samples=64),
        Stats(gram=gram, cross=gram + 0.01 * torch.eye(len(gram))),
        Stats(counts=rows),
    ]


@pytest.mark.parametrize(
    "entry", [*ENCODERS[len(FORMATS_TO_TEST) :], encoders.Rotated(0.1, torch.eye(8))], ids=repr
)
def test_encoders_compute_on_the_cpu(entry: Encoder | InSteps, device: torch.device) -> None:
    weight = normal(12, 8)
    encoder = entry(weight) if isinstance(entry, InSteps) else entry
    for stats in known_of(weight):
        check_device(encoder, weight, device, stats)


@pytest.mark.parametrize("fmt", FORMATS_TO_TEST, ids=repr)
def test_formats_compute_where_the_weight_is(fmt: Format, device: torch.device) -> None:
    weights = awkward_weights()
    for name in ("empty", "vector", "kernel", "strided", "outlier", "huge"):
        weight = weights[name]
        try:
            fmt.encode(weight)
        except SpecError as error:
            with pytest.raises(SpecError, match=re.escape(str(error))):
                fmt.encode(weight.to(device))
        else:
            check_device(fmt, weight, device)


@pytest.mark.parametrize("spec", [s for specs in EXAMPLES.values() for s in specs], ids=repr)
def test_training_runs_on_the_device(spec: Method, device: torch.device) -> None:
    weights = awkward_weights()
    for name in ("odd sizes", "kernel", "constant"):
        check_surrogate(spec, weights[name].to(device))


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 100)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(self.embed(tokens)))
        return out


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def draws(*shape: int, most: int = 0) -> list[Tensor]:
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    if most:
        return [torch.randint(most, shape, generator=g) for g in generators]
    return [torch.randn(shape, generator=g) for g in generators]


@dataclass(frozen=True)
class Case:
    """A model made anew for each use, and batches on the CPU, where loaders leave them."""

    make: Callable[[], nn.Module]
    batches: list[Tensor]

    def model(self, device: torch.device | str = "cpu") -> nn.Module:
        torch.manual_seed(0)
        return self.make().to(device).eval()


def close_to(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """What is the same but for the order of sums."""
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


CASES = {"images": Case(images, draws(4, 3, 8, 8)), "text": Case(Text, draws(4, 8, most=100))}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def places_of(model: nn.Module) -> set[str]:
    return {value.device.type for value in model.state_dict().values()}


@each_case
def test_compress_makes_the_same_file(case: Case, device: torch.device) -> None:
    archive = compress(case.model(device), "8x")
    assert archive.to_bytes() == compress(case.model(), "8x").to_bytes()


@each_case
def test_compress_with_data(case: Case, device: torch.device) -> None:
    model = case.model(device)
    archive = compress(model, "8x", data=case.batches, activations="int8")
    assert archive.nbytes <= collected(model).nbytes / 8
    trials = [trial for trial in archive.trials if isinstance(trial, Trial)]
    assert [trial.error for trial in trials if trial.error] == []
    assert {"data-free", "calibrated", "calibrated, in sequence"} <= {t.stage for t in trials}
    assert places_of(model) == {device.type}


@each_case
def test_load_into_a_model_leaves_it_where_it_is(
    case: Case, device: torch.device, tmp_path: Path
) -> None:
    compress(case.model(), "8x").save(tmp_path / "model.dither")
    model, other = case.model(device), case.model()
    assert load_into(model, tmp_path / "model.dither").exact
    load_into(other, tmp_path / "model.dither")
    assert places_of(model) == {device.type}
    for name, value in other.state_dict().items():
        assert same_bits(model.state_dict()[name], value)


@each_case
def test_what_is_without_memory_is_loaded_to_a_device(
    case: Case, device: torch.device, tmp_path: Path
) -> None:
    compress(case.model(), "8x").save(tmp_path / "model.dither")
    expected, empty = case.model(), case.model().to("meta")
    load_into(expected, tmp_path / "model.dither")
    load_into(empty, tmp_path / "model.dither", device=device)
    assert places_of(empty) == {device.type}
    found = load(tmp_path / "model.dither", device=device)
    for name, value in expected.state_dict().items():
        assert same_bits(empty.state_dict()[name], value)
        assert found[name].device.type == device.type
        assert same_bits(found[name], value)


@each_case
def test_statistics_are_collected_on_the_device(case: Case, device: torch.device) -> None:
    found, expected = (
        collect(case.model(place), case.batches, loss=lambda out, _: out.square().mean())
        for place in (device, "cpu")
    )
    assert set(found) == set(expected)
    for name, stats in expected.items():
        close_to(vars(found[name]), vars(stats))


@each_case
@pytest.mark.parametrize(
    "encoder",
    [GPTQ(0.05, 0.1), GPTQ(format=Affine(4), damping=0.1), AdaRound(Affine(4), damping=0.1)],
)
def test_layers_in_sequence(case: Case, encoder: Encoder, device: torch.device) -> None:
    if isinstance(encoder, AdaRound):
        encoder = replace(encoder, iterations=20)
    model = case.model(device)
    names = [name for name, value in model.named_parameters() if value.ndim > 1]
    found = in_sequence(model, case.batches, dict.fromkeys(names, encoder))
    assert places_of(model) == {device.type}
    assert found
    expected = in_sequence(case.model(), case.batches, dict.fromkeys(names, encoder))
    for name, encoded in expected.items():
        weight = case.model().get_parameter(name)
        errors = [(e.decode() - weight).square().mean() for e in (found[name], encoded)]
        torch.testing.assert_close(*errors, rtol=0.1, atol=0)


def test_rewrites_stay_where_the_model_is(device: torch.device) -> None:
    case, found = CASES["images"], []
    for place in (device, torch.device("cpu")):
        model, original = case.model(place), case.model(place)
        channels = fold_batch_norm(model)
        equalize(model)
        absorb_biases(model, channels)
        correct_biases(model, original, case.batches)
        assert places_of(model) == {place.type}
        found.append({"out": model(case.batches[0].to(place)).detach().cpu()})
    close_to(*found)


def test_operations_are_counted_from_batches_of_the_cpu(device: torch.device) -> None:
    case = CASES["images"]
    found, expected = (
        multiplications(case.model(place), case.batches[0]) for place in (device, "cpu")
    )
    assert found == expected


GRIDS = [Activation(8), Activation(8, ranges="mse"), Activation(8, per="token")]


@each_case
@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_activations_are_observed(case: Case, grid: Activation, device: torch.device) -> None:
    model = case.model(device)
    found = observe(model, {"*@in": grid}, case.batches)
    apply(model, found)
    assert places_of(model) == {device.type}
    assert model(case.batches[0].to(device)).device.type == device.type
    expected = observe(case.model(), {"*@in": grid}, case.batches).to_json()
    for site, values in expected.items():
        numbers = {key: value for key, value in values.items() if isinstance(value, list)}
        close_to({key: found.to_json()[site][key] for key in numbers}, numbers)


@each_case
def test_diagnose(case: Case, device: torch.device, tmp_path: Path) -> None:
    path = tmp_path / "model.dither"
    compress(case.model(), "8x").save(path)
    for plan in ({"*weight": Affine(4), "*@in": Activation(8)}, path):
        assert diagnose(case.model(device), case.batches[:1], plan).rows


PLANS: list[tuple[str, Mapping[str, Rule] | None, str | None]] = [
    ("text", None, "6x"),
    ("text", {"*weight": QuantNoise(Product(4, points=8))}, None),
    ("images", None, "6x"),
    ("images", {"*weight": DiffQ()}, "5x"),
    ("images", {"*weight": StraightThrough(Affine(4, axis=0))}, None),
    ("images", {"*weight": GPTQ(0.05)}, None),
    ("images", {"*@in": Activation(8), "*weight": LSQ(4)}, None),
]


@pytest.mark.parametrize(("name", "plan", "budget"), PLANS)
def test_what_is_trained_there_is_what_ships(
    name: str,
    plan: Mapping[str, Rule] | None,
    budget: str | None,
    device: torch.device,
    tmp_path: Path,
) -> None:
    case = CASES[name]
    model, batches = case.model(device).train(), [batch.to(device) for batch in case.batches]
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    run = attach(model, plan, budget=budget, steps=2, optimizer=optimizer)
    for step in range(2):
        optimizer.zero_grad()
        loss = model(batches[step]).square().mean() + run.penalty()
        loss.backward()
        optimizer.step()
        run.step()
        run.load_state_dict(run.state_dict())
    run.finish(case.batches)
    run.save(tmp_path / "model.dither")
    model.eval()
    with torch.no_grad():
        shown = model(batches[0])
    other = case.model(device)
    apply(other, run.sites())
    load_into(other, tmp_path / "model.dither")
    with torch.no_grad():
        assert same_bits(other(batches[0]), shown)
    assert places_of(run.detach()) == {device.type}
