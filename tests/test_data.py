"""What is taken as data, how models are called with it, and how their outputs are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import dither
from dither.core import SpecError
from dither.data import Data, call, described, divergence, floats_of, has_nan, squared


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batches() -> Iterator[Tensor]:
    yield torch.ones(1)


NO_LOADERS = [
    ("texts", "is text"),
    (b"texts", "is text"),
    (5, "data is int"),
    (2.5, "data is float"),
    ({"input_ids": torch.ones(1)}, "is one batch"),
    (nn.Sequential(nn.Linear(1, 1)), "data is Sequential"),
    (batches, "call it"),
    (list, "data is type"),
    (object(), "data is object"),
]


@pytest.mark.parametrize(("loader", "said"), NO_LOADERS, ids=lambda x: type(x).__name__)
def test_what_is_no_loader_is_refused_at_once(loader: object, said: str) -> None:
    given: Any = loader
    for use in (Data, Data.of, lambda data: dither.compress(nn.Linear(4, 4), "4x", data=data)):
        with pytest.raises(SpecError, match=said):
            use(given)


class Indexed:
    """A sequence as Python knew them before `__iter__`."""

    def __getitem__(self, index: int) -> Tensor:
        return [torch.ones(1), torch.zeros(1)][index]


@pytest.mark.parametrize("loader", [[torch.ones(1)], (torch.ones(1),), Indexed(), batches()])
def test_whatever_gives_batches_is_a_loader(loader: object) -> None:
    assert next(iter(Data(loader))).tolist() == [1.0]  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["forward", "distance", "mask"])
def test_functions_are_functions(field: str) -> None:
    with pytest.raises(SpecError, match=f"{field}=3"):
        Data([torch.ones(1)], **{field: 3})  # type: ignore[arg-type]


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return (a + b) * scale


class One(nn.Module):
    def forward(self, a: Tensor, scale: Tensor | None = None) -> Tensor:
        return a if scale is None else a * scale


class Loose(nn.Module):
    def forward(self, *values: Tensor, **options: Tensor) -> Tensor:
        return torch.stack([*values, *options.values()]).sum(0)


def test_a_model_gets_as_many_elements_as_it_needs() -> None:
    a, b, label = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(9.0)
    pairs: list[object] = [(a, b), [a, b], (a, b, label), {"a": a, "b": b}]
    assert [call(Two(), batch) for batch in pairs] == [3] * 4
    ones: list[object] = [a, (a,), (a, label), [a, b, label], {"a": a}]
    assert [call(One(), batch) for batch in ones] == [1] * 5
    assert call(Loose(), (a, b)) == 1
    for count in range(2):
        with pytest.raises(SpecError, match="takes 2 inputs, and a batch"):
            call(Two(), [a] * count)


def test_a_packed_sequence_is_one_input() -> None:
    packed = pack_sequence([normal(3, 4), normal(2, 4)])
    output: Any = call(nn.GRU(4, 5), packed)
    assert isinstance(output[0], PackedSequence)


@dataclass
class Output:
    logits: Tensor
    inner: dict[str, Any]


def test_tensors_of_an_output_are_found_wherever_they_are() -> None:
    a, b, c = normal(2, 3), normal(4), normal(5, 2)
    output = Output(a, {"x": {"y": [b.numpy(), None, "text"]}, "n": (torch.arange(3), c)})
    assert [t.tolist() for t in floats_of(output)] == [a.tolist(), b.tolist(), c.tolist()]
    assert floats_of(torch.complex(a, a))[0].shape == (2, 3, 2)
    assert has_nan({"x": [Output(a, {"y": torch.full((1,), torch.nan).numpy()})]})
    ragged = torch.nested.nested_tensor([a, a[:1]], layout=torch.jagged)
    assert [t.tolist() for t in floats_of([ragged])] == [a.tolist(), a[:1].tolist()]
    assert torch.equal(floats_of(a.relu().to_sparse())[0], a.relu())
    empty: list[object] = [torch.arange(3), [], Output, None, {"x": "y"}]
    for nothing in empty:
        with pytest.raises(SpecError, match="no floating-point tensor"):
            floats_of(nothing)


def test_what_one_output_lacks_counts_as_zeros() -> None:
    long, short = normal(5, 4), normal(5, 4)[:3]
    lost = long[3:].double().square().sum() / long.double().square().sum()
    assert torch.allclose(squared(short, long), lost)
    assert torch.allclose(
        squared([long[:3], {"b": long[3:]}], [long[:3], {"b": None}]),
        squared(long, torch.cat([long[:3], torch.zeros(2, 4)])),
    )
    steps = [normal(2, 4, seed=i) for i in range(4)]
    assert float(squared(steps, steps)) == 0
    assert 0 < float(squared(steps[:3], steps)) < 1
    assert float(squared(steps, steps[:3])) > 0
    assert float(squared([steps[:2], long], [steps, long])) > 0  # what follows stays in its place
    assert float(squared([steps[:2], long], [steps, long])) < 1
    uniform = divergence(torch.zeros(5, 4), torch.cat([torch.zeros(3, 4), long[3:]]))
    assert torch.allclose(
        divergence(torch.zeros(3, 4), torch.cat([torch.zeros(3, 4), long[3:]])), uniform
    )
    with pytest.raises(SpecError, match=r"output is \(5, 4\) where the original's is \(20,\)"):
        squared(long, long.flatten())


def test_positions_that_a_mask_hides_do_not_count() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"input_ids": torch.ones(2, 3), "attention_mask": mask}
    data, one = Data([batch]), normal(2, 3, 5)
    other = one.masked_fill((mask == 0)[..., None], torch.nan)
    forms: list[Callable[[Tensor], Tensor]] = [
        lambda x: x,
        lambda x: x.transpose(0, 1),
        lambda x: x.flatten(0, 1),
    ]
    for form in forms:
        for distance in (squared, divergence):
            some = Data([batch], distance=distance)
            assert float(distance(*(some.counted([form(x)], batch) for x in (other, one)))) == 0
    assert has_nan(Data([batch], mask=None).counted(other, batch))
    logits = normal(2, 3)  # of three classes, as it happens
    assert data.counted(logits, batch) is logits
    own = Data([batch], distance=lambda a, b: a - b)
    assert own.counted(one, batch) is one
    assert data.shown({"attention_mask": torch.ones(2, 3).long()}) is None


@pytest.mark.parametrize("batch", [{}, {"attention_mask": torch.zeros(2, 1, 3, 3)}, torch.ones(2)])
def test_without_a_mask_everything_counts(batch: object) -> None:
    assert Data([batch]).shown(batch) is None


def test_a_mask_that_is_none_is_refused() -> None:
    for mask in (torch.ones(2, 3), torch.tensor(data=True), "all", torch.ones(1, 2, 3).bool()):
        with pytest.raises(SpecError, match="a mask is bool"):
            Data([1], mask=lambda _, mask=mask: mask).shown(1)  # type: ignore[misc]
    with pytest.raises(SpecError, match="hides all"):
        Data([1]).shown({"attention_mask": torch.zeros(2, 3).long()})


def test_a_batch_that_a_model_cannot_read_is_named() -> None:
    good, model = {"input": normal(3, 4)}, nn.Linear(4, 4)
    bad = {"input": normal(3, 4), "labels": torch.ones(3)}
    with pytest.raises(SpecError, match=r"batch 1, \{input: \(3, 4\), labels: \(3,\)\}: TypeError"):
        dither.compress(model, "4x", data=[good, bad])
    assert described([normal(2), {"a": None}]) == "[(2,), {a: NoneType}]"


@pytest.mark.parametrize(("given", "said"), [(None, "None"), (torch.ones(3), r"of shape \(3,\)")])
def test_a_distance_is_one_number(given: object, said: str) -> None:
    answer: Any = given
    data = Data([normal(3, 40)], distance=lambda *_: answer)
    with pytest.raises(SpecError, match=f"distance gave something {said}"):
        dither.compress(nn.Linear(40, 40), "4x", data=data)
    data = Data([normal(3, 40)], distance=lambda a, b: float((a - b).abs().max()))  # type: ignore[arg-type,return-value]
    assert dither.compress(nn.Linear(40, 40), "2x", data=data).trials


class Noisy(nn.Linear):
    """As generative models are: noise goes in at each call."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(len(x), self.out_features)


def test_models_that_draw_noise_are_compared_with_the_same_noise() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    trials = dither.compress(Noisy(40, 40), "2x", data=[normal(30, 40)]).trials
    assert [trial.error for trial in trials] == [""] * 3  # type: ignore[attr-defined]
    assert all(trial.distance < 1e-4 for trial in trials)  # type: ignore[attr-defined]
    torch.set_rng_state(state)
    Data([normal(3, 4)]).output(nn.Linear(4, 4).eval(), normal(3, 4))
    drawn = torch.rand(1)
    torch.set_rng_state(state)
    nn.Linear(4, 4)
    assert torch.equal(drawn, torch.rand(1))
