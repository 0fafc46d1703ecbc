"""AdaRound, sequential MSE and rate-distortion GPTQ: what each does better, and the laws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dither.archive import Archive, code, pack
from dither.core import Encoded, Encoder, SpecError, Stats
from dither.encoders import GPTQ, AdaRound, Nearest, Ranges, SequentialMSE
from dither.encoders.outputs import gram_groups, matrix_of, output_errors, retargeted, tensor_of
from dither.formats import Affine, Raw
from dither.testing import check_encoder, same_bits


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(size: int, common: float, seed: int = 0) -> Tensor:
    inputs = normal(2 * size, size, seed=seed) + common * normal(2 * size, 1, seed=seed + 1)
    return inputs.T @ inputs / len(inputs) + 0.01 * torch.eye(size)


def loss(encoded: Encoded, weight: Tensor, stats: Stats) -> float:
    assert stats.gram is not None
    errors = matrix_of(encoded.decode() - weight, stats.outputs)
    return float(output_errors(errors, stats.gram).sum())


def round_trip(encoded: Encoded) -> Encoded:
    return Archive.from_bytes(pack({"weight": encoded}).to_bytes()).encoded("weight")


@pytest.mark.parametrize("fmt", [Affine(3, axis=0), Affine(3), Affine(4, group=16)], ids=repr)
def test_adaround_lowers_the_output_error(fmt: Affine) -> None:
    weight, stats = normal(20, 48), Stats(gram=correlated(48, 1.5))
    nearest = Ranges(fmt).encode(weight)
    learned = AdaRound(fmt, iterations=400).encode(weight, stats)
    assert loss(learned, weight, stats) < 0.7 * loss(nearest, weight, stats)
    # Up or down: no code is further than one step from its weight.
    step = nearest.params["scale"].max()
    inside = (nearest.decode() - weight).abs() <= step / 2
    assert bool(((learned.decode() - weight).abs()[inside] <= step * 1.001).all())


def test_adaround_ends_binary_and_near_gptq_on_the_unbounded_grid() -> None:
    weight, stats = normal(16, 32), Stats(gram=correlated(32, 2.0))
    nearest = Nearest(Affine(None), 0.5).encode(weight)
    learned = AdaRound(Affine(None), step=0.5, iterations=500).encode(weight, stats)
    fed = GPTQ(0.5).encode(weight, stats)
    assert loss(learned, weight, stats) < 0.7 * loss(nearest, weight, stats)
    assert loss(learned, weight, stats) < 1.3 * loss(fed, weight, stats)
    with pytest.raises(SpecError, match="a step belongs to bits=None"):
        AdaRound(Affine(None))
    with pytest.raises(SpecError, match="a step belongs to bits=None"):
        AdaRound(Affine(4), step=0.1)
    with pytest.raises(SpecError, match="2 bits or more"):
        AdaRound(Affine(1))


def test_without_common_inputs_nearest_is_best() -> None:
    weight = normal(10, 12)
    fmt = Affine(3, axis=0)
    learned = AdaRound(fmt, iterations=400).encode(weight, Stats(gram=10 * torch.eye(12)))
    assert same_bits(learned.decode(), Ranges(fmt).encode(weight).decode())


@pytest.mark.parametrize("axis", [None, 0])
def test_sequential_mse_never_has_more_output_error_than_other_ranges(axis: int | None) -> None:
    weight = normal(12, 30) ** 3
    moments = torch.diag(torch.linspace(0.01, 3, 30)) + correlated(30, 0.5)
    for bits in (2, 3, 5):
        stats = Stats(gram=moments)
        found = SequentialMSE(Affine(bits, axis=axis)).encode(weight, stats)
        for method in ("minmax", "mse"):
            other = Ranges(Affine(bits, axis=axis), method).encode(weight)
            assert loss(found, weight, stats) <= loss(other, weight, stats) * (1 + 1e-6)
    assert loss(found, weight, stats) < loss(other, weight, stats)
    with pytest.raises(SpecError, match="no group"):
        SequentialMSE(Affine(4, group=8))
    with pytest.raises(SpecError, match=r"give Affine\(axis=0\)"):
        SequentialMSE(Affine(4, axis=1)).encode(weight, stats)


@pytest.mark.parametrize("strength", [0.05, 0.1155, 0.3])
def test_rate_distortion_gptq_trades_error_for_bytes(strength: float) -> None:
    weight, stats = normal(128, 96), Stats(gram=correlated(96, 1.0))
    plain, rated = (GPTQ(1.0, strength=k).encode(weight, stats) for k in (0.0, strength))
    assert code(rated).nbytes < 0.99 * code(plain).nbytes
    assert loss(rated, weight, stats) < (1 + 4 * strength) * loss(plain, weight, stats)
    # Only neighbours are chosen: with uncorrelated inputs no error exceeds one step.
    alone = GPTQ(1.0, strength=strength).encode(weight, Stats(gram=torch.eye(96)))
    assert float((alone.decode() - weight).abs().max()) < 1
    check_encoder(GPTQ(1.0, strength=strength), weight, stats, round_trip)
    with pytest.raises(SpecError, match="strength=-1"):
        GPTQ(1.0, strength=-1).encode(weight)


def test_groups_of_outputs_have_their_own_moments() -> None:
    weight, grams = normal(12, 8), torch.stack([correlated(8, k) for k in (0.0, 1.0, 3.0)])
    whole = GPTQ(0.5).encode(weight, Stats(gram=grams)).decode()
    for group in range(3):
        rows = slice(4 * group, 4 * group + 4)
        alone = GPTQ(0.5).encode(weight[rows], Stats(gram=grams[group].clone())).decode()
        assert torch.equal(whole[rows], alone)
    with pytest.raises(SpecError, match="not 3 equal groups"):
        GPTQ(0.5).encode(normal(10, 8), Stats(gram=grams))


def test_blocks_of_inputs_have_their_own_moments() -> None:
    weight, grams = normal(6, 10), torch.stack([correlated(4, k) for k in (0.0, 1.0, 3.0)])
    whole = GPTQ(0.5).encode(weight, Stats(gram=grams)).decode()
    for block in range(3):
        columns = slice(4 * block, min(4 * block + 4, 10))
        size = len(range(10)[columns])
        own = grams[block, :size, :size].clone()
        alone = GPTQ(0.5).encode(weight[:, columns], Stats(gram=own)).decode()
        assert torch.equal(whole[:, columns], alone)
    with pytest.raises(SpecError, match="do not make 10 inputs"):
        GPTQ(0.5).encode(weight, Stats(gram=grams[:2]))


@pytest.mark.parametrize("encoder", [GPTQ(0.5), AdaRound(Affine(3), iterations=30)], ids=str)
def test_outputs_along_another_axis(encoder: Encoder) -> None:
    weight, gram = normal(8, 6, 3), correlated(24, 1.0)
    turned = weight.movedim(1, 0)
    one = encoder.encode(weight, Stats(gram=gram, outputs=1)).decode()
    other = encoder.encode(turned.contiguous(), Stats(gram=gram)).decode()
    assert torch.equal(one.movedim(1, 0), other)
    assert torch.equal(tensor_of(matrix_of(weight, 1), (8, 6, 3), 1), weight)
    with pytest.raises(SpecError, match="no axis"):
        encoder.encode(weight, Stats(gram=gram, outputs=3))
    with pytest.raises(SpecError, match="outputs in the first axis"):
        GPTQ(torch.ones(8)).encode(weight, Stats(gram=gram, outputs=1))


def test_cross_moments_make_up_for_the_layers_before() -> None:
    inputs = normal(200, 10) @ normal(10, 10, seed=1)
    actual = inputs + 0.3 * normal(200, 10, seed=2) @ normal(10, 10, seed=3)
    weight = normal(7, 10, seed=4)
    moments = Stats(gram=actual.T @ actual / 200)
    both = Stats(gram=moments.gram, cross=inputs.T @ actual / 200)
    best = torch.linalg.lstsq(actual, inputs @ weight.T).solution.T
    assert torch.allclose(retargeted(weight, both), best, atol=1e-3)

    def error(encoded: Encoded) -> float:
        return float((inputs @ weight.T - actual @ encoded.decode().T).square().sum())

    assert error(GPTQ(0.2).encode(weight, both)) < error(GPTQ(0.2).encode(weight, moments))


def test_moments_that_do_not_fit() -> None:
    for gram in (torch.ones(3), torch.ones(2, 3), torch.ones(0, 0), torch.ones(2, 2, 2, 2)):
        with pytest.raises(SpecError, match="a Gram matrix is"):
            list(gram_groups(torch.ones(2, 3), gram))
    with pytest.raises(SpecError, match="same shape"):
        retargeted(torch.ones(2, 3), Stats(gram=torch.eye(3), cross=torch.eye(2)))


def shifted(seed: int = 0) -> tuple[Tensor, Stats]:
    """Inputs at half their size and with errors: what does best there is far from the weight."""
    weight, inputs = normal(16, 24, seed=seed), normal(400, 24, seed=seed + 1)
    actual = 0.5 * inputs + 0.1 * normal(400, 24, seed=seed + 2)
    gram, cross = actual.T @ actual / 400, inputs.T @ actual / 400
    return weight, Stats(gram=gram, cross=cross)


def test_adaround_chooses_between_codes_next_to_the_target_or_to_the_weight() -> None:
    weight, stats = shifted()
    form, aim = Affine(None), retargeted(weight, stats, 0.01)
    ways = {
        around: AdaRound(form, 0.25, iterations=300, around=around).encode(weight, stats).decode()
        for around in ("target", "weight")
    }
    assert float((ways["target"] - aim).abs().max()) <= 0.25 * 1.001
    assert float((ways["weight"] - weight).abs().max()) <= 0.25 * 1.001
    assert float((aim - weight).abs().max()) > 0.5  # no code is near both

    def left(value: Tensor) -> float:
        return loss(Raw().encode(value), aim, stats)

    # One step is all that the weight's own neighbours can make up for.
    assert left(ways["target"]) < left(ways["weight"]) < left((weight / 0.25).round() * 0.25)
    alone = Stats(gram=stats.gram)
    same = [AdaRound(Affine(4, axis=0), iterations=50, around=a) for a in ("target", "weight")]
    first, second = (encoder.encode(weight, alone).decode() for encoder in same)
    assert same_bits(first, second)
    with pytest.raises(SpecError, match="around"):
        AdaRound(form, 0.25, around="both")
