"""What is multiplied by each matrix of a stack is seen, however a module does it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dither
from dither.calibrate import collect, in_sequence
from dither.calibrate.collect import Watch
from dither.core import STACKED, SpecError, Stats
from dither.encoders.sequential_mse import SequentialMSE

EXPERTS, OUTPUTS, INPUTS = 4, 24, 16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loop(x: Tensor, chosen: Tensor, w: Tensor) -> Tensor:
    made = x.new_zeros(len(x), w.shape[1])
    for number in range(len(w)):
        made[chosen == number] = functional.linear(x[chosen == number], w[number])
    return made


def from_the_left(x: Tensor, chosen: Tensor, w: Tensor) -> Tensor:
    made = x.new_zeros(len(x), w.shape[1])
    for number in chosen.unique():
        made[chosen == number] = (w[number] @ x[chosen == number].T).T
    return made


def with_bias(x: Tensor, chosen: Tensor, w: Tensor) -> Tensor:
    made = x.new_zeros(len(x), w.shape[1])
    for number, matrix in enumerate(w.unbind()):
        bias = torch.ones(len(matrix))
        made[chosen == number] = functional.linear(x[chosen == number], matrix, bias)
    return made


def in_halves(x: Tensor, chosen: Tensor, w: Tensor) -> Tensor:
    made = x.new_zeros(len(x), w.shape[1])
    for number in range(len(w)):
        some = x[chosen == number]
        parts = [functional.linear(some, part) for part in w[number].chunk(2)]
        made[chosen == number] = torch.cat(parts, -1)
    return made


def sorted_by_matrix(x: Tensor, chosen: Tensor, w: Tensor) -> Tensor:
    order = chosen.argsort(stable=True)
    ends = torch.bincount(chosen, minlength=len(w)).cumsum(0).to(torch.int32)
    made = functional.grouped_mm(x[order], w.transpose(1, 2), offs=ends)
    return made[order.argsort()]


def picked(x: Tensor, chosen: Tensor, w: Tensor) -> Tensor:
    return torch.bmm(w[chosen], x.unsqueeze(2)).squeeze(2)


def picked_and_summed(x: Tensor, chosen: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bi,boi->bo", x, w.index_select(0, chosen))


def under_inference(x: Tensor, chosen: Tensor, w: Tensor) -> Tensor:
    with torch.inference_mode():
        made = loop(x, chosen, w)
    return made.clone()


ROUTED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    function.__name__: function
    for function in (
        loop,
        from_the_left,
        with_bias,
        in_halves,
        sorted_by_matrix,
        picked,
        picked_and_summed,
        under_inference,
    )
}


def at_once(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w.mT).sum(0)


def in_one_sum(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bi,eoi->ebo", x, w).sum(0)


def as_one_matrix(x: Tensor, w: Tensor) -> Tensor:
    every: Tensor = functional.linear(x, w.flatten(0, 1))
    return every.reshape(len(x), *w.shape[:2]).sum(1)


class Routed(nn.Module):
    """Each input goes to one expert, by the largest of its first values; the last gets none."""

    def __init__(
        self, function: Callable[[Tensor, Tensor, Tensor], Tensor], outputs: int = OUTPUTS
    ) -> None:
        super().__init__()
        self.function = function
        self.experts = nn.Parameter(normal(EXPERTS, outputs, INPUTS, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, chosen_by(x), self.experts)


class Dense(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.experts = nn.Parameter(normal(EXPERTS, OUTPUTS, INPUTS, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.experts)


def chosen_by(x: Tensor) -> Tensor:
    return x[:, : EXPERTS - 1].argmax(1)


def batches(count: int = 3, size: int = 40) -> list[Tensor]:
    mixing = normal(INPUTS, INPUTS, seed=50)
    return [normal(size, INPUTS, seed=i) @ mixing for i in range(count)]


def leaning(groups: list[Tensor]) -> Tensor:
    """Second moments of each group; all together count as as many vectors as there are inputs."""
    every = torch.cat(groups)
    joined = every.T @ every / len(every)
    return torch.stack(
        [(some.T @ some + INPUTS * joined) / (len(some) + INPUTS) for some in groups]
    )


@pytest.mark.parametrize("function", ROUTED.values(), ids=ROUTED)
def test_inputs_of_each_expert(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    model, data = Routed(function), batches()
    every = torch.cat(data)
    groups = [every[chosen_by(every) == number] for number in range(EXPERTS)]
    stats = collect(model, data)["experts"]
    assert stats.gram is not None
    assert torch.allclose(stats.gram, leaning(groups), rtol=1e-4, atol=1e-4)
    assert stats.samples == max(map(len, groups))
    assert stats.outputs == STACKED


@pytest.mark.parametrize("function", [at_once, in_one_sum, as_one_matrix])
def test_inputs_that_all_experts_read(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    data = batches()
    stats = collect(Dense(function), data)["experts"]
    assert stats.gram is not None
    expected = leaning([torch.cat(data)] * EXPERTS)
    assert torch.allclose(stats.gram, expected, rtol=1e-4, atol=1e-4)


def test_gradients_do_not_count_as_inputs() -> None:
    model, data = Routed(loop), batches()
    plain = collect(model, data)["experts"]
    graded = collect(model, data, loss=lambda output, _: output.square().sum())["experts"]
    assert plain.gram is not None
    assert graded.gram is not None
    assert torch.equal(graded.gram, plain.gram)
    assert graded.importance is not None


class Fails(Routed):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise ValueError("no")


def test_nothing_is_watched_after_an_exception() -> None:
    model, x = Fails(loop), batches()[0]
    watch = Watch(model)
    with pytest.raises(ValueError, match="no"), watch.hooks():
        model(x)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    with watch.hooks(), pytest.raises(ValueError, match="no"):
        model(x)
    assert not watch.moments


def moments_of(stats: Stats, number: int) -> Stats:
    assert stats.gram is not None
    return Stats(gram=stats.gram[number])


@pytest.mark.parametrize("outputs", [OUTPUTS, EXPERTS * 2, INPUTS])
@pytest.mark.parametrize(
    "encoder",
    [
        dither.GPTQ(0.25),
        dither.GPTQ(0.25, strength=0.02),
        dither.GPTQ(format=dither.Affine(bits=4)),
        SequentialMSE(dither.Affine(bits=3, axis=0)),
        dither.AdaRound(dither.Affine(bits=4), iterations=300),
    ],
)
def test_encoders_take_each_matrix_with_its_own_moments(encoder: Any, outputs: int) -> None:  # noqa: ANN401
    model = Routed(loop, outputs)
    weight = model.experts.detach()
    stats = collect(model, batches())["experts"]
    made = encoder.encode(weight, stats)
    assert made.shape == tuple(weight.shape)
    error = (made.decode() - weight).double()
    plain = (encoder.encode(weight).decode() - weight).double()
    assert stats.gram is not None
    ours, nearest = (
        torch.einsum("eoi,eij,eoj->", e, stats.gram.double(), e) for e in (error, plain)
    )
    assert ours < 0.97 * nearest


def test_gptq_of_a_stack_is_that_of_its_matrices() -> None:
    model = Routed(loop)
    weight, stats = model.experts.detach(), collect(model, batches())["experts"]
    made = dither.GPTQ(0.25).encode(weight, stats).decode()
    for number, matrix in enumerate(weight):
        alone = dither.GPTQ(0.25).encode(matrix, moments_of(stats, number)).decode()
        assert torch.equal(made[number], alone)


def test_a_stack_has_three_axes() -> None:
    with pytest.raises(SpecError, match="outputs=-2 is no axis"):
        dither.GPTQ(0.25).encode(normal(8, 8), Stats(gram=torch.eye(8), outputs=STACKED))


@pytest.mark.parametrize("outputs", [INPUTS, EXPERTS * 4])
def test_in_sequence(outputs: int) -> None:
    model = nn.Sequential(nn.Linear(INPUTS, INPUTS), Routed(loop, outputs), nn.Linear(outputs, 3))
    made = in_sequence(model, batches(), lambda _name, _weight: dither.GPTQ(0.1))
    assert list(made) == ["0.weight", "1.experts", "2.weight"]
    assert made["1.experts"].shape == (EXPERTS, outputs, INPUTS)


class Hidden(Routed):
    """The same with experts that are copied first, so that nobody sees what they multiply."""

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, chosen_by(x), self.experts.clone())


def test_files_are_nearer_than_without_moments() -> None:
    data, others = batches(8, 64), torch.cat(batches(12, 64)[8:])
    errors = {}
    for kind in (Routed, Hidden):
        model = kind(loop)
        archive = dither.compress(model, "10x", data=data)
        assert not any(getattr(trial, "error", "") for trial in archive.trials)
        copy = kind(loop)
        dither.load_into(copy, archive)
        with torch.no_grad():
            errors[kind] = float((copy(others) - model(others)).square().mean())
    assert errors[Routed] < 0.7 * errors[Hidden]


SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {**SIZES, "num_local_experts": 3},
    "Qwen2Moe": {**SIZES, "num_experts": 4, "moe_intermediate_size": 16},
    "Qwen3Moe": {**SIZES, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "Olmoe": {**SIZES, "num_experts": 4},
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_of_transformers_however_they_run(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**MIXTURES[kind])
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()  # from one mapping
    data = dither.Data(
        [torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(i)) for i in range(2)],
        forward=lambda model, batch: model(batch).logits,
    )
    found = {}
    for way in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(way)
        stats = collect(model, data)
        found[way] = {name: s.gram for name, s in stats.items() if s.outputs == STACKED}
    assert len(found["eager"]) == 4
    for way in ("grouped_mm", "batched_mm"):
        for name, gram in found["eager"].items():
            assert gram is not None
            other = found[way][name]
            assert other is not None
            assert torch.allclose(gram, other, rtol=1e-3, atol=1e-3 * float(gram.abs().max()))
