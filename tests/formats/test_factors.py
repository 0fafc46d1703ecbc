"""Factors: the laws, exact sums, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.archive import pack
from dither.core import Codes, Encoded, SpecError
from dither.formats import Factors, factors
from dither.testing import check_idempotent
from packages.python import dither_decode as independent
from tests.archive.test_independent import agree
from tests.formats.test_laws import SCALES, weights

SCALE = torch.ones(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=150)
@given(
    weight=weights(),
    exponent=st.integers(-44, 2),
    scale_dtype=st.sampled_from(SCALES),
    reach=st.sampled_from([1, 2, 40, 1 << 20]),
    seed=st.integers(0, 1 << 30),
)
def test_any_parameters(
    weight: Tensor, exponent: int, scale_dtype: torch.dtype, reach: int, seed: int
) -> None:
    # Any lattice, flat ones too; scales far too small or large, denormal, negative and 0.
    fmt = Factors(axis=0 if seed % 2 else None, scale_dtype=scale_dtype)
    generator = torch.Generator().manual_seed(seed)
    rows = weight.shape[0] if weight.ndim > 1 else 1
    columns = weight[0].numel() if rows and weight.ndim > 1 else weight.numel()
    if not rows:
        columns = Factors().fit(weight)["right"].shape[1]
    rank = seed % (min(rows, columns) + 1)
    count = rows if fmt.axis == 0 else 1
    scale = torch.randn(count, generator=generator, dtype=torch.float64) * 10.0**exponent
    scale[1::5] = 0
    params = {
        "right": torch.randint(-reach, reach + 1, (rank, columns), generator=generator),
        "scale": scale,
    }
    try:
        encoded = fmt.assign(weight, params)
    except SpecError as error:
        assert "larger step" in str(error)  # noqa: PT017 - a refusal is allowed, this one
        return
    check_idempotent(encoded, params)
    check_idempotent(encoded)


def by_hand(left: Tensor, right: Tensor, zeros: tuple[int, int], scale: Tensor) -> Encoded:
    parts = {
        "left": Codes(left, int(left.max()) + 1),
        "right": Codes(right, int(right.max()) + 1),
        "zero": Codes(torch.tensor(zeros), 1 << 24),
    }
    fmt = Factors(axis=0 if len(scale) > 1 else None)
    shape = (len(left), right.shape[1])
    return Encoded(fmt, shape, torch.float32, parts, {"scale": scale})


@settings(max_examples=40)
@given(st.integers(0, 1 << 30), st.integers(1, 12), st.sampled_from([1, 9, 1 << 11, 1 << 23]))
def test_both_decoders_agree(seed: int, rank: int, reach: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(0, reach + 1, (17, rank), generator=generator)
    right = torch.randint(0, reach + 1, (rank, 12), generator=generator)
    zeros = (seed % (reach + 1), (seed // 7) % (reach + 1))
    agree(
        by_hand(left, right, zeros, torch.tensor([-0.3])),
        by_hand(left, right, zeros, normal(17, seed=seed % 99)),
    )


def test_sums_are_exact_beyond_float32() -> None:
    left = torch.tensor([[1 << 22, 1, 0]])
    right = torch.tensor([[1 << 22], [1], [0]])
    with pytest.raises(SpecError, match="rank of at most 1"):
        by_hand(left, right, (0, 0), torch.ones(1))
    encoded = by_hand(
        torch.tensor([[(1 << 22), 3], [0, 0]]),
        torch.tensor([[1 << 3, 1], [1, 0]]),
        (0, 0),
        torch.ones(1),
    )
    # 2**25 + 3 lies between 2**25 + 2 and 2**25 + 4, at a float32 of neither: to even, once.
    assert encoded.decode()[0, 0] == torch.tensor(float((1 << 25) + 4))


@pytest.mark.parametrize("largest", [1, 2047, 2048, 2049, 4096, 100_000])
def test_sums_do_not_depend_on_how_products_are_set_to_be_rounded(largest: int) -> None:
    # On either side of what float32 holds; a product in bfloat16, or in TF32, would be seen.
    draw = torch.Generator().manual_seed(largest)
    left = torch.randint(-largest, largest + 1, (30, 4), generator=draw)
    right = torch.randint(-2047, 2048, (4, 50), generator=draw)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = factors._sums(left.double(), right.double())
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.dtype == torch.float32
    assert torch.equal(found, (left @ right).float())


def test_no_sum_is_minus_zero() -> None:
    encoded = by_hand(torch.tensor([[0]]), torch.tensor([[1]]), (1, 1), torch.tensor([1.0]))
    assert encoded.decode().view(torch.int32).tolist() == [[0]]
    agree(encoded)


def test_a_wrong_rotation_would_be_seen() -> None:
    weight = normal(40, 6)
    encoded = Factors().encode(weight)
    error = (encoded.decode() - weight).square().mean()
    assert float(error) < 0.05**2  # an eighth of a deviation, over the root of 12
    signed = encoded.codes["right"].values.double() - int(encoded.codes["zero"].values[1])
    gram = signed @ signed.T / signed.square().sum(1).mean()
    torch.testing.assert_close(gram, torch.eye(6).double(), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": (torch.zeros(40, 5), 1)}, "part 'left'"),
        ({"right": (torch.zeros(6, 5), 1)}, "part 'right'"),
        ({"right": (torch.zeros(7, 6), 1)}, "rank of at most 6"),
        ({"right": (torch.zeros(6), 1)}, "part"),
        ({"zero": (torch.zeros(1), 1 << 24)}, "part 'zero'"),
    ],
)
def test_parts_that_do_not_fit(change: dict[str, tuple[Tensor, int]], message: str) -> None:
    good = Factors().encode(normal(40, 6))
    parts = dict(good.codes) | {name: Codes(*part) for name, part in change.items()}
    with pytest.raises(SpecError, match=message):
        Encoded(good.format, good.shape, good.dtype, parts, good.params)


def test_sums_that_might_not_be_exact_are_refused() -> None:
    codes = torch.zeros(64, 64, dtype=torch.int32)
    zero = Codes(torch.tensor([0, 0]), 1 << 24)
    parts = {"left": Codes(codes, 1 << 24), "zero": zero}
    most, params = (1 << 23) + 1, {"scale": SCALE}
    Encoded(Factors(), (64, 64), torch.float32, parts | {"right": Codes(codes, most)}, params)
    right = {"right": Codes(codes, most + 1)}
    with pytest.raises(SpecError, match="may reach"):
        Encoded(Factors(), (64, 64), torch.float32, parts | right, params)


def test_what_is_refused() -> None:
    with pytest.raises(SpecError, match="Factors\\(axis=1\\)"):
        Factors(axis=1)
    with pytest.raises(SpecError, match="Raw"):
        Factors().encode(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(SpecError, match="Raw"):
        Factors().encode(torch.arange(4))
    for right in (torch.ones(3, 6), torch.ones(2, 5), torch.full((2, 6), 0.5), torch.ones(6)):
        with pytest.raises(SpecError, match="right"):
            Factors().assign(normal(2, 6), {"right": right, "scale": SCALE})
    with pytest.raises(SpecError, match="right"):
        Factors().assign(normal(2, 6), {"scale": SCALE})
    with pytest.raises(SpecError, match="larger step"):
        Factors().assign(normal(2, 6), {"right": torch.ones(1, 6), "scale": SCALE * 1e-12})


def test_the_file_is_read_by_the_independent_decoder() -> None:
    data = pack({"w": Factors(axis=0).encode(normal(30, 8).half())}).to_bytes()
    kind, shape, _ = independent.decode(data)["w"]
    assert (kind, shape) == ("float16", (30, 8))
