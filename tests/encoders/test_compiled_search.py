"""The compiled trellis search finds the codes that the plain one finds, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dither import Viterbi
from dither.core import Stats
from dither.encoders import gptq, viterbi
from tests.coding.test_twins import same, twins

__all__ = ["twins"]


def layer(inputs: int, outputs: int, seed: int) -> tuple[torch.Tensor, Stats]:
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs + 9, inputs, generator=draw) @ torch.randn(
        inputs, inputs, generator=draw
    )
    weight = torch.randn(outputs, inputs, generator=draw)
    return weight, Stats(gram=mixed.T @ mixed)


@given(
    inputs=st.integers(1, 100),
    outputs=st.integers(1, 40),
    states=st.sampled_from([4, 8, 32]),
    strength=st.sampled_from([0.0, 0.1, 2.0]),
    step=st.sampled_from([0.02, 0.5, 3.0]),
    refit=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=12)
def test_codes_are_equal(
    twins: str,
    inputs: int,
    outputs: int,
    states: int,
    strength: float,
    step: float,
    refit: bool,
    seed: int,
) -> None:
    if twins == "interpreted":
        inputs, outputs, states = 1 + inputs % 9, 1 + outputs % 3, 4
    weight, stats = layer(inputs, outputs, seed)
    spec = Viterbi(step, strength, states, damping=0.01, refit=refit)

    def codes() -> list[object]:
        found = spec.encode(weight, stats)
        parts = [part.values for part in found.codes.values()]
        return [part.tolist() for part in (*parts, *found.params.values())]

    same(codes, twins)


def test_groups_of_inputs_and_a_cut_one(twins: str) -> None:
    weight, _ = layer(22, 3, 0)
    _, stats = layer(8, 3, 1)
    spec = Viterbi(0.5, 0.1, states=4, damping=0.01)
    same(lambda: spec.encode(weight, stats).decode().tolist(), twins)


@pytest.mark.parametrize("lengths", [None, torch.rand(2, 7)])
def test_costs_and_errors_are_equal(twins: str, lengths: torch.Tensor | None) -> None:
    weight, stats = layer(9, 5, 2)
    assert stats.gram is not None
    spread = gptq.feedback(stats.gram, 0.01)
    before = torch.rand(8, 5)

    def searched() -> list[object]:
        search = viterbi._Search(3 * weight.T, spread, torch.rand(9) * 0 + 1, lengths, before)
        return [part.tolist() for part in search.run(8)]

    same(searched, twins)
    assert bool(before.isfinite().all())  # what was given is not overwritten
