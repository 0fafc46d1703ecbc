"""Oscillations: exact counts, the toy's law, freezing and dampening on learned steps."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.core import SpecError
from dither.formats import Affine, Codebook
from dither.train import (
    LSQ,
    CountOscillations,
    Dampening,
    FreezeOscillations,
    Ramp,
    Run,
    StraightThrough,
    frozen_share,
    oscillating,
)
from dither.train.lsq import LearnedStep
from dither.train.oscillations import Watch


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def count(sequence: list[int]) -> int:
    """Oscillations of one integer over a sequence."""
    watch = Watch(torch.tensor([float(sequence[0])]))
    looks = [watch.look(torch.tensor([float(n)]), 0.01, k) for k, n in enumerate(sequence[1:], 1)]
    return sum(int(o) for o in looks)


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        ([0, 1, 0], 1),
        ([0, 1, 2, 3], 0),
        ([0, 1, 0, 1, 0], 3),
        ([0, 1, 1, 1, 0], 1),  # however long ago the change was
        ([0, 1, 1, 2], 0),
        ([5, 5, 5], 0),
        ([0, 2, 1, -1, 0], 2),
    ],
)
def test_changes_opposite_to_the_previous_change_count(sequence: list[int], expected: int) -> None:
    assert count(sequence) == expected


def test_frequency_and_average_are_moving_averages() -> None:
    watch, m = Watch(torch.tensor([0.0])), 0.1
    frequency = average = 0.0
    for step, (integer, oscillated) in enumerate([(1, 0), (0, 1), (1, 1), (1, 0), (0, 1)], 1):
        watch.look(torch.tensor([float(integer)]), m, step)
        watch.look(torch.tensor([float(integer)]), m, step)  # a step counts once
        frequency = m * oscillated + (1 - m) * frequency
        average = m * integer + (1 - m) * average
    assert float(watch.frequency) == pytest.approx(frequency)
    assert float(watch.average) == pytest.approx(average)


def test_frequency_is_proportional_to_the_distance_from_the_grid() -> None:
    """The paper's toy: one weight, gradient straight through, optimum between two grid points."""
    distances = torch.tensor([0.05, 0.1, 0.2, 0.4])
    weight, lr = torch.full((4,), 0.49), 0.02
    watch, steps, total = Watch(weight.round()), 4000, torch.zeros(4)
    for step in range(1, steps + 1):
        weight = weight - lr * (weight.round() - distances)
        total += watch.look(weight.round(), 0.01, step)
    assert torch.allclose(total / steps, 2 * distances, atol=0.01)  # there and back


def test_freezing_takes_the_rounded_average_and_stays() -> None:
    watch = Watch(torch.tensor([0.0, 0.0]))
    for step in range(1, 200):
        watch.look(torch.tensor([float(step % 4 != 0), 7.0]), 0.05, step)
    assert watch.freeze(0.2) == 1
    assert watch.frozen.tolist() == [True, False]
    assert watch.last.tolist() == [1.0, 7.0]
    watch.look(torch.tensor([-3.0, 8.0]), 0.05, 200)
    assert watch.last.tolist() == [1.0, 8.0]
    assert watch.freeze(0.2) == 0


class Noisy(nn.Module):
    """A layer whose optimum lies off the grid, so that its weights oscillate."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 6, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(numbers(6, 12))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layer(inputs)
        return outputs


GOAL = numbers(6, 12, seed=9)


def train(run: Run, optimizer: torch.optim.Optimizer, until: int) -> None:
    for step in range(run.done, until):
        inputs = numbers(24, 12, seed=step)
        loss = (run.model(inputs) - inputs @ GOAL.T).square().mean() + run.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()


def begin(steps: int, **parts: object) -> tuple[Run, torch.optim.Optimizer]:
    model = Noisy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    plan = {"*": LSQ(3, learn=False, step=0.6)}
    run = dither.attach(model, plan, steps=steps, optimizer=optimizer, **parts)  # type: ignore[arg-type]
    return run, optimizer


def surrogate(run: Run) -> LearnedStep:
    made = run.surrogates["layer.weight"]
    assert isinstance(made, LearnedStep)
    return made


def test_counting_changes_nothing() -> None:
    finals = []
    for schedules in ([], [CountOscillations(0.01)]):
        run, optimizer = begin(60, schedules=schedules)
        train(run, optimizer, 60)
        finals.append(run.parameter("layer.weight").detach())
    assert torch.equal(*finals)
    assert oscillating(run) > 0.1
    assert frozen_share(run) == 0


def test_both_remedies_leave_few_weights_oscillating() -> None:
    shares = {}
    remedies: dict[str, dict[str, object]] = {
        "none": {"schedules": [CountOscillations(0.05)]},
        "freeze": {
            "schedules": [
                FreezeOscillations(Ramp(0.2, 0.05, begin=0.25, shape="cosine"), momentum=0.02)
            ]
        },
        "dampen": {
            "schedules": [CountOscillations(0.05)],
            "penalties": [Dampening(Ramp(0.0, 3.0, begin=0.25, shape="cosine"))],
        },
    }
    for name, parts in remedies.items():
        run, optimizer = begin(400, **parts)
        train(run, optimizer, 400)
        shares[name] = oscillating(run, 0.06)
    assert shares["none"] > 0.3
    assert shares["freeze"] < 0.1 * shares["none"]
    assert shares["dampen"] < 0.1 * shares["none"]


def test_nothing_freezes_before_the_ramp_begins_and_what_froze_stays(tmp_path: Path) -> None:
    schedule = FreezeOscillations(Ramp(0.05, 0.02, begin=0.5), momentum=0.02)
    run, optimizer = begin(200, schedules=[schedule])
    train(run, optimizer, 100)
    assert frozen_share(run) == 0
    train(run, optimizer, 150)
    assert frozen_share(run) > 0.2
    watch = surrogate(run).watch
    assert watch is not None
    where, codes = watch.frozen.clone(), watch.last.clone()
    train(run, optimizer, 200)
    weight = run.parameter("layer.weight")
    assert torch.equal(surrogate(run).integers(weight)[~where], codes[~where]) is False
    shown = surrogate(run).train()(weight)
    assert torch.equal(shown[where], (codes * surrogate(run).steps())[where])
    run.finish()
    run.save(tmp_path / "model.dither")
    loaded = dither.load(tmp_path / "model.dither")["layer.weight"]
    assert torch.equal(loaded, shown.detach())
    assert torch.equal(loaded, surrogate(run).eval()(weight).detach())


def test_frozen_weights_get_no_gradient_and_steps_their_true_one() -> None:
    weight = nn.Parameter(torch.tensor([0.9, 0.2, -0.4]))
    made = LSQ(4, step=0.25).begin(weight)
    assert isinstance(made, LearnedStep)
    made.watch = Watch(torch.tensor([3.0, 0.0, 0.0]))
    made.watch.frozen = torch.tensor([True, False, False])
    made(weight)[:1].sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.0, 0.0, 0.0]
    assert made.log_step.grad is not None
    assert float(made.log_step.grad) == pytest.approx(3 * 0.25)  # d (3 s) / d log s


def test_resuming_is_exact(tmp_path: Path) -> None:
    schedule = FreezeOscillations(Ramp(0.05, 0.02, begin=0.3), momentum=0.02)
    run, optimizer = begin(120, schedules=[schedule])
    train(run, optimizer, 60)
    torch.save([part.state_dict() for part in (run.model, optimizer, run)], tmp_path / "half.pt")
    states = torch.load(tmp_path / "half.pt", weights_only=True)
    train(run, optimizer, 120)

    again, another = begin(120, schedules=[schedule])
    again.model.load_state_dict(states[0])
    another.load_state_dict(states[1])
    again.load_state_dict(states[2])
    train(again, another, 120)
    assert frozen_share(run) > 0.1
    assert frozen_share(run) == frozen_share(again)
    assert torch.equal(run.parameter("layer.weight"), again.parameter("layer.weight"))


def test_dampening_is_the_papers_sum() -> None:
    run, _ = begin(10)
    weight, made = run.parameter("layer.weight"), surrogate(run)
    with torch.no_grad():
        weight[0, 0] = 9.0  # beyond the last grid point: clipped, so it costs nothing
    step = float(made.steps().flatten())
    codes = (weight.detach() / step).round().clamp(-4, 3)
    clipped = weight.clamp(-4 * step, 3 * step)
    wanted = 0.1 * (codes * step - clipped).square().sum(0).mean()
    (expected,) = torch.autograd.grad(wanted, [weight])
    term = Dampening(0.1)(run)
    term.backward()
    assert torch.allclose(term, wanted)
    assert weight.grad is not None
    assert torch.allclose(weight.grad, expected)
    assert weight.grad[0, 0] == 0
    assert float(Dampening()(run)) == 0  # not before a quarter of training


def test_only_narrow_grids_are_frozen_unless_asked() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    plan = {"0.weight": LSQ(4), "1.weight": LSQ(8), "2.weight": LSQ(None)}
    run = dither.attach(model, plan, schedules=[FreezeOscillations()])
    assert [getattr(s, "watch", None) is not None for s in run.surrogates.values()] == [
        True,
        False,
        False,
    ]
    everywhere = dither.attach(run.detach(), plan, schedules=[FreezeOscillations(max_bits=None)])
    assert all(getattr(s, "watch", None) is not None for s in everywhere.surrogates.values())


def test_questions_without_an_answer_are_refused() -> None:
    run, _ = begin(10)
    with pytest.raises(SpecError, match="CountOscillations"):
        oscillating(run)
    assert frozen_share(run) == 0
    with pytest.raises(SpecError, match="momentum"):
        CountOscillations(0.0)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_rounding_straight_through_can_be_watched_and_frozen(
    axis: int | None, tmp_path: Path
) -> None:
    def begin() -> tuple[Run, torch.optim.Optimizer]:
        model = Noisy()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        schedule = FreezeOscillations(Ramp(0.05, 0.02, begin=0.4), momentum=0.02)
        plan = {"*": StraightThrough(Affine(3, axis=axis))}
        return dither.attach(
            model, plan, steps=160, schedules=[schedule], penalties=[Dampening(1e-4)]
        ), optimizer

    run, optimizer = begin()
    train(run, optimizer, 80)
    torch.save([part.state_dict() for part in (run.model, optimizer, run)], tmp_path / "half.pt")
    train(run, optimizer, 120)
    watch = getattr(run.surrogates["layer.weight"], "watch", None)
    assert isinstance(watch, Watch)
    frozen, codes = watch.frozen.clone(), watch.last.clone()
    assert frozen.float().mean() > 0.1
    train(run, optimizer, 160)
    assert torch.equal(watch.last[frozen], codes[frozen])

    states = torch.load(tmp_path / "half.pt", weights_only=True)
    again, another = begin()
    again.model.load_state_dict(states[0])
    another.load_state_dict(states[1])
    again.load_state_dict(states[2])
    train(again, another, 160)
    assert torch.equal(run.parameter("layer.weight"), again.parameter("layer.weight"))

    weight = run.parameter("layer.weight")
    training = run.surrogates["layer.weight"].train()(weight).detach()
    run.finish()
    levels = run.encode()["layer.weight"].codes["levels"].values.float() - 4
    assert torch.equal(levels[frozen], codes[frozen])
    assert torch.equal(training, run.encode()["layer.weight"].decode())


def test_grids_whose_integers_do_not_stay_are_not_watched() -> None:
    formats = (Affine(3, grid="asymmetric"), Affine(3, group=4), Codebook(8), Affine(None))
    for fmt in formats:
        run = dither.attach(
            Noisy(), {"*": StraightThrough(fmt)}, schedules=[FreezeOscillations(max_bits=None)]
        )
        assert frozen_share(run) == 0
        run.step()
        with pytest.raises(SpecError, match="watched"):
            oscillating(run)
