"""Viterbi: the laws, what a trellis gains at equal bytes, error feedback, and rate."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dither.archive import Archive, code, pack
from dither.core import Encoded, SpecError, Stats
from dither.encoders.gptq import GPTQ
from dither.encoders.viterbi import BLOCK, Viterbi
from dither.formats import Trellis
from dither.search import Choice, Grid, Knowledge, TrellisGrid
from dither.search.priors import prior_gram
from dither.testing import check_encoder, same_bits


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loss(encoded: Encoded, weight: Tensor, gram: Tensor) -> float:
    error = (encoded.decode() - weight).reshape(len(weight), -1).double()
    return float(((error @ gram.double()) * error).sum())


def test_without_feedback_it_is_the_best_path_of_the_format() -> None:
    weight = normal(30, 90)
    encoded = Viterbi(0.25).encode(weight)
    best = Trellis().assign(weight, {"scale": torch.tensor([0.25])})
    errors = [float((e.decode() - weight).square().sum()) for e in (encoded, best)]
    assert math.isclose(*errors, rel_tol=1e-6)
    assert encoded.params["scale"].dtype == torch.bfloat16


def test_a_step_for_each_row() -> None:
    weight, steps = normal(6, 40), torch.tensor([0.5, 0.25, 1.0, 0.5, 0.125, 2.0])
    encoded = Viterbi(steps).encode(weight)
    assert encoded.format == Trellis(axis=0, scale_dtype=torch.bfloat16)
    rows = [Viterbi(float(s)).encode(r[None]).decode() for s, r in zip(steps, weight, strict=True)]
    assert same_bits(encoded.decode(), torch.cat(rows))


@pytest.mark.parametrize(("step", "gain"), [(0.5, 0.85), (1.0, 0.85)])
@pytest.mark.parametrize("shape", [(64, 4 * BLOCK), (64, 28, 3, 3)])
def test_less_error_in_no_more_bytes(shape: tuple[int, ...], step: float, gain: float) -> None:
    # 0.85 is 0.7 dB; at equal bytes errors of a grid fall by a quarter with each bit.
    weight = normal(*shape) * normal(shape[0], *[1] * (len(shape) - 1), seed=1).mul(0.4).exp()
    gram = prior_gram(weight)
    assert gram is not None
    grid = GPTQ(step).encode(weight, Stats(gram=gram))
    found = Viterbi(step / 2).encode(weight, Stats(gram=gram))
    more_bits = 8 * (code(found).nbytes - code(grid).nbytes) / weight.numel()
    assert loss(found, weight, gram) * 4**more_bits < gain * loss(grid, weight, gram)


@pytest.mark.parametrize("inputs", [3 * BLOCK + 5, BLOCK + 7])
def test_errors_are_passed_on_between_blocks_within_groups(inputs: int) -> None:
    weight = normal(40, 3 * BLOCK + 5)
    gram = 0.5 * torch.eye(inputs) + 0.5
    losses = []
    for stats in (Stats(gram=gram), None):
        error = (Viterbi(0.5).encode(weight, stats).decode() - weight).split(inputs, dim=1)
        losses.append(sum(float(((e @ gram[: len(e.T), : len(e.T)]) * e).sum()) for e in error))
    assert losses[0] < 0.75 * losses[1]


def test_rate_counts() -> None:
    weight = normal(100, 120)
    nbytes, errors = [], []
    for strength in (0.0, 0.4):
        encoded = Viterbi(0.6, strength).encode(weight)
        nbytes.append(code(encoded).nbytes)
        errors.append(float((encoded.decode() - weight).square().mean()))
    assert nbytes[1] < 0.97 * nbytes[0]
    assert errors[1] * 4 ** (8 * (nbytes[1] - nbytes[0]) / weight.numel()) < errors[0]


def test_the_search_may_use_it() -> None:
    weight = normal(48, 60)
    known = Knowledge(weight, 1.0, gram=prior_gram(weight))
    proposer = TrellisGrid(Viterbi(1.0, states=16))
    encoded = Choice(0, 0, proposer, step=0.5, fed=True).encode(known)
    assert encoded.format == Trellis(16, scale_dtype=torch.bfloat16)
    assert float(encoded.params["scale"]) == 0.25
    archive = Archive.from_bytes(pack({"w": encoded}).to_bytes())
    assert same_bits(archive["w"], encoded.decode())
    small = {choice.proposer for choice in proposer.propose(known) if choice.fed}
    large = replace(known, value=normal(80, 60), gram=prior_gram(normal(80, 60)))
    assert small == {Grid()}
    assert proposer in {choice.proposer for choice in proposer.propose(large) if choice.fed}


def test_what_does_not_fit_is_refused() -> None:
    weight = normal(4, 6)
    with pytest.raises(SpecError, match="positive"):
        Viterbi(0.0).encode(weight)
    with pytest.raises(SpecError, match="not finite"):
        Viterbi(0.1).encode(weight / 0)
    with pytest.raises(SpecError, match="larger step"):
        Viterbi(1e-9).encode(weight)
    with pytest.raises(SpecError, match="Gram"):
        Viterbi(0.1).encode(weight, Stats(gram=torch.ones(6)))


@pytest.mark.parametrize("fed", [False, True])
def test_steps_that_fit_the_codes_cost_no_bytes(fed: bool) -> None:
    weight = normal(64, 120)
    gram = 0.5 * torch.eye(120) + 0.5 if fed else None
    for step in (0.9, torch.linspace(0.7, 1.1, 64)):
        plain = Viterbi(step).encode(weight, Stats(gram=gram))
        refit = Viterbi(step, refit=True).encode(weight, Stats(gram=gram))
        levels = [e.codes["levels"].values for e in (plain, refit)]
        assert torch.equal(*levels)
        assert [e.params["scale"].dtype for e in (plain, refit)] == [torch.float32] * 2
        own = torch.eye(120) if gram is None else gram
        assert loss(refit, weight, own) < (0.94 if fed else 0.9) * loss(plain, weight, own)
    short = Viterbi(0.5, refit=True).encode(weight, Stats(gram=gram))
    assert short.params["scale"].dtype == torch.bfloat16
    check_encoder(
        Viterbi(0.9, refit=True), weight, Stats(gram=gram), lambda e: pack({"w": e}).encoded("w")
    )


@pytest.mark.parametrize("rate", [1.0, 2.0, 4.0])
def test_within_a_tenth_of_a_bit_of_the_bound(rate: float) -> None:
    # R(D) of a Gaussian source of variance 1; every byte counts, the table's too.
    weight = normal(128, 512)
    step = {1.0: 0.96, 2.0: 0.5, 4.0: 0.13}[rate]
    encoded = Viterbi(step, 0.37, 16, refit=True).encode(weight)
    bits = 8 * code(encoded).nbytes / weight.numel()
    error = float((encoded.decode() - weight).square().mean())
    assert abs(bits - rate) < 0.1
    assert bits - 0.5 * math.log2(1 / error) < 0.1
