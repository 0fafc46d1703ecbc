"""The white paper's pipelines, on a trained network with depthwise kernels of unlike channels."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.activations import Activation, apply, observe, placed
from dither.core import SpecError
from dither.recipes.white_paper import Quantized, auto_quant, ptq, qat

ITERATIONS = 200


def samples(count: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Channels of the depthwise kernel differ by up to 64 times, as batch norm makes them."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
        *(nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    first, depthwise, last = net[1], net[4], net[6].get_parameter("weight")
    with torch.no_grad():
        for norm in (first, depthwise):
            gains = 2.0 ** torch.linspace(-6, 0, 16)[torch.randperm(16)]
            norm.get_parameter("weight").copy_(gains)
        for batch in samples(8, 1):
            net(batch)
        last.div_(depthwise.get_parameter("weight")[None, :, None, None])  # all count alike
    return net.eval()


def named(found: Quantized) -> dict[str, str]:
    return {step.name: step.said for step in found.steps}


def test_the_order_is_the_papers_and_every_step_is_reported(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    found = ptq(model, samples(), weights=4, axis=None, iterations=ITERATIONS)
    assert list(named(found)) == [
        *("fold batch norms", "equalize", "weights, AdaRound", "activations"),
    ]
    assert named(found)["fold batch norms"] == "2 layers"
    assert named(found)["equalize"].startswith("3 pairs, 2 ReLU6 to ReLU")
    assert found.steps[0].distance < 1e-6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "equalize" in str(found)


def test_every_step_may_be_left_out(model: nn.Module) -> None:
    found = ptq(model, samples(), activations=None, rounding="nearest", equalized=False)
    assert list(named(found)) == ["fold batch norms", "equalize", "weights, nearest"]
    assert named(found)["equalize"] == "left out"
    assert not placed(found.model)
    corrected = ptq(model, samples(), activations=None, rounding="correct biases")
    assert list(named(corrected))[-1] == "correct biases"


def test_equalizing_and_adaround_each_help_at_four_bits_with_a_scale_per_tensor(
    model: nn.Module,
) -> None:
    def distance(rounding: str, *, equalized: bool) -> float:
        found = ptq(
            model,
            samples(),
            weights=4,
            activations=None,
            axis=None,
            rounding=rounding,
            equalized=equalized,
            iterations=ITERATIONS,
        )
        return found.steps[-1].distance

    plain, equal = (distance("nearest", equalized=which) for which in (False, True))
    assert equal < 0.5 * plain
    assert distance("adaround", equalized=True) < 0.5 * equal
    assert distance("correct biases", equalized=False) < plain


def test_the_file_is_the_model_that_was_evaluated(model: nn.Module, tmp_path: Path) -> None:
    found = ptq(model, samples(), weights=4, rounding="correct biases")
    path = tmp_path / "model.dither"
    found.archive().save(path)
    fresh = copy.deepcopy(found.model)
    for site in placed(fresh):
        assert site.endswith("@in")
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    with dither.open(path) as archive:
        apply(fresh, archive.sites)
        dither.load_into(fresh, archive)
    batch = samples(1, 5)[0]
    with torch.no_grad():
        assert torch.equal(fresh(batch), found.model(batch))


def test_auto_quant_ends_where_the_target_is_met(model: nn.Module) -> None:
    batch = samples(1, 3)[0]
    with torch.no_grad():
        wanted = model(batch)

    def score(one: nn.Module) -> float:
        with torch.no_grad():
            return -float((one(batch) - wanted).square().mean() / wanted.square().mean())

    easy = auto_quant(model, samples(), score, 1.0, weights=8, iterations=ITERATIONS)
    assert [a.name for a in easy] == ["original", "folded"]
    hard = auto_quant(
        model, samples(), score, 0.0, weights=4, activations=None, axis=None, iterations=ITERATIONS
    )
    assert [a.name for a in hard] == ["original", "folded", "equalized", "AdaRound"]
    assert hard[0].score == 0
    assert hard[1].score < hard[2].score < hard[3].score


@pytest.mark.parametrize("axis", [0, None])
def test_training_begins_on_the_grids(model: nn.Module, axis: int | None) -> None:
    found, recipe = qat(model, samples(), weights=4, activations=8, axis=axis)
    assert ("fold batch norms" in named(found)) == (axis is None)
    optimizer = torch.optim.SGD(found.model.parameters(), 1e-3)
    run = recipe.attach(found.model, optimizer=optimizer)
    batch = samples(1)[0]
    for _ in range(3):
        found.model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()
    run.finish()
    assert run.archive.sites
    assert all(encoded.format.bits == 4 for encoded in map(run.archive.encoded, run.surrogates))  # type: ignore[attr-defined]


def test_models_that_cannot_be_traced_are_quantized_as_they_are() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x)
            return y if float(x.sum()) > 0 else -y

    torch.manual_seed(0)
    found = ptq(Branching(), [torch.randn(8, 4)], axis=None, iterations=50)
    assert named(found)["fold batch norms"].startswith("left out: torch.fx cannot trace")
    assert found.steps[-1].distance < 0.01
    with pytest.raises(SpecError, match="roundings are"):
        ptq(Branching(), [torch.randn(8, 4)], rounding="up")


def test_batch_norms_correct_biases_and_set_ranges_in_the_place_of_data(model: nn.Module) -> None:
    spec, settled = Activation(8, ranges="norms"), copy.deepcopy(model).train()
    for norm in (settled[1], settled[4]):  # type: ignore[index]
        norm.reset_running_stats()
        norm.momentum = None  # what norms say is so
    with torch.no_grad():
        for batch in samples(8, 1):
            settled(batch)

    def run(rounding: str, *, equalized: bool) -> Quantized:
        return ptq(
            settled.eval(),
            samples(8, 1),
            weights=3,
            activations=spec,
            axis=None,
            rounding=rounding,
            equalized=equalized,
        )

    for equalized in (False, True):
        found = run("correct biases by norms", equalized=equalized)
        assert named(found)["correct biases by norms"] == "3 of 4 layers"  # not of the image
        assert named(found)["activations"].startswith("4 sites")
        assert named(found)["activations"].endswith("2 by norms")  # and two from data
        corrected, plain = (
            f.steps[-2].distance for f in (found, run("nearest", equalized=equalized))
        )
        assert corrected < 0.8 * plain
    grid = run("nearest", equalized=False).sites["3@in"]
    assert grid.spec == spec
    assert 0 < 255 * grid.scale[0] <= 6.001  # of a ReLU6, whatever the samples are


def test_ranges_by_norms_are_not_observed() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(SpecError, match="ranges_by_norms"):
        observe(net, {"0@in": Activation(8, ranges="norms")}, [torch.ones(1, 2)])
    with pytest.raises(SpecError, match="groups=1"):
        Activation(8, ranges="norms", groups=2)
    with pytest.raises(SpecError, match="static"):
        Activation(8, ranges="norms", dynamic=True)
