"""What is assumed of a layer's inputs."""

from __future__ import annotations

import pytest
import torch

from dither.core import Stats
from dither.encoders.gptq import GPTQ
from dither.search.priors import COMMON, MOST_INPUTS, NEIGHBOUR, prior_gram

SHAPES = [(7, 1), (3, 40), (5, 6, 3), (4, 3, 3, 3), (4, 2, 1, 7), (2, 3, 3, 3, 3), (0, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_correlation_matrix(shape: tuple[int, ...]) -> None:
    weight = torch.ones(shape)
    gram = prior_gram(weight)
    if not weight.numel():
        assert gram is None
        return
    assert gram is not None
    inputs = weight[0].numel()
    assert gram.shape == (inputs, inputs)
    assert torch.equal(gram, gram.T)
    assert torch.allclose(gram.diagonal(), torch.ones(inputs))
    assert float(gram.min()) >= COMMON - 1e-6
    assert float(torch.linalg.eigvalsh(gram.double()).min()) > 0.01
    GPTQ(0.5).encode(torch.randn(shape), Stats(gram=gram))


def test_inputs_have_a_part_in_common() -> None:
    gram = prior_gram(torch.ones(4, 30))
    assert gram is not None
    apart = gram[~torch.eye(30, dtype=torch.bool)]
    assert torch.allclose(apart, torch.full_like(apart, COMMON))


def test_neighbours_are_alike() -> None:
    gram = prior_gram(torch.ones(4, 2, 3, 5))
    assert gram is not None
    taps = gram.reshape(2, 3, 5, 2, 3, 5)

    def correlation(a: tuple[int, int], b: tuple[int, int]) -> float:
        return float(taps[0][a][0][b] - COMMON) / (1 - COMMON)

    assert correlation((0, 0), (0, 1)) == pytest.approx(NEIGHBOUR, rel=1e-5)
    assert correlation((1, 2), (2, 2)) == pytest.approx(NEIGHBOUR, rel=1e-5)
    assert correlation((0, 0), (0, 4)) == pytest.approx(NEIGHBOUR**4, rel=1e-5)
    assert correlation((0, 0), (1, 1)) == pytest.approx(NEIGHBOUR**2**0.5, rel=1e-5)
    # Other channels only have the mean in common.
    other = taps[0, :, :, 1]
    assert torch.allclose(other, torch.full_like(other, COMMON))


def test_wide_layers_are_taken_in_groups_of_whole_channels() -> None:
    for shape, inputs in [
        ((1, MOST_INPUTS), MOST_INPUTS),
        ((1, MOST_INPUTS + 1), MOST_INPUTS),
        ((1, 1000, 3, 3), MOST_INPUTS // 9 * 9),
        ((1, 2, 40, 40), 1600),
    ]:
        gram = prior_gram(torch.ones(shape))
        assert gram is not None
        assert len(gram) == inputs


@pytest.mark.parametrize(
    "weight",
    [
        torch.tensor(1.0),
        torch.ones(5),
        torch.ones(1, 1, 1, 1, 1, 1),
        torch.ones(0, 4),
        torch.ones(4, 0),
        torch.ones(3, 3, dtype=torch.int64),
        torch.ones(1, 1, 50, 50),
    ],
)
def test_other_shapes_have_none(weight: torch.Tensor) -> None:
    assert prior_gram(weight) is None
