"""Models whose activations and gradients are quantized: attach, train, copy, save, load."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dither
from dither.activations import (
    Activation,
    Gradient,
    GradientQuantizer,
    Quantizer,
    Site,
    apply,
    begin,
    encodings_of,
    observe,
    placed,
    remove,
    step,
)
from dither.core import CheckpointError, SpecError
from dither.data import Data
from dither.formats import Affine


class Block(nn.Module):
    """A residual sum that the plan can name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.second = nn.Linear(12, 6)
        self.sum = Site()

    def forward(self, values: Tensor) -> Tensor:
        result: Tensor = self.sum(values + self.second(self.first(values).relu()))
        return result


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(6, 3))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 6, generator=generator) for _ in range(4)]


PLAN = {"*.sum@out": Activation(4), "*@in": Activation(6, ranges="mse")}


def quantized() -> nn.Sequential:
    model = network().eval()
    apply(model, observe(model, PLAN, batches()))
    return model


def test_sites_by_name() -> None:
    model = quantized()
    assert sorted(placed(model)) == sorted(
        [f"{i}.{part}" for i in (0, 1) for part in ("first@in", "second@in", "sum@in", "sum@out")]
        + ["2@in"]
    )
    seen: list[Tensor] = []
    site = model.get_submodule("0.sum")
    site.register_forward_hook(lambda module, args, output: seen.append(output))
    model(batches()[0])
    assert seen[0].unique().numel() <= 16  # 4 bits


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ({"nothing@in": Activation()}, "matches no site"),
        ({"*@inside": Activation()}, "sites end in"),
        ({"*@grad": Activation()}, "Gradient"),
        ({"*@in": Gradient()}, "Gradient"),
        ({"*@in": Affine(8)}, "takes Activation"),
    ],
)
def test_wrong_rules(plan: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        observe(network(), plan, batches())


def test_integers_are_passed_over_unless_named() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    data = [torch.randint(9, (5, 3))]
    assert list(observe(model, {"*@in": Activation()}, data)) == ["1@in"]
    with pytest.raises(SpecError, match="takes integers"):
        observe(model, {"0@in": Activation()}, data)
    with pytest.raises(SpecError, match="no batch"):
        observe(model, {"*@in": Activation()}, [])


def test_removed_without_a_trace() -> None:
    model, plain = quantized(), network()
    keys = list(plain.state_dict())
    assert [key for key in model.state_dict() if "dither_sites" not in key] == keys
    model.load_state_dict(plain.state_dict())  # a plain checkpoint loads strictly
    remove(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(batches()[0]), plain(batches()[0]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_copies_and_pickles_have_their_own() -> None:
    model = quantized()
    values = batches()[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(values), model(values))
        site = placed(other)["0.first@in"]
        assert isinstance(site, Quantizer)
        site.set(torch.tensor([-0.1]), torch.tensor([0.1]))
        assert not torch.equal(other(values), model(values))
        remove(other)
        assert placed(model)


def test_evaluation_from_threads_equals_one() -> None:
    model = quantized()
    data = batches() * 8
    with torch.no_grad():
        expected = [model(values) for values in data]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(torch.no_grad()(model), data))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_attention_and_its_fused_path() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    data = [torch.randn(2, 5, 8)]
    apply(layer, observe(layer, {"linear1@in": Activation(2)}, data))
    seen: list[int] = []
    layer.linear1.register_forward_pre_hook(lambda m, a: seen.append(a[0].unique().numel()))
    with torch.no_grad():
        layer(data[0])
    assert seen and seen[0] <= 4  # noqa: PT018 - one thing


def test_arguments_by_name_and_outputs_in_containers() -> None:
    class Odd(nn.Module):
        def forward(self, mask: Tensor, *, hidden: Tensor) -> tuple[None, dict[str, Tensor]]:
            return None, {"hidden": hidden}

    class Named(nn.Module):
        def forward(self, values: Tensor) -> dict[str, Tensor]:
            return {"index": torch.arange(3), "hidden": values}

    odd, named = Odd(), Named()
    rounded = Activation(2)
    apply(odd, observe(odd, {"@in": rounded}, Data([0], _call_odd)))
    assert _call_odd(odd, 0)[1]["hidden"].unique().numel() <= 4
    apply(named, observe(named, {"@out": rounded}, [torch.randn(50)]))
    assert named(torch.randn(50))["hidden"].unique().numel() <= 4


def _call_odd(model: nn.Module, _: object) -> tuple[None, dict[str, Tensor]]:
    found: tuple[None, dict[str, Tensor]] = model(torch.arange(3), hidden=torch.linspace(-1, 1, 50))
    return found


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be")
def test_compiled_whole() -> None:
    model = quantized()
    values = batches()[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(values), model(values), atol=1e-6)
    with pytest.raises(SpecError, match="wrapped"):
        apply(compiled, {})  # type: ignore[arg-type]


# --- files ---------------------------------------------------------------------------------------

_FRESH = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import dither
from test_models import batches, network
from dither.activations import apply
model = network().eval()
for parameter in model.parameters():
    torch.nn.init.zeros_(parameter)
with dither.open(sys.argv[2]) as archive:
    apply(model, archive.sites)
    dither.load_into(model, archive)
torch.save(model(batches()[0]).detach(), sys.argv[3])
"""


def test_file_gives_equal_outputs_in_a_fresh_process(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    rules: dict[str, Any] = {
        "*.weight": dither.LSQ(4),
        "*.sum@out": Activation(5, training="learned", lr=1e-2),
        "*.second@in": Activation(8, training="hindsight"),
        "2@in": Activation(8, per="token"),
    }
    run = dither.attach(model, dither.Plan.from_json(dither.Plan(rules).to_json()))
    run.join(optimizer)
    for values in batches():
        model(values).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()
    nbytes = run.finish()
    model.eval()
    expected = model(batches()[0]).detach()
    path = tmp_path / "model.dither"
    assert run.save(path) == nbytes == path.stat().st_size
    result = tmp_path / "out.pt"
    arguments = [str(Path(__file__).parent), str(path), str(result)]
    subprocess.run([sys.executable, "-c", _FRESH, *arguments], check=True)
    assert torch.equal(torch.load(result), expected)
    with pytest.raises(CheckpointError, match=r"activations\.apply"):
        dither.load_into(network(), path)
    found = dither.load_into(network(), path, strict=False)
    with dither.open(path) as archive:
        assert set(found.sites) == set(archive.sites)
    with torch.no_grad():
        site = placed(model)["0.second@in"]
        assert isinstance(site, Quantizer)
        site.set(torch.tensor([-9.0]), torch.tensor([9.0]))
    with pytest.raises(SpecError, match="ranges of activations changed"):
        run.save(path)


# --- training ------------------------------------------------------------------------------------


def train(model: nn.Module, steps: int, lr: float = 1e-2) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr)
    losses = []
    for number in range(steps):
        values = batches()[number % 4]
        loss = (model(values) - values[:, :3].sin()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step(model)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", ["learned", "clip"])
def test_training_moves_learned_ranges(kind: str) -> None:
    model = network()
    plan = {"*.second@in": Activation(3, ranges="percentile", percentile=90.0, training=kind)}
    before = observe(model, plan, batches())
    apply(model, before)
    model.train()
    losses = train(model, 40)
    after = encodings_of(model)
    assert losses[-1] < losses[0]
    for site in before:
        assert after[site].scale != before[site].scale
    model.eval()
    other = network().eval()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "dither" not in k})
    apply(other, after.to_json())
    assert torch.equal(other(batches()[0]), model(batches()[0]))


def test_fixed_ranges_stay() -> None:
    model = network()
    before = observe(model, PLAN, batches())
    apply(model, before)
    model.train()
    train(model, 5)
    assert encodings_of(model) == before


def test_in_hindsight_is_the_recursion_and_looks_back_only() -> None:
    quantizer = Quantizer(Activation(8, training="hindsight", momentum=0.75)).train()
    tensors = [torch.tensor([-1.0, 1.0]), torch.tensor([-2.0, 6.0]), torch.tensor([-4.0, 3.0])]
    low, high = -1.0, 1.0
    for number, values in enumerate(tensors):
        found = quantizer(values)
        if number:  # nothing of this tensor is in its own grid
            assert float(found.max()) <= high + 0.05
            again = quantizer(values * 100)
            assert float(again.max()) == pytest.approx(float(found.max()), abs=0.05)
            quantizer._forget()
            quantizer(values)
        quantizer.step()
        if number:
            low = 0.25 * float(values.min()) + 0.75 * low
            high = 0.25 * float(values.max()) + 0.75 * high
        assert float(quantizer.low) == pytest.approx(low)
        assert float(quantizer.high) == pytest.approx(high)


def test_running_range_includes_the_step_at_hand() -> None:
    quantizer = Quantizer(Activation(16, training="running", momentum=0.5)).train()
    quantizer(torch.tensor([-1.0, 1.0]))
    quantizer.step()
    found = quantizer(torch.tensor([-1.0, 9.0]))
    assert float(found.max()) == pytest.approx(5.0, rel=1e-3)


def test_ranges_move_between_steps_not_in_forward() -> None:
    """Activation checkpointing computes again, and accumulation passes twice."""
    torch.manual_seed(0)
    gradients = []
    for is_checkpointed in (False, True):
        model = network()
        begin(model, {"*@in": Activation(4, training="hindsight")})
        for values in batches()[:2]:
            if is_checkpointed:
                out = checkpoint(model, values, use_reentrant=False)
            else:
                out = model(values)
            out.square().sum().backward()
            step(model)
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_state_is_saved_and_resumed() -> None:
    def made() -> nn.Sequential:
        model = network()
        begin(model, {"*@in": Activation(4, training="hindsight"), "*@grad": Gradient(8)})
        return model

    whole, first = made(), made()
    train(whole, 6, lr=0.0)
    train(first, 3, lr=0.0)
    second = made()
    second.load_state_dict(first.state_dict())
    for values in (batches()[3], batches()[0], batches()[1]):
        (second(values) - values[:, :3].sin()).square().mean().backward()
        step(second)
    assert encodings_of(second) == encodings_of(whole)
    for site, quantizer in placed(second).items():
        assert torch.equal(quantizer.low, placed(whole)[site].low)


# --- gradients -----------------------------------------------------------------------------------


def test_stochastic_rounding_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(1000, generator=generator)
    quantizer = GradientQuantizer(Gradient(3, seed=5), "fc@grad")
    total = torch.zeros_like(gradient)
    draws = 2000
    for _ in range(draws):
        found = quantizer.quantize(gradient)
        total += found
    step_size = float(gradient.max() - gradient.min()) / 7
    inside = (gradient - gradient.mean()).abs() < 2  # the zero point is rounded at the ends
    error = (total / draws - gradient)[inside]
    assert float(error.abs().max()) < 5 * 0.5 * step_size / draws**0.5
    assert abs(float(error.mean())) < 5 * 0.5 * step_size / (draws * len(error)) ** 0.5
    nearest = GradientQuantizer(Gradient(3, stochastic=False)).quantize(gradient)
    assert float((nearest - gradient).abs()[inside].max()) > 0.4 * step_size


def test_gradients_are_seeded_by_step_and_call() -> None:
    gradient = torch.randn(500)
    one, two = (GradientQuantizer(Gradient(4, seed=1), "a@grad") for _ in range(2))
    first = one.quantize(gradient)
    assert torch.equal(first, two.quantize(gradient))
    assert not torch.equal(first, one.quantize(gradient))
    other = GradientQuantizer(Gradient(4, seed=1), "b@grad")
    assert not torch.equal(first, other.quantize(gradient))
    assert first.unique().numel() <= 16


def test_gradient_range_is_of_earlier_steps() -> None:
    quantizer = GradientQuantizer(Gradient(8, momentum=0.5))
    quantizer.quantize(torch.tensor([-1.0, 1.0]))
    quantizer.step()
    assert float(quantizer.quantize(torch.tensor([-50.0, 50.0])).max()) <= 1.01
    quantizer.step()
    assert (float(quantizer.low), float(quantizer.high)) == (-25.5, 25.5)
    bad = torch.tensor([float("nan"), 1.0])
    assert quantizer.quantize(bad) is bad  # for a gradient scaler to see
    quantizer.step()
    assert float(quantizer.high) == 25.5


def test_backward_is_quantized_and_forward_is_not() -> None:
    model, plain = nn.Linear(6, 400), nn.Linear(6, 400)
    plain.load_state_dict(model.state_dict())
    begin(model, {"@grad": Gradient(3)})
    values = batches()[0]
    assert torch.equal(model(values), plain(values))
    model(values).square().sum().backward()
    plain(values).square().sum().backward()
    assert model.bias.grad is not None
    scale = (model(values) * 2).detach().aminmax()
    unit = float(scale.max - scale.min) / 7
    multiples = model.bias.grad / unit
    assert torch.allclose(multiples, multiples.round(), atol=1e-3)
    assert not torch.equal(model.bias.grad, plain.bias.grad)  # type: ignore[arg-type]


def test_fully_quantized_training_follows_plain_training() -> None:
    plain = network()
    expected = train(plain, 60)
    model = network()
    begin(
        model,
        {"*@in": Activation(8, training="hindsight"), "*@grad": Gradient(8)},
    )
    found = train(model, 60)
    assert sum(expected[-4:]) < 0.3 * sum(expected[:4])
    assert sum(found[-4:]) < 1.2 * sum(expected[-4:])
