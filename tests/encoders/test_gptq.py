"""GPTQ: the textbook's result, groups of inputs, steps for each row, and the laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.archive import Archive, pack
from dither.core import STACKED, Encoded, SpecError, Stats
from dither.encoders import Ranges, outputs
from dither.encoders.gptq import GPTQ
from dither.encoders.outputs import matrix_of, output_errors
from dither.formats import Affine
from dither.testing import check_encoder, same_bits


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(size: int, common: float, seed: int = 0) -> Tensor:
    """Second moments of random inputs that share a part."""
    inputs = normal(2 * size, size, seed=seed) + common * normal(2 * size, 1, seed=seed + 1)
    return inputs.T @ inputs / len(inputs) + 0.01 * torch.eye(size)


def damped(gram: Tensor, damping: float) -> Tensor:
    return gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram))


def codes_of(encoded: Encoded) -> Tensor:
    """Codes in steps, ``(outputs, inputs)``."""
    levels = encoded.codes["levels"].values.double()
    return (levels - encoded.codes["zero"].values).reshape(len(levels), -1)


def check_textbook(encoded: Encoded, scaled: Tensor, gram: Tensor) -> None:
    """Each code is the rounded value of Frantar et al.'s Algorithm 1, given the codes before it.

    Following the encoder's own codes keeps a rounding error that decides a tie from spreading.
    """
    values, codes = scaled.double().clone(), codes_of(encoded)
    upper = torch.linalg.cholesky(torch.linalg.inv(gram.double()), upper=True)
    for i in range(values.shape[1]):
        assert float((values[:, i] - codes[:, i]).abs().max()) < 0.5 + 1e-3
        error = (values[:, i] - codes[:, i]) / upper[i, i]
        values[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]


def loss(encoded: Encoded, weight: Tensor, gram: Tensor) -> float:
    error = (encoded.decode() - weight).double()
    return float((error @ gram.double() * error).sum())


def round_trip(encoded: Encoded) -> Encoded:
    return Archive.from_bytes(pack({"weight": encoded}).to_bytes()).encoded("weight")


@pytest.mark.parametrize("inputs", [1, 2, 63, 64, 65, 150])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_the_textbook(inputs: int, damping: float) -> None:
    weight, gram = normal(40, inputs), correlated(inputs, 1.0)
    encoded = GPTQ(0.4, damping).encode(weight, Stats(gram=gram))
    check_textbook(encoded, weight / 0.4, damped(gram, damping))


@pytest.mark.parametrize("inputs", [8, 24, 30, 5])
def test_a_small_gram_matrix_holds_for_each_group(inputs: int) -> None:
    weight, gram = normal(20, inputs), correlated(8, 2.0)
    encoded = GPTQ(0.3).encode(weight, Stats(gram=gram))
    for start in range(0, inputs, 8):
        part = weight[:, start : start + 8]
        own = gram[: part.shape[1], : part.shape[1]]
        alone = GPTQ(0.3).encode(part, Stats(gram=own))
        assert torch.equal(codes_of(encoded)[:, start : start + 8], codes_of(alone))
        check_textbook(alone, part / 0.3, own)


def test_kernels_are_viewed_as_outputs_and_inputs() -> None:
    weight, gram = normal(6, 4, 3, 3), correlated(36, 1.0)
    encoded = GPTQ(0.3).encode(weight, Stats(gram=gram))
    flat = GPTQ(0.3).encode(weight.reshape(6, 36), Stats(gram=gram))
    assert encoded.shape == (6, 4, 3, 3)
    assert torch.equal(codes_of(encoded), codes_of(flat))


def test_a_step_for_each_row() -> None:
    weight, gram = normal(12, 40), correlated(40, 1.0)
    steps = torch.logspace(-2, 0, 12)
    encoded = GPTQ(steps).encode(weight, Stats(gram=gram))
    check_textbook(encoded, weight / steps[:, None], gram)
    assert torch.equal(encoded.params["scale"].float(), steps)
    for i in range(12):
        alone = GPTQ(float(steps[i])).encode(weight[i : i + 1], Stats(gram=gram))
        assert torch.equal(codes_of(alone)[0], codes_of(encoded)[i])


def test_steps_that_bfloat16_holds_take_two_bytes() -> None:
    assert GPTQ(0.25).encode(normal(3, 4)).params["scale"].dtype == torch.bfloat16
    assert GPTQ(0.3).encode(normal(3, 4)).params["scale"].dtype == torch.float32


def test_without_a_gram_matrix_to_nearest() -> None:
    weight = normal(30, 20)
    for stats in (None, Stats(), Stats(gram=torch.eye(20))):
        assert torch.equal(
            codes_of(GPTQ(0.25).encode(weight, stats)), (weight / 0.25).round().double()
        )


@settings(max_examples=40)
@given(
    inputs=st.integers(2, 80),
    common=st.floats(0, 4),
    step=st.floats(0.05, 2),
    seed=st.integers(0, 1000),
)
def test_never_worse_than_nearest(inputs: int, common: float, step: float, seed: int) -> None:
    # But for luck: both errors are sums of as many random squares as there are weights.
    weight, gram = normal(120, inputs, seed=seed), correlated(inputs, common, seed)
    nearest, fed = (GPTQ(step).encode(weight, s) for s in (None, Stats(gram=gram)))
    assert loss(fed, weight, gram) <= 1.03 * loss(nearest, weight, gram)


def test_much_better_where_inputs_have_much_in_common() -> None:
    weight, gram = normal(100, 64), correlated(64, 3.0)
    nearest, fed = (GPTQ(0.5).encode(weight, s) for s in (None, Stats(gram=gram)))
    assert loss(fed, weight, gram) < 0.6 * loss(nearest, weight, gram)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (3, 0, 2)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    for stats in (None, Stats(gram=torch.eye(4))):
        encoded = check_encoder(GPTQ(0.5), torch.zeros(shape), stats, round_trip)
        assert encoded.decode().shape == shape
    rows = GPTQ(torch.full((4,), 0.5))
    assert check_encoder(rows, torch.zeros(4, 0), None, round_trip).decode().shape == (4, 0)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e300])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = normal(6, 8).double()
    weight[2, 3] = value
    for stats in (None, Stats(gram=correlated(8, 1.0))):
        with pytest.raises(SpecError, match=r"not finite, or is beyond float32; .*Raw\(\)"):
            GPTQ(0.5).encode(weight, stats)


def test_values_are_not_rounded_to_infinity() -> None:
    weight = torch.tensor([[3.4e38, -3.4e38, 1.0], [5.0, -6.0, 7.0]])
    encoded = GPTQ(torch.tensor([2.2e38, 4.0])).encode(weight)
    assert codes_of(encoded).tolist() == [[1, -1, 0], [1, -2, 2]]


def test_steps_too_small_are_refused() -> None:
    for step in (1e-9, 1e-30):
        with pytest.raises(SpecError, match="too small"):
            GPTQ(step).encode(torch.tensor([1e9, 1.0]))


@pytest.mark.parametrize("step", [0.0, -1.0, torch.nan, torch.inf, 1e-60])
def test_bad_steps(step: float) -> None:
    with pytest.raises(SpecError, match="a step is a positive number"):
        GPTQ(step).encode(normal(3, 4))


@pytest.mark.parametrize("shape", [(4, 3), (), (2,)])
def test_steps_for_other_rows_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match="3 steps do not fit"):
        GPTQ(torch.ones(3)).encode(torch.ones(shape))


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (-torch.eye(3), "not one of second moments"),
        (torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), "negative eigenvalue"),
        (torch.ones(3), r"\(inputs, inputs\)"),
        (torch.ones(3, 2), r"\(inputs, inputs\)"),
        (torch.ones(0, 0), r"\(inputs, inputs\)"),
    ],
)
def test_bad_gram_matrices(gram: Tensor, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        GPTQ(0.5).encode(normal(2, 3), Stats(gram=gram))
    with pytest.raises(SpecError, match="has no inputs"):
        GPTQ(0.5).encode(torch.tensor(1.0), Stats(gram=torch.eye(1)))


def test_damping_repairs_a_singular_gram_matrix() -> None:
    weight = normal(5, 6)
    encoded = GPTQ(0.5, damping=0.1).encode(weight, Stats(gram=torch.ones(6, 6)))
    check_textbook(encoded, weight / 0.5, damped(torch.ones(6, 6), 0.1))


def test_the_weight_needs_no_layout_and_no_graph() -> None:
    weight, stats = normal(16, 24).requires_grad_(), Stats(gram=correlated(24, 1.0))
    view = torch.empty(24, 32).T[::2].copy_(weight.detach())
    one, other = GPTQ(0.3).encode(weight, stats), GPTQ(0.3).encode(view, stats)
    assert same_bits(one.decode(), other.decode())
    assert not one.decode().requires_grad


FORMATS = [
    Affine(3, axis=0),
    Affine(4, group=5, grid="asymmetric"),
    Affine(2, grid="endpoint"),
    Affine(1, axis=0),
]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_within_bounds_no_output_is_worse_than_nearest(fmt: Affine, ordered: bool) -> None:
    weight = normal(40, 100)
    for common in (0.0, 2.0):
        gram = correlated(100, common)
        encoded = GPTQ(format=fmt, damping=0.01, ordered=ordered).encode(weight, Stats(gram=gram))
        nearest = Ranges(fmt).encode(weight)
        for name, held in nearest.params.items():
            assert torch.equal(held, encoded.params[name])
        each = [output_errors(found.decode() - weight, gram) for found in (encoded, nearest)]
        assert bool((each[0] <= each[1] * (1 + 1e-6)).all())
    limit = 0.6 if fmt.bits and fmt.bits > 2 else 0.8
    assert float(each[0].sum()) < limit * float(each[1].sum())


def test_within_wide_bounds_as_without() -> None:
    weight, gram = normal(12, 150), correlated(150, 1.0)
    found = GPTQ(format=Affine(8)).encode(weight, Stats(gram=gram))
    scale = float(found.params["scale"])
    free = GPTQ(scale).encode(weight, Stats(gram=gram))
    same = (found.decode() - free.decode()).abs() < scale / 2
    assert float(same.float().mean()) > 0.98  # ranges by least squares clip a few


@pytest.mark.parametrize("outputs", [0, 1])
def test_steps_that_fit_the_codes(outputs: int) -> None:
    weight, gram = normal(50, 50), correlated(50, 1.0)
    for stats in (None, Stats(gram=gram, outputs=outputs)):
        plain, refit = (GPTQ(2.0, refit=r).encode(weight, stats) for r in (False, True))
        assert torch.equal(codes_of(plain), codes_of(refit))
        errors = [matrix_of(e.decode() - weight, outputs) for e in (plain, refit)]
        own = torch.eye(50) if stats is None else gram
        each = [float(output_errors(error, own).sum()) for error in errors]
        assert each[1] < each[0]
    assert float(GPTQ(2.0, refit=True).encode(torch.zeros(3, 3)).params["scale"]) == 2.0


def test_settings_that_do_not_go_together() -> None:
    for settings_of, message in (
        ({}, "give a step"),
        ({"step": 0.5, "format": Affine(4)}, "give a step"),
        ({"format": Affine(None)}, "give bits=1..16"),
        ({"format": Affine(4), "strength": 0.1}, "give bits=1..16"),
        ({"format": Affine(4), "ranges": "percentile"}, "ranges"),
        ({"step": 0.5, "ordered": True}, "bounded format"),
    ):
        with pytest.raises(SpecError, match=message):
            GPTQ(**settings_of)


@pytest.mark.parametrize("shape", [(500, 70), (3, 200, 48)], ids=str)
def test_large_weights_are_encoded_in_pieces(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stats = Stats(gram=0.7 * torch.eye(shape[-1]) + 0.3, outputs=0 if len(shape) == 2 else STACKED)
    whole = GPTQ(0.7, refit=True).encode(weight, stats)
    monkeypatch.setattr(outputs, "PIECE", 1 << 12)
    found = GPTQ(0.7, refit=True).encode(weight, stats)
    differ = found.codes["levels"].values != whole.codes["levels"].values
    assert int(differ.sum()) < 1e-3 * weight.numel()  # a product of matrices may round otherwise
    assert torch.allclose(found.params["scale"].float(), whole.params["scale"].float(), rtol=0.01)
