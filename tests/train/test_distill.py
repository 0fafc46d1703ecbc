"""Distillation losses against their formulas, and the teacher's manners."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dither
from dither.core import SpecError
from dither.train import LSQ, Teacher, embeddings, hidden_states, similarities, soft_targets


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_soft_targets_are_the_papers_mixture() -> None:
    student, teacher = numbers(6, 5), numbers(6, 5, seed=1)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    divergence = 0.0
    for s, t in zip(student, teacher, strict=True):
        p = [math.exp(x / 2) for x in t.tolist()]
        q = [math.exp(x / 2) for x in s.tolist()]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        divergence += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 6
    wanted = 0.7 * 4 * divergence + 0.3 * float(functional.cross_entropy(student, labels))
    loss = soft_targets(student, teacher, 2.0, labels)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    alone = soft_targets(student, teacher, 2.0)
    assert float(alone) == pytest.approx(4 * divergence, rel=1e-5)


def test_the_temperature_does_not_scale_the_gradient() -> None:
    student, teacher = (1e-3 * numbers(8, 10, seed=s) for s in (0, 1))
    norms = []
    for temperature in (1.0, 20.0):
        own = student.clone().requires_grad_()
        soft_targets(own, teacher, temperature).backward()
        assert own.grad is not None
        norms.append(float(own.grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


def test_positions_to_ignore_count_in_neither_term() -> None:
    student, teacher = numbers(2, 3, 7), numbers(2, 3, 7, seed=1)
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    kept = [(0, 0), (0, 1), (1, 0)]
    short = soft_targets(
        torch.stack([student[at] for at in kept]),
        torch.stack([teacher[at] for at in kept]),
        hard_labels=torch.tensor([1, 2, 3]),
    )
    assert torch.allclose(soft_targets(student, teacher, hard_labels=labels), short)


def test_no_gradient_reaches_the_teachers_answers() -> None:
    student, teacher = numbers(4, 6).requires_grad_(), numbers(4, 6, seed=1).requires_grad_()
    for loss in (
        soft_targets(student, teacher),
        hidden_states(student, teacher),
        embeddings(student, teacher),
        similarities(student, teacher),
    ):
        loss.backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_hidden_states_average_over_layers_and_unmasked_positions() -> None:
    own = [numbers(2, 3, 4, seed=s) for s in (0, 1)]
    other = [numbers(2, 3, 4, seed=s) for s in (2, 3)]
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    kept = mask.bool()
    wanted = torch.stack(
        [functional.mse_loss(a[kept], b[kept]) for a, b in zip(own, other, strict=True)]
    ).mean()
    assert torch.allclose(hidden_states(own, other, mask=mask), wanted)
    assert torch.allclose(
        hidden_states(own, other),
        torch.stack([(a - b).square().mean() for a, b in zip(own, other, strict=True)]).mean(),
    )


def test_normalized_features_compare_directions() -> None:
    own = numbers(5, 8)
    assert float(hidden_states(own, 3 * own, normalize=True)) < 1e-12
    assert float(hidden_states(own, 3 * own)) > 1


def test_a_projection_joins_widths_and_is_trained() -> None:
    own, other = numbers(5, 8), numbers(5, 12, seed=1)
    with pytest.raises(SpecError, match="projection"):
        hidden_states(own, other)
    projection = nn.Linear(8, 12)
    hidden_states(own, other, projection=projection).backward()
    assert projection.weight.grad is not None
    with pytest.raises(SpecError, match="2 of the student, 1 of the teacher"):
        hidden_states([own, own], [other])


def test_embeddings_and_similarities_ignore_lengths() -> None:
    own = numbers(6, 8)
    turned = own @ torch.linalg.qr(numbers(8, 8, seed=2)).Q
    assert float(embeddings(own, 5 * own)) == pytest.approx(0, abs=1e-6)
    assert float(embeddings(own, -own)) == pytest.approx(2)
    assert float(similarities(own, 5 * turned)) < 1e-10  # a rotation keeps all cosines
    assert float(embeddings(own, turned)) > 0.1
    assert float(similarities(own, numbers(6, 3, seed=1))) > 0.01
    with pytest.raises(SpecError, match="two or more"):
        similarities(own[:1], own[:1])


def test_a_teacher_answers_as_the_model_was_and_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    teacher = Teacher(model)
    inputs = numbers(8, 4)
    before = teacher(inputs)
    assert torch.equal(before, model.eval()(inputs))
    assert not before.requires_grad
    run = dither.attach(model, {"*.weight": LSQ(4)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    (model(inputs) - teacher(inputs)).square().mean().backward()
    optimizer.step()
    run.step()
    assert torch.equal(teacher(inputs), before)
    with pytest.raises(SpecError, match="before attach"):
        Teacher(model)
    assert Teacher(run.detach(), keep=True).model is model


def test_shapes_and_temperatures_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SpecError, match="one shape"):
        soft_targets(numbers(2, 3), numbers(2, 4))
    with pytest.raises(SpecError, match="positive"):
        soft_targets(numbers(2, 3), numbers(2, 3), temperature=0)
