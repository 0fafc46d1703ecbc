"""Exact values, parity with published definitions, and nearest codes against brute force."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dither.core import Codes, Encoded, SpecError
from dither.formats import Affine, Codebook, Mixed, Product, Raw
from dither.formats.grid_rounding import restore
from dither.testing import same_bits

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- Raw ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        torch.arange(5),
        torch.tensor(7, dtype=torch.int64),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]),
        torch.tensor([torch.nan, torch.inf, -0.0]),
        torch.zeros(0, 3, dtype=torch.uint8),
        torch.tensor([1, 2], dtype=torch.uint16),
        normal(3, 4).T,
        normal(3, 4).to(torch.float8_e4m3fn),
    ],
    ids=lambda v: f"{v.dtype}{list(v.shape)}",
)
def test_raw_keeps_everything(values: Tensor) -> None:
    encoded = Raw().encode(values)
    decoded = encoded.decode()
    assert same_bits(decoded, values)
    assert encoded.bits == 8 * values.numel() * values.element_size()
    assert encoded.params["values"].is_contiguous()


def test_raw_in_a_shorter_type() -> None:
    weight = normal(4, 5)
    assert torch.equal(Raw(torch.bfloat16).encode(weight).decode(), weight.bfloat16().float())
    assert Raw(torch.float16).encode(weight).bits == 20 * 16
    kept = Raw(torch.float16).encode(torch.tensor([torch.inf, torch.nan])).decode()
    assert kept[0] == torch.inf
    assert bool(kept[1].isnan())
    with pytest.raises(SpecError, match="cannot hold"):
        Raw(torch.float16).encode(torch.tensor([1e5]))
    with pytest.raises(SpecError, match="cannot hold"):
        Raw(torch.float8_e4m3fn).encode(torch.tensor([1e5]))
    with pytest.raises(SpecError, match="cannot hold"):
        Raw(torch.complex64).encode(torch.tensor([1e300j], dtype=torch.complex128))
    with pytest.raises(SpecError, match="cannot stand for"):
        Raw(torch.float16).encode(torch.arange(3))


def test_raw_refuses_what_overflows_on_its_way_back() -> None:
    # Both round up to 65536 in bfloat16, which float16 does not have.
    for value in (65504.0, -65408.0):
        with pytest.raises(SpecError, match=r"6\.5.*give it back"):
            Raw(torch.bfloat16).encode(torch.tensor(value, dtype=torch.float16))
    kept = Raw(torch.bfloat16).encode(torch.tensor([65280.0, torch.inf], dtype=torch.float16))
    assert kept.decode().tolist() == [65280.0, torch.inf]


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_raw_float8_in_a_longer_type(dtype: torch.dtype, stored: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    decoded = Raw(stored).encode(every).decode()
    assert decoded.dtype == dtype
    assert torch.equal(decoded.float().nan_to_num(7.0), every.float().nan_to_num(7.0))


def test_raw_between_the_types_of_float8() -> None:
    small = torch.tensor([0.0, -1.5, 448.0, 2.0**-6]).to(torch.float8_e4m3fn)
    decoded = Raw(torch.float8_e5m2).encode(small).decode()
    assert decoded.float().tolist() == small.float().tolist()
    with pytest.raises(SpecError, match=r"cannot hold a value of 5\.734e"):
        Raw(torch.float8_e4m3fn).encode(torch.tensor([57344.0]).to(torch.float8_e5m2))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("grid", ["endpoint", "symmetric"])
def test_mixed_float8_with_one_value_of_a_width(dtype: torch.dtype, grid: str) -> None:
    weight = torch.tensor([-2.0, 1.5, 0.25]).to(dtype)
    encoded = Mixed(1, grid).assign(weight, {"bits": torch.tensor([8, 4, 0])})
    decoded = encoded.decode().float()
    assert decoded[0] == pytest.approx(-2, abs=0.01)
    assert decoded[1] == pytest.approx(1.5, abs=0.2)
    assert decoded[2] == 0


# --- Affine ---------------------------------------------------------------------------------------


def affine_value(fmt: Affine, code: int, scale: float, zero: int, offset: float) -> float:
    """The design's arithmetic, one step at a time."""
    bits = fmt.bits or 0
    if fmt.grid == "endpoint":
        product = torch.tensor(float(code)) * torch.tensor(scale)
        return float(product + torch.tensor(offset))
    if fmt.grid == "symmetric":
        integer = 2 * code - 1 if bits == 1 else code - (1 << (bits - 1))
    else:
        integer = code - zero
    return float(torch.tensor(float(integer)) * torch.tensor(scale))


@pytest.mark.parametrize("grid", ["symmetric", "asymmetric", "endpoint"])
@pytest.mark.parametrize("bits", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", FLOATS)
def test_affine_is_nearest_by_brute_force(grid: str, bits: int, dtype: torch.dtype) -> None:
    fmt = Affine(bits, group=4, grid=grid)
    weight = (normal(6, 10) * torch.logspace(-3, 2, 10)).to(dtype)
    encoded = fmt.encode(weight)
    held = fmt.params_of(encoded)
    decoded = encoded.decode()
    for row, column in itertools.product(range(6), range(10)):
        at = row * 3 + column // 4
        scale = float(held["scale"][at])
        zero = int(held["zero"][at]) if "zero" in held else 0
        offset = float(held["offset"][at]) if "offset" in held else 0.0
        values = [
            restore(torch.tensor(affine_value(fmt, code, scale, zero, offset)), dtype).double()
            for code in range(1 << bits)
        ]
        code = int(encoded.codes["levels"].values[row, column])
        assert decoded[row, column].double() == values[code]
        best = min(abs(value - weight[row, column].double()) for value in values)
        assert abs(values[code] - weight[row, column].double()) == best


def test_affine_symmetric_values() -> None:
    fmt = Affine(2, axis=0)
    encoded = fmt.assign(
        torch.tensor([[-9.0, 0.2, 9.0], [-0.3, 0.2, 0.9]]), {"scale": torch.tensor([1.0, 0.25])}
    )
    assert encoded.decode().tolist() == [[-2.0, 0.0, 1.0], [-0.25, 0.25, 0.25]]


def test_affine_one_bit_is_plus_and_minus_the_scale() -> None:
    encoded = Affine(1).encode(torch.tensor([-3.0, -1.0, 1.0, 3.0]))
    assert encoded.decode().tolist() == [-2.0, -2.0, 2.0, 2.0]
    assert encoded.codes["levels"].values.tolist() == [0, 0, 1, 1]
    assert Affine(1).encode(torch.zeros(3)).decode().tolist() == [0.0, 0.0, 0.0]


def test_affine_asymmetric_holds_zero_and_both_ends() -> None:
    weight = torch.tensor([-1.0, 0.0, 14.0])
    encoded = Affine(4, grid="asymmetric").encode(weight)
    assert encoded.codes["zero"].values.tolist() == [1]
    assert torch.equal(encoded.decode(), weight)


def test_affine_endpoint_holds_both_ends_and_no_zero() -> None:
    encoded = Affine(2, grid="endpoint").encode(torch.tensor([1.0, 1.1, 2.4, 4.0]))
    assert encoded.decode().tolist() == [1.0, 1.0, 2.0, 4.0]
    assert (
        Affine(4, grid="endpoint").encode(torch.full((5,), 0.3)).decode().tolist()
        == [torch.tensor(0.3).item()] * 5
    )


def test_affine_groups_lie_within_rows() -> None:
    weight = torch.tensor([[1.0, 1.0, 1.0, 8.0, 8.0], [2.0, 2.0, 2.0, 4.0, 4.0]])
    encoded = Affine(2, group=3).encode(weight)
    assert encoded.params["scale"].tolist() == [1.0, 8.0, 2.0, 4.0]
    assert torch.equal(encoded.decode(), weight)
    assert Affine(2, group=3).grouping((7,)).count == 3
    assert Affine(2, group=3).grouping((2, 2, 2)).count == 4


def test_affine_axis_of_a_kernel() -> None:
    weight = normal(4, 3, 2, 2)
    encoded = Affine(8, axis=1).encode(weight)
    assert encoded.params["scale"].shape == (3,)
    for index in range(3):
        alone = Affine(8).encode(weight[:, index])
        assert torch.equal(encoded.decode()[:, index], alone.decode())


def test_affine_unbounded_codes_follow_the_data() -> None:
    weight = torch.tensor([[-0.3, 0.0], [0.1, 0.52]])
    encoded = Affine(None).assign(weight, {"scale": torch.tensor([0.1])})
    assert encoded.codes["levels"].values.tolist() == [[0, 3], [4, 8]]
    assert encoded.codes["levels"].alphabet == 9
    assert encoded.codes["zero"].values.tolist() == [3]
    assert encoded.codes["zero"].alphabet == 1 << 24
    positive = Affine(None).assign(torch.tensor([5.0, 7.0]), {"scale": torch.ones(1)})
    assert positive.codes["levels"].alphabet == 8  # 0 is always on the grid
    assert positive.codes["zero"].values.tolist() == [0]


def test_affine_unbounded_default_step() -> None:
    weight = normal(64, 64)
    scale = Affine(None).fit(weight)["scale"]
    assert scale.item() == pytest.approx(weight.std(correction=0).item() / 8, rel=1e-6)
    far = Affine(None).encode(torch.tensor([1e6, 1e6 + 1e-1], dtype=torch.float64))
    assert far.codes["levels"].alphabet <= (1 << 22) + 2


def test_affine_with_half_precision_scales() -> None:
    encoded = Affine(8, scale_dtype=torch.float16).encode(torch.full((4,), 1e-9))
    assert encoded.params["scale"].item() == 2.0**-24  # the least there is
    assert encoded.decode().abs().max() <= 1e-9 + 2.0**-25


def test_restored_values_saturate() -> None:
    # The scale is rounded up in float16, so 7 steps would be beyond the largest number.
    weight = torch.tensor([65504.0, -65504.0], dtype=torch.float16)
    for scale_dtype in (torch.float16, torch.bfloat16, torch.float32):
        decoded = Affine(4, scale_dtype=scale_dtype).encode(weight).decode()
        assert bool(decoded.isfinite().all())
        assert torch.allclose(decoded, weight, rtol=0.01)


def test_golden_sizes_of_peers() -> None:
    # peers.md section 4: only the Linear weight is quantized; the rest is 736 float32 numbers.
    rest = (512 + 216 + 8) * 32
    uniform = Affine(4, grid="endpoint").encode(normal(512, 512)).bits + rest
    lsq = Affine(4).encode(normal(512, 512)).bits + rest
    assert uniform / 8 / 2**20 == 0.12781524658203125
    assert lsq / 8 / 2**20 == 0.12781143188476562


@given(bits=st.integers(1, 15), seed=st.integers(0, 1000))
def test_diffq_level_definition(bits: int, seed: int) -> None:
    weight = normal(7, 11, seed=seed).double()
    low, high = weight.min(), weight.max()
    position = (weight - low) / (high - low) * (2**bits - 1)
    values = position.round() / (2**bits - 1) * (high - low) + low
    clear = (position - position.floor() - 0.5).abs() > 1e-2
    mixed = Mixed(8).assign(weight.float(), {"bits": torch.full((10,), bits)})
    affine = Affine(bits, grid="endpoint").encode(weight.float())
    for encoded, name in ((mixed, f"levels{bits}"), (affine, "levels")):
        levels = encoded.codes[name].values.reshape(weight.shape).long()
        assert torch.equal(levels[clear], position.round().long()[clear])
        error = (encoded.decode().double() - values)[clear].abs().max()
        assert error < 4e-7 * float(weight.abs().max())


# --- Mixed ----------------------------------------------------------------------------------------


def test_diffq_golden_size_from_our_parts() -> None:
    # 0.26453495025634766 MiB at group 8 and 8 bits: our parts hold the same levels and range;
    # a width takes 5 bits here, 3 there (they count the widths in use, and store 8 bits of it).
    encoded = Mixed(8).encode(normal(512, 512))
    groups = 512 * 512 // 8
    theirs = encoded.bits - 5 * groups + 3 * groups + 8 + (512 + 216 + 8) * 32
    assert theirs / 8 / 2**20 == 0.26453495025634766


def test_mixed_keeps_levels_by_width_in_order() -> None:
    weight = torch.tensor([0.0, 3.0, 1.2, 1.8, 3.0, 0.1, 0.9])
    encoded = Mixed(2).assign(weight, {"bits": torch.tensor([1, 2, 0, 2])})
    assert encoded.codes["levels1"].values.tolist() == [0, 1]
    assert encoded.codes["levels2"].values.tolist() == [1, 2, 1]
    assert set(encoded.codes) == {"bits", "levels1", "levels2"}
    assert encoded.decode().tolist() == [0.0, 3.0, 1.0, 2.0, 0.0, 0.0, 1.0]
    assert encoded.bits == 4 * 5 + 2 + 6 + 64


def test_mixed_fit_spends_nothing_on_zeros() -> None:
    weight = torch.cat([torch.zeros(8), normal(9)])
    encoded = Mixed(8).encode(weight)
    assert encoded.codes["bits"].values.tolist() == [0, 8, 8]
    assert bool((encoded.decode()[:8] == 0).all())


def test_nested_grids_of_bayesian_bits() -> None:
    # s_2 = 2 range / 3 and s_2b = s_b / (2**b + 1): each grid contains the coarser one.
    def grid(bits: int) -> Tensor:
        codes = torch.arange(1 << bits)
        parts = {
            "bits": Codes(torch.tensor([bits]), 17),
            f"levels{bits}": Codes(codes, 1 << bits),
        }
        fmt = Mixed(1 << bits, "symmetric")
        encoded = Encoded(fmt, (1 << bits,), torch.float64, parts, {"range": torch.tensor([1.5])})
        return encoded.decode()

    step = 1.0  # of two bits at range 1.5
    for bits in (2, 4, 8):
        coarse, fine = grid(bits), grid(2 * bits)
        assert (coarse[1] - coarse[0]).item() == pytest.approx(step, rel=1e-4)
        assert bool((coarse == 0).any())
        distance = (coarse[1:, None] - fine).abs().min(1).values  # the lowest code lies outside
        assert float(distance.max()) < 1e-6
        step /= 2**bits + 1


def test_nested_decomposition_equals_rounding_at_once() -> None:
    # Bayesian Bits with all gates open: x_2 + e_4 + e_8 is the 8-bit quantizer.
    weight = normal(200).double().clamp(-1.9, 1.9)
    limit, total, step = 2.0, torch.zeros(200).double(), 2 * 2.0 / 3
    for bits in (2, 4, 8):
        total = total + step * ((weight - total) / step).round()
        step /= 2**bits + 1
    fmt = Mixed(200, "symmetric")
    given_range = {"bits": torch.tensor([8]), "range": torch.tensor([limit])}
    assert torch.allclose(fmt.assign(weight, given_range).decode(), total, atol=1e-6)


# --- Codebook -------------------------------------------------------------------------------------


def test_codebook_is_nearest_by_brute_force() -> None:
    for dtype, fmt in itertools.product(
        FLOATS, [Codebook(7), Codebook(7, bucket=4), Codebook(7, bucket=4, shift=True)]
    ):
        weight = (normal(6, 9) * torch.logspace(-3, 2, 9)).to(dtype)
        encoded = fmt.encode(weight)
        points = encoded.params["points"].float()
        table = points.expand(54, len(points)).clone()
        at = torch.arange(54) // 4
        for name, apply in (("scale", Tensor.mul_), ("offset", Tensor.add_)):
            if name in encoded.params:
                apply(table, encoded.params[name].float()[at, None])
        values = restore(table, dtype).double()
        distance = (values - weight.double().reshape(-1, 1)).abs()
        chosen = encoded.codes["indices"].values.reshape(-1, 1).long()
        assert torch.equal(distance.gather(1, chosen).squeeze(1), distance.min(1).values)
        decoded = encoded.decode().double().reshape(-1, 1)
        assert torch.equal(values.gather(1, chosen), decoded)


def test_codebook_with_few_distinct_values_is_exact_and_small() -> None:
    weight = torch.tensor([0.5, -0.25, 0.5, 1.0])
    encoded = Codebook(256).encode(weight)
    assert encoded.params["points"].tolist() == [-0.25, 0.5, 1.0]
    assert torch.equal(encoded.decode(), weight)
    assert encoded.bits == 4 * 2 + 3 * 16


def test_codebook_sorts_its_points() -> None:
    params = {"points": torch.tensor([3.0, -1.0, 0.0])}
    encoded = Codebook(3).assign(torch.tensor([2.9, -5.0]), params)
    assert encoded.params["points"].tolist() == [-1.0, 0.0, 3.0]
    assert encoded.decode().tolist() == [3.0, -1.0]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_polino_bucket_scaling(bits: int) -> None:
    # sc(v) = (v - min) / (max - min) per bucket of 256, s = 2**bits levels evenly in [0, 1].
    weight = normal(40, 30)
    flat = weight.reshape(-1)
    padded = torch.cat([flat, flat[-1:].expand(-len(flat) % 256)]).reshape(-1, 256)
    low, high = padded.amin(1, keepdim=True), padded.amax(1, keepdim=True)
    top = (1 << bits) - 1
    expected = ((padded - low) / (high - low) * top).round() / top * (high - low) + low
    fmt = Codebook(1 << bits, bucket=256, shift=True, dtype=torch.float32)
    points = torch.arange(1 << bits) / top
    encoded = fmt.assign(weight, {"points": points, **fmt.fit_scales(weight)})
    expected = expected.reshape(-1)[: len(flat)].reshape(weight.shape)
    assert torch.allclose(encoded.decode(), expected, atol=1e-5)


def test_polino_sizes() -> None:
    # b N + 2 f N / k bits: ratios 14.2, 7.53 and 3.88 at buckets of 256 (the points apart).
    weight = normal(256, 256)
    for bits, ratio in ((2, 14.2), (4, 7.53), (8, 3.88)):
        encoded = Codebook(1 << bits, bucket=256, shift=True).encode(weight)
        spent = encoded.bits - encoded.params["points"].numel() * 16
        assert 32 * weight.numel() / spent == pytest.approx(ratio, abs=0.03)


def test_codebook_constant_buckets_are_exact() -> None:
    weight = torch.cat([torch.full((8,), 0.3), normal(8), torch.zeros(8)])
    decoded = Codebook(4, bucket=8, shift=True).encode(weight).decode()
    assert bool((decoded[:8] == torch.tensor(0.3)).all())
    assert bool((decoded[16:] == 0).all())


# --- Product --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e30])
def test_product_is_nearest_by_brute_force(dtype: torch.dtype, magnitude: float) -> None:
    weight = (normal(12, 10) * magnitude).to(dtype)
    if not bool(weight.isfinite().all()) or not bool(weight.any()):
        pytest.skip("beyond this type")
    encoded = Product(4, points=8, dtype=torch.float32).encode(weight)
    table = restore(encoded.params["centroids"], dtype).double()
    padded = torch.nn.functional.pad(weight.double(), (0, 2)).reshape(12, 3, 1, 4)
    square = (padded - table).square()
    square[:, 2, :, 2:] = 0  # the filling does not count
    distance = square.sum(-1)
    chosen = encoded.codes["indices"].values.long().unsqueeze(-1)
    found = distance.gather(-1, chosen).squeeze(-1)
    assert torch.allclose(found, distance.min(-1).values, rtol=1e-3)
    decoded = table[chosen.squeeze(-1)].reshape(12, 12)[:, :10]
    assert torch.equal(encoded.decode().double(), decoded)


def test_product_blocks_are_kernels_and_inputs() -> None:
    kernel = normal(5, 4, 3, 3)
    assert Product(9).grid((5, 4, 3, 3)) == (5, 4)
    assert torch.equal(Product(9).blocks(kernel)[7], kernel[1, 3].reshape(9))
    linear = normal(5, 12)
    assert torch.equal(Product(4).blocks(linear)[4], linear[1, 4:8])
    assert torch.equal(Product(4).blocks(normal(2, 5))[1, 1:], torch.zeros(3))


def test_product_with_few_distinct_blocks_is_exact() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
    encoded = Product(2).encode(weight)
    assert encoded.params["centroids"].shape == (2, 2)
    assert torch.equal(encoded.decode(), weight)
    assert encoded.bits == 3 + 4 * 16


def test_product_centroids_in_int8() -> None:
    fmt = Product(2, points=4, dtype=torch.int8)
    table = torch.tensor([[1.27, 0.0], [-1.27, 0.5]])
    encoded = fmt.assign(torch.tensor([[1.2, 0.1, -1.0, 0.4]]), {"centroids": table})
    assert encoded.params["scale"].item() == pytest.approx(0.01)
    assert encoded.codes["centroids"].values.tolist() == [[255, 128], [1, 178]]
    assert encoded.decode().tolist() == [pytest.approx([1.27, 0.0, -1.27, 0.5])]
    assert encoded.bits == 2 + 32 + 32


def test_product_finds_a_centroid_again_among_close_ones() -> None:
    # Squared distances of 1e-14 between lengths of 1000: float32 products alone cannot tell.
    table = torch.tensor([[1000.0, 1.0e-4], [1000.0, 1.001e-4], [1000.0, 0.999e-4], [0.0, 1e-30]])
    fmt = Product(2, points=4, dtype=torch.float32)
    encoded = fmt.assign(table, {"centroids": table})
    assert torch.equal(encoded.decode(), table)


def test_product_sizes_of_published_models() -> None:
    # Stock et al.: log2(K) / d bits per weight and K d float16 numbers.
    encoded = Product(8, points=256).encode(normal(256, 512))
    assert encoded.bits == 256 * 512 // 8 * 8 + 256 * 8 * 16
    assert math.log2(256) / 8 * 256 * 512 + 256 * 8 * 16 == encoded.bits
