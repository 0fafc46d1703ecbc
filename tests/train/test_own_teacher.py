"""PQK: the teacher is the whole network, and what it learns reaches the pruned weights alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dither import LSQ, Pruned, SpecError, attach
from dither.recipes import pqk
from dither.train import FixMasks, OneShot, OwnTeacher, Run
from dither.train.pruned import Masked


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5))


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 16, generator=generator)
    return x, x[:, :5].argmax(1)


def fixed() -> tuple[nn.Sequential, Run]:
    model = network()
    spec = Pruned(LSQ(4), OneShot(0.8), regrow=True)
    run = attach(model, {"[03].weight": spec}, schedules=[FixMasks(0.0)], steps=10)
    return model, run


def test_a_teachers_loss_reaches_only_pruned_weights() -> None:
    model, run = fixed()
    x, labels = batch()
    with OwnTeacher(run).teaching():
        loss = functional.cross_entropy(model(x), labels)
    loss.backward()
    for name, surrogate, weight in run.weights():
        assert isinstance(surrogate, Masked), name
        assert weight.grad is not None
        assert not weight.grad[surrogate.mask].any()
        assert weight.grad[~surrogate.mask].any()
    others = [p for n, p in model.named_parameters() if n not in {"0.weight", "3.weight"}]
    assert all(p.grad is None and p.requires_grad for p in others)


def test_a_students_loss_reaches_only_kept_weights_once_masks_are_fixed() -> None:
    model, run = fixed()
    x, labels = batch()
    functional.cross_entropy(model(x), labels).backward()
    for _, surrogate, weight in run.weights():
        assert isinstance(surrogate, Masked)
        assert weight.grad is not None
        assert not weight.grad[~surrogate.mask].any()
        assert weight.grad[surrogate.mask].any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_teacher_that_is_evaluated_has_all_weights(mode: type) -> None:
    model, run = fixed()
    x, plain = batch()[0], network().eval()(batch()[0])
    teacher = OwnTeacher(run)
    model.eval()
    with mode():
        before = model(x)
        with teacher.teaching():
            taught = model(x)
        after = model(x)
    assert torch.equal(taught.detach(), plain.detach())
    assert torch.equal(before, after)
    assert not torch.equal(before, taught)


def test_before_that_pruned_weights_train_too_and_may_return() -> None:
    model = network()
    run = attach(model, {"*.weight": Pruned(LSQ(4), OneShot(0.8), regrow=True, refresh=1)}, steps=9)
    surrogate, weight = run.surrogates["0.weight"], run.parameter("0.weight")
    assert isinstance(surrogate, Masked)
    x, labels = batch()
    functional.cross_entropy(model(x), labels).backward()
    assert weight.grad is not None
    assert weight.grad[~surrogate.mask].any()
    gone = (~surrogate.mask).nonzero()[0]
    with torch.no_grad():
        weight[tuple(gone)] = 3.0
    run.step()
    assert surrogate.mask[tuple(gone)]


def test_statistics_are_apart_and_survive() -> None:
    model, run = fixed()
    teacher = OwnTeacher(run)
    x, _ = batch()
    norm = model.get_submodule("1")
    before = norm.get_buffer("running_mean").clone()
    with teacher.teaching():
        model(x)
        taught = norm.get_buffer("running_mean").clone()
    assert not torch.equal(taught, before)
    assert torch.equal(norm.get_buffer("running_mean"), before)
    other = OwnTeacher(fixed()[1])
    other.load_state_dict(teacher.state_dict())
    assert torch.equal(other.state_dict()["1.running_mean"], taught)
    with pytest.raises(SpecError, match="another model"):
        other.load_state_dict({})


def test_the_teacher_is_the_whole_network() -> None:
    model, run = fixed()
    plain = network().eval()
    x, _ = batch()
    with OwnTeacher(run).teaching():
        model.get_submodule("1").eval()
        taught = model(x)
    assert torch.allclose(taught, plain(x), atol=1e-6)


def test_both_phases_end_with_the_student_alone() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    run = pqk.recipe(model, 4, 0.8, steps=60, phase=0.5).attach(model, optimizer=optimizer)
    teacher = OwnTeacher(run)
    losses = []
    masks: list[Tensor] = []
    for step in range(60):
        x, labels = batch(step)
        student = model(x)
        if run.progress < 0.5:
            loss = functional.cross_entropy(student, labels)
        else:
            with teacher.teaching():
                taught = model(x)
            loss = pqk.loss(student, taught, labels)
        losses.append(float(functional.cross_entropy(student, labels).detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()
        surrogate = run.surrogates["0.weight"]
        assert isinstance(surrogate, Masked)
        masks.append(surrogate.mask.clone())
    assert all(torch.equal(mask, masks[-1]) for mask in masks[31:])
    assert losses[-1] < losses[0]
    values = {name: encoded.decode() for name, encoded in run.encode().items()}
    zeros = sum(int((values[n] == 0).sum()) for n in ("0.weight", "3.weight"))
    assert zeros >= 0.79 * (16 * 32 + 32 * 5)


def test_refusals() -> None:
    with pytest.raises(SpecError, match="no Pruned"):
        OwnTeacher(attach(network(), {"*.weight": LSQ(4)}))
    with pytest.raises(SpecError, match="between 0 and 1"):
        pqk.recipe(network(), steps=10, phase=1.0)
    with pytest.raises(SpecError, match="share of the steps"):
        FixMasks(2.0)
