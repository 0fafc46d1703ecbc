"""Moments that say nothing, or little, end no encoder: it rounds as without them, or as damped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dither.core import Encoder, SpecError, Stats
from dither.encoders import GPTQ, AdaRound, Viterbi
from dither.encoders.gptq import factors
from dither.encoders.outputs import cholesky, output_errors, retargeted, with_silent_groups
from dither.formats import Affine

SIZE = 24


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments(vectors: Tensor) -> Tensor:
    return vectors.T @ vectors / len(vectors)


FEW = {
    "constant": torch.ones(SIZE, SIZE),
    "one vector": moments(normal(1, SIZE)),
    "three vectors": moments(normal(3, SIZE)),
    "copies": moments(normal(200, SIZE // 2).repeat(1, 2)),
    "one input": torch.diag(torch.eye(SIZE)[0]),
    "tiny": 1e-30 * moments(normal(3, SIZE)),
    "far from zero": moments(1e4 + 0.1 * normal(50, SIZE)),
}
NOTHING = {
    "zeros": torch.zeros(SIZE, SIZE),
    "not a number": torch.full((SIZE, SIZE), torch.nan),
    "infinite": torch.full((SIZE, SIZE), torch.inf),
}
ENCODERS: dict[str, Encoder] = {
    "gptq": GPTQ(0.5),
    "gptq, by rate": GPTQ(0.5, strength=0.1, refit=True),
    "gptq, bounded": GPTQ(format=Affine(3, group=8), ordered=True),
    "gptq, by outputs": GPTQ(format=Affine(3), ranges="output"),
    "viterbi": Viterbi(0.25, 0.1, refit=True),
    "adaround": AdaRound(Affine(3), iterations=20),
}


@pytest.mark.parametrize("gram", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
def test_moments_that_say_nothing_are_an_identity(encoder: Encoder, gram: Tensor) -> None:
    weight = normal(6, SIZE)
    found = encoder.encode(weight, Stats(gram=gram)).decode()
    assert torch.equal(found, encoder.encode(weight, Stats(gram=torch.eye(SIZE))).decode())


@pytest.mark.parametrize("gram", FEW.values(), ids=FEW)
@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
def test_moments_of_few_directions_are_encoded_with(encoder: Encoder, gram: Tensor) -> None:
    weight = normal(6, SIZE)
    found = encoder.encode(weight, Stats(gram=gram)).decode()
    blind = encoder.encode(weight, Stats(gram=torch.eye(SIZE))).decode()
    errors = [float(output_errors(decoded - weight, gram).sum()) for decoded in (found, blind)]
    assert bool(found.isfinite().all())
    assert errors[0] <= 1.2 * errors[1]


@pytest.mark.parametrize("gram", [*FEW.values(), *NOTHING.values()], ids=[*FEW, *NOTHING])
def test_a_weight_is_its_own_aim_where_inputs_are_as_they_should_be(gram: Tensor) -> None:
    weight = normal(6, SIZE)
    aim = retargeted(weight, Stats(gram=gram, cross=gram))
    assert torch.allclose(aim, weight, rtol=0, atol=1e-3)


def test_only_the_groups_that_say_nothing_are_replaced() -> None:
    heard = moments(normal(50, 4))
    gram = torch.stack([torch.zeros(4, 4), heard, torch.full((4, 4), torch.nan)])
    for groups in (6, 3):  # of outputs and of inputs: a weight of (6, 4) or (6, 12)
        weight = normal(6, 12 if groups == 3 else 4)
        found = GPTQ(0.5).encode(weight, Stats(gram=gram))
        filled = torch.stack([torch.eye(4), heard, torch.eye(4)])
        assert torch.equal(found.decode(), GPTQ(0.5).encode(weight, Stats(gram=filled)).decode())


def test_silent_groups_have_the_scale_of_the_others_and_no_aim_of_their_own() -> None:
    gram = torch.stack([torch.zeros(4, 4), 2 * torch.eye(4), torch.eye(4)])
    cross = torch.stack([torch.zeros(4, 4), torch.eye(4), torch.full((4, 4), torch.inf)])
    found = with_silent_groups(Stats(gram=gram, cross=cross))
    assert found.gram is not None
    assert found.cross is not None
    assert torch.equal(found.gram, 2 * torch.eye(4).expand(3, 4, 4))
    for group in (0, 2):
        assert torch.equal(found.cross[group], 2 * torch.eye(4))
    assert torch.equal(found.cross[1], torch.eye(4))
    heard = Stats(gram=torch.eye(4), cross=torch.eye(4))
    assert with_silent_groups(heard) is heard


def test_factors_are_those_of_an_identity_or_of_a_little_more() -> None:
    spread, costs = factors(torch.zeros(5, 5))
    assert not bool(spread.any())
    assert torch.equal(costs, torch.ones(5))
    full = moments(normal(90, 5)).double()
    assert cholesky(full)[1] == 0
    assert 0 < cholesky(torch.ones(5, 5).double() - 1e-8 * torch.eye(5))[1] < 1e-4
    with pytest.raises(SpecError, match="no negative eigenvalue"):
        factors(torch.diag(torch.tensor([1.0, -0.1])))
