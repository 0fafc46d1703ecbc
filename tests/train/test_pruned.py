"""Pruned weights are 0 in training and in the file, and come back when a new cycle begins."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import dither
from dither import LSQ, Affine, Pruned, SpecError, attach
from dither.coding import code_lengths
from dither.train import Cyclical, Gradual, Iterative, OneShot, Run, Together
from dither.train.lsq import LearnedStep
from dither.train.method import spec_from_json, spec_to_json
from dither.train.pruned import Masked
from dither.train.sparsity import Sparsity


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def trained(run: Run, model: nn.Module, steps: int, lr: float = 0.05) -> None:
    optimizer = SGD(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(32, 16, generator=generator)
        loss = (model(x) - x[:, :8]).square().mean() + run.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()


def zeros(value: Tensor) -> float:
    return float((value == 0).float().mean())


def test_schedules_at_their_ends_and_joints() -> None:
    assert [OneShot(0.9, begin=0.5).at(p) for p in (0.0, 0.49, 0.5, 1.0)] == [0, 0, 0.9, 0.9]
    gradual = Gradual(0.9, start=0.1, begin=0.2, until=0.6)
    assert [gradual.at(p) for p in (0.0, 0.2, 0.6, 1.0)] == pytest.approx([0.1, 0.1, 0.9, 0.9])
    assert gradual.at(0.4) == pytest.approx(0.9 - 0.8 * 0.5**3)  # Zhu and Gupta, eq. 1
    iterative = Iterative(0.9, rounds=2)
    assert iterative.at(0.0) == pytest.approx(1 - 0.1**0.5)
    assert [iterative.at(p) for p in (0.5, 1.0)] == pytest.approx([0.9, 0.9])
    late = Iterative(0.9, rounds=2, begin=0.2)
    assert [late.at(p) for p in (0.0, 0.19, 0.61, 1.0)] == pytest.approx([0, 0, 0.9, 0.9])
    assert late.at(0.2) == pytest.approx(1 - 0.1**0.5)
    cyclical = Cyclical(0.9, cycles=4, until=0.5)
    assert [cyclical.at(p) for p in (0.0, 0.25, 0.5, 0.75)] == [0.0] * 4
    assert [cyclical.at(p) for p in (0.2, 0.3749, 0.9, 1.0)] == pytest.approx([0.9] * 4, abs=1e-3)
    assert [cyclical.cycle(p) for p in (0.0, 0.249, 0.25, 0.99, 1.0)] == [0, 0, 1, 3, 3]
    assert cyclical.rate(0.25) == 1.0
    assert cyclical.rate(0.2499) < 1e-3


@pytest.mark.parametrize(
    "sparsity", [OneShot(0.5), Gradual(0.8, until=0.5), Iterative(0.7), Cyclical(0.9, cycles=2)]
)
@pytest.mark.parametrize("pattern", [None, "2:4", "channels"])
def test_survives_json(sparsity: Sparsity, pattern: str | None) -> None:
    spec = Pruned(LSQ(4), sparsity, pattern=pattern)
    assert spec_from_json(spec_to_json(spec)) == spec
    assert eval(repr(spec), vars(dither) | vars(dither.train)) == spec


@pytest.mark.parametrize("inner", [LSQ(4), LSQ(None), Affine(8), LSQ(3, axis=0)])
def test_as_many_zeros_in_the_file_as_asked_for(inner: LSQ | Affine, tmp_path: Path) -> None:
    model = network()
    run = attach(model, {"*.weight": Pruned(inner, Gradual(0.75), refresh=2)}, steps=20)
    trained(run, model, 20)
    run.finish()
    run.save(tmp_path / "model.dither")
    loaded = dither.load(tmp_path / "model.dither")
    for name in ("0.weight", "2.weight"):
        surrogate = run.surrogates[name]
        assert isinstance(surrogate, Masked)
        assert zeros(surrogate.mask) == 0.75
        assert not loaded[name][~surrogate.mask].any()
    model.eval()
    x = torch.randn(4, 16)
    fresh = network(1).eval()
    fresh.load_state_dict(loaded)
    assert torch.equal(model(x), fresh(x))


def test_fewer_bytes_at_the_same_grid() -> None:
    sizes = []
    for sparsity in (OneShot(0.0), OneShot(0.9)):
        model = network()
        run = attach(model, {"*.weight": Pruned(LSQ(None, step=0.01), sparsity)}, steps=4)
        trained(run, model, 4)
        sizes.append(run.finish())
    assert sizes[1] < 0.6 * sizes[0]  # names and biases cost what they did


def test_masked_weights_stay_within_a_cycle_and_come_back_with_0() -> None:
    model = network()
    spec = Pruned(LSQ(8), Cyclical(0.9, cycles=2, until=0.5), refresh=1)
    run = attach(model, {"*.weight": spec}, steps=40)
    with torch.no_grad():
        model.get_parameter("0.weight")[:, :8].mul_(0.01)  # all that is of use, and pruned first
    surrogate, weight = run.surrogates["0.weight"], run.parameter("0.weight")
    assert isinstance(surrogate, Masked)
    masks, values = [], []
    for _ in range(40):
        trained(run, model, 1, lr=1.0)
        masks.append(surrogate.mask.clone())
        values.append(weight.detach().clone())
    for before, after in [*pairwise(masks[:19]), *pairwise(masks[20:])]:
        assert not (after & ~before).any()
    gone = ~masks[18]
    assert masks[19].all()
    assert not values[19][gone].any()
    assert (masks[-1] & gone).any()  # some grew, and others went
    assert zeros(masks[-1]) == pytest.approx(0.9, abs=0.003)
    assert not run.encode()["0.weight"].decode()[~masks[-1]].any()


def test_patterns() -> None:
    model = network()
    plan = {
        "0.weight": Pruned(LSQ(4), OneShot(0.5), pattern="2:4"),
        "2.weight": Pruned(LSQ(4), OneShot(0.5), pattern="channels"),
    }
    run = attach(model, plan, steps=4)
    trained(run, model, 2)
    values = {name: value.decode() for name, value in run.encode().items()}
    runs = (values["0.weight"].reshape(32, 4, 4) != 0).sum(-1)
    assert int(runs.max()) <= 2
    assert int((values["2.weight"] != 0).any(1).sum()) == 4


def test_all_tensors_are_ranked_together() -> None:
    model = network()
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(0.01)
    schedule = Gradual(0.5, until=0.5)
    run = attach(
        model,
        {"*.weight": Pruned(LSQ(8), schedule, refresh=1)},
        schedules=[Together(schedule, refresh=1)],
        steps=6,
    )
    trained(run, model, 6, lr=0.0)
    masks = {n: s.mask for n, s in run.surrogates.items() if isinstance(s, Masked)}
    total = sum(int(mask.sum()) for mask in masks.values())
    assert total == pytest.approx(0.5 * sum(mask.numel() for mask in masks.values()), abs=2)
    assert zeros(masks["0.weight"]) > 0.7
    assert zeros(masks["2.weight"]) < 0.05


def test_a_run_resumes_with_its_mask() -> None:
    def begun() -> tuple[nn.Sequential, Run]:
        model = network()
        spec = Pruned(LSQ(None), Cyclical(0.8, cycles=2), refresh=3)
        return model, attach(model, {"*.weight": spec}, steps=24)

    model, run = begun()
    trained(run, model, 14)
    other, resumed = begun()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(run.state_dict())
    for m, r in ((model, run), (other, resumed)):
        trained(r, m, 10)
    assert run.finish() == resumed.finish()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_a_budget_is_kept_with_a_mask() -> None:
    model = network()
    run = attach(model, {"*.weight": Pruned(LSQ(None), Gradual(0.7))}, budget=900, steps=30)
    trained(run, model, 30)
    assert run.finish() <= 900
    assert zeros(run.archive["0.weight"]) >= 0.7


def test_refusals() -> None:
    with pytest.raises(SpecError, match="give a schedule"):
        Pruned(LSQ(4), 0.9)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match='"n:m" with n < m'):
        Pruned(LSQ(4), OneShot(0.5), pattern="4:2")
    with pytest.raises(SpecError, match="ends at a share"):
        Gradual(1.0)
    with pytest.raises(SpecError, match="begins and ends within training"):
        Gradual(0.5, begin=0.8, until=0.5)
    run = attach(network(), {"*": Pruned(Affine(2, grid="endpoint"), OneShot(0.5))}, steps=2)
    with pytest.raises(SpecError, match="does not hold 0 exactly"):
        run.encode()
    with pytest.raises(SpecError, match="the plan has none"):
        attach(network(), {"*": LSQ(4)}, schedules=[Together(OneShot(0.5))], steps=2)


def budgeted(budget: int, lr: float = 0.01) -> Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
    run = attach(model, {"*": Pruned(LSQ(None))}, budget=budget, steps=60)
    trained(run, model, 60, lr=lr)
    assert 0.985 * budget - 64 <= run.finish() <= budget
    return run


def test_a_budget_decides_how_many_weights_are_0() -> None:
    runs = [budgeted(budget) for budget in (550, 750, 1100)]
    shares = []
    for run in runs:
        surrogate = run.surrogates["0.weight"]
        assert isinstance(surrogate, Masked)
        shares.append(zeros(surrogate.mask))
        assert not run.archive["0.weight"][~surrogate.mask].any()
    assert shares[0] > shares[1] + 0.05
    assert shares[1] > shares[2] + 0.05
    assert shares[0] > 0.5
    assert shares[2] < 0.2


def test_what_is_worth_no_code_is_what_costs_more_bits_than_error() -> None:
    torch.manual_seed(0)
    weight = torch.randn(100, 100)
    surrogate = LSQ(None, step=1.0).begin(weight)
    assert isinstance(surrogate, LearnedStep)
    codes = weight.round()
    lengths = torch.from_numpy(code_lengths(torch.bincount((codes + 6).long().flatten()).numpy()))
    bits = lengths[(codes + 6).long()] - lengths[6]
    gained = weight.square() - (weight - codes).square()
    wanted = float((gained <= 0.1155 * bits).float().mean())
    assert surrogate.worthless(weight) == pytest.approx(wanted, abs=1e-6)
    assert zeros(codes) < wanted < 1


def test_only_learned_steps_decide_by_themselves() -> None:
    for spec in (Affine(4), LSQ(4)):
        for pattern in ("2:4", "channels"):
            with pytest.raises(SpecError, match="give a schedule"):
                Pruned(spec, pattern=pattern)
    with pytest.raises(SpecError, match="give a schedule"):
        Pruned(Affine(4))
