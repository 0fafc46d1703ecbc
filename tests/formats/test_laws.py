"""Every format obeys the laws, on drawn weights and on awkward ones."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.archive import Archive, pack
from dither.core import Encoded, Format, SpecError
from dither.formats import FORMATS, Affine, Codebook, Factors, Mixed, Product, Raw, Trellis
from dither.testing import (
    awkward_weights,
    check_format,
    check_idempotent,
    check_round_trip,
    check_size,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FLOAT8S = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (torch.float32, torch.float16, torch.bfloat16)
OVERHEAD = 700
"""Bytes of a file with one tensor over its payloads: the index, with up to 18 parts."""

FORMATS_TO_TEST = [
    Raw(),
    Raw(torch.float16),
    Raw(torch.bfloat16),
    Affine(),
    Affine(1),
    Affine(2, axis=0),
    Affine(4, group=8),
    Affine(3, grid="asymmetric", axis=-1, scale_dtype=torch.float16),
    Affine(1, grid="asymmetric"),
    Affine(16, group=5, scale_dtype=torch.bfloat16),
    Affine(4, grid="endpoint"),
    Affine(1, grid="endpoint", group=3),
    Affine(16, grid="endpoint", axis=0),
    Affine(None),
    Affine(None, group=7, scale_dtype=torch.bfloat16),
    Codebook(2),
    Codebook(16, dtype=torch.float32),
    Codebook(300, dtype=torch.bfloat16),
    Codebook(16, bucket=8, shift=True),
    Codebook(1000, bucket=5, dtype=torch.float32, scale_dtype=torch.float16),
    Product(4, points=16),
    Product(3, points=8, dtype=torch.float32),
    Product(9, points=16, dtype=torch.int8),
    Product(2, points=300, dtype=torch.bfloat16),
    Mixed(),
    Mixed(3, grid="symmetric"),
    Trellis(),
    Trellis(4, axis=0),
    Trellis(16, scale_dtype=torch.bfloat16),
    Trellis(64, axis=-1, scale_dtype=torch.float16),
    Trellis(256),
    Factors(),
    Factors(axis=0),
    Factors(scale_dtype=torch.bfloat16),
    Factors(axis=0, scale_dtype=torch.float16),
]
OF_FLOATS = [Affine(4, group=3), Codebook(4), Product(2, 4), Mixed(), Trellis(), Factors()]


def test_every_format_is_in_the_lists() -> None:
    assert {type(fmt) for fmt in FORMATS_TO_TEST} == set(FORMATS.values())
    assert {Raw, *map(type, OF_FLOATS)} == set(FORMATS.values())


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """A weight of any floating type, up to four axes, from denormal to huge, smooth or spiky."""
    dtype = draw(st.sampled_from(FLOATS))
    shape = draw(st.lists(st.integers(0, 7), max_size=4))
    seed = draw(st.integers(0, 1 << 30))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    kind = draw(st.sampled_from(["normal", "coarse", "spiky", "offset", "constant"]))
    if kind == "coarse":
        values = values.round(decimals=1)
    elif kind == "spiky":
        values = values * torch.randn(shape, dtype=torch.float64, generator=generator).exp() ** 6
    elif kind == "offset":
        values = values * 10.0 ** draw(st.integers(-9, 0)) + 1
    elif kind == "constant":
        values = torch.full_like(values, values.mean().nan_to_num().item())
    values = values * 10.0 ** draw(st.integers(-45, 38))
    weight = values.to(dtype)
    assume(bool(weight.isfinite().all() & weight.float().isfinite().all()))
    return weight


def round_trip(encoded: Encoded) -> Encoded:
    """Through the library's own file, which keeps to the size that law 3 allows."""
    archive = pack({"weight": encoded})
    check_size(encoded, sum(part.length for part in archive.entries["weight"].parts), 8)
    check_size(encoded, archive.nbytes, OVERHEAD)
    return Archive.from_bytes(archive.to_bytes()).encoded("weight")


def may_refuse(weight: Tensor, error: SpecError) -> bool:
    """Whether an encoder may refuse a weight so: it must say what to do.

    What its parameters' types cannot hold, and a tensor that has not the axis of its scales.
    """
    no_axis = weight.ndim < 2 and "does not exist" in str(error)
    return "use " in str(error) and (no_axis or bool(weight.double().abs().max() > 6e4))


def check_or_refuse(fmt: Format, weight: Tensor) -> None:
    try:
        check_format(fmt, weight, round_trip)
    except SpecError as error:
        if not may_refuse(weight, error):
            raise


@pytest.mark.parametrize("fmt", FORMATS_TO_TEST, ids=repr)
@settings(max_examples=60)
@given(weight=weights())
def test_laws_on_drawn_weights(fmt: Format, weight: Tensor) -> None:
    check_or_refuse(fmt, weight)


@pytest.mark.parametrize("dtype", [*FLOATS, *FLOAT8S])
@pytest.mark.parametrize("fmt", FORMATS_TO_TEST, ids=repr)
def test_laws_on_awkward_weights(fmt: Format, dtype: torch.dtype) -> None:
    for weight in awkward_weights(dtype).values():
        check_or_refuse(fmt, weight)


@settings(max_examples=300)
@given(
    weight=weights(),
    bits=st.one_of(st.none(), st.integers(1, 16)),
    grid=st.sampled_from(["symmetric", "asymmetric", "endpoint"]),
    exponent=st.integers(-44, 2),
    scale_dtype=st.sampled_from(SCALES),
    seed=st.integers(0, 1 << 30),
)
def test_affine_with_any_parameters(
    weight: Tensor, bits: int | None, grid: str, exponent: int, scale_dtype: torch.dtype, seed: int
) -> None:
    # Scales far too small or large, denormal, negative and 0; zeros and offsets anywhere.
    fmt = Affine(bits, group=4, grid=grid if bits else "symmetric", scale_dtype=scale_dtype)
    generator = torch.Generator().manual_seed(seed)
    shape = (fmt.grouping(tuple(weight.shape)).count,)
    scale = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0**exponent
    scale[::5] = 0
    params = {
        "scale": scale,
        "zero": torch.randint(0, 1 << (bits or 1), shape, generator=generator),
        "offset": torch.randn(shape, generator=generator),
    }
    try:
        encoded = fmt.assign(weight, params)
    except SpecError as error:
        if bits is not None or "larger step" not in str(error):
            raise
        return
    check_idempotent(encoded, params)
    check_idempotent(encoded)


@settings(max_examples=100)
@given(weight=weights(), data=st.data(), grid=st.sampled_from(["endpoint", "symmetric"]))
def test_mixed_with_any_widths(weight: Tensor, data: st.DataObject, grid: str) -> None:
    fmt = Mixed(3, grid)
    count = fmt.groups(tuple(weight.shape))
    widths = data.draw(st.lists(st.integers(0, 16), min_size=count, max_size=count))
    encoded = fmt.assign(weight, {"bits": torch.tensor(widths, dtype=torch.int64)})
    check_round_trip(encoded, round_trip)
    assert encoded.codes["bits"].values.tolist() == widths
    check_idempotent(encoded)


@pytest.mark.parametrize("fmt", OF_FLOATS, ids=repr)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e300])
def test_weights_that_are_not_finite_are_refused(fmt: Format, value: float) -> None:
    weight = torch.ones(4, 6, dtype=torch.float64)
    weight[2, 3] = value
    with pytest.raises(SpecError, match=r"Raw\(\)|dtype=torch.float32"):
        fmt.encode(weight)
    with pytest.raises(SpecError, match=r"Raw\(\)"):  # with parameters that are finite, too
        fmt.assign(weight, fmt.fit(torch.rand(4, 6)) | {"bits": torch.full((3,), 4)})


@pytest.mark.parametrize("fmt", OF_FLOATS, ids=repr)
def test_integers_are_refused_by_float_formats(fmt: Format) -> None:
    with pytest.raises(SpecError, match="Raw"):
        fmt.encode(torch.arange(4))


def test_encoding_does_not_keep_the_weights_memory() -> None:
    for kind in (Raw(), *OF_FLOATS):
        weight = torch.randn(4, 6, requires_grad=True)
        encoded = kind.encode(weight)
        before = encoded.decode()
        with torch.no_grad():
            weight.zero_()
        assert torch.equal(encoded.decode(), before)
        assert not before.requires_grad


def test_names_are_permanent() -> None:
    assert {name: kind.__name__ for name, kind in FORMATS.items()} == {
        "raw": "Raw",
        "affine": "Affine",
        "codebook": "Codebook",
        "product": "Product",
        "mixed": "Mixed",
        "trellis": "Trellis",
        "factors": "Factors",
    }
    assert {kind.version for kind in FORMATS.values()} == {1}
