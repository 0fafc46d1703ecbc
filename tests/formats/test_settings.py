"""Settings that make no sense are refused with a sentence; JSON is read strictly."""

from typing import Any

import pytest
import torch

from dither.core import Codes, Encoded, Format, SpecError
from dither.formats import Affine, Codebook, Mixed, Product, Raw, format_from_json, format_to_json


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Affine, {"bits": 0}),
        (Affine, {"bits": 17}),
        (Affine, {"bits": 4.0}),
        (Affine, {"bits": True}),
        (Affine, {"bits": "8"}),
        (Affine, {"grid": "log"}),
        (Affine, {"grid": ["symmetric"]}),
        (Affine, {"bits": None, "grid": "endpoint"}),
        (Affine, {"axis": 0, "group": 4}),
        (Affine, {"axis": 0.5}),
        (Affine, {"group": 0}),
        (Affine, {"scale_dtype": torch.float64}),
        (Affine, {"scale_dtype": "float32"}),
        (Codebook, {"points": 1}),
        (Codebook, {"points": 65537}),
        (Codebook, {"points": 4, "shift": True}),
        (Codebook, {"points": 4, "bucket": 8, "shift": 1}),
        (Codebook, {"points": 4, "bucket": 0}),
        (Codebook, {"points": 4, "dtype": torch.int8}),
        (Product, {"block": 0}),
        (Product, {"block": 4, "points": 1}),
        (Product, {"block": 4, "dtype": torch.float64}),
        (Mixed, {"group": 0}),
        (Mixed, {"grid": "asymmetric"}),
        (Raw, {"dtype": "float16"}),
        (Raw, {"dtype": torch.complex32}),
    ],
)
def test_bad_settings(kind: type[Format], values: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        kind(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"version": 1},
        {"format": "sparse", "version": 1},
        {"format": ["affine"], "version": 1},
        {"format": "affine"},
        {"format": "affine", "version": 2},
        {"format": "affine", "version": True},
        {"format": "affine", "version": 1, "colour": 3},
        {"format": "affine", "version": 1, "scale_dtype": "float99"},
        {"format": "raw", "version": 1, "dtype": 5},
        {"format": "product", "version": 1},
    ],
)
def test_bad_json(values: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        format_from_json(values)


def test_json_has_only_what_is_not_the_default() -> None:
    assert format_to_json(Affine()) == {"format": "affine", "version": 1}
    assert format_to_json(Product(8, dtype=torch.int8)) == {
        "format": "product",
        "version": 1,
        "block": 8,
        "dtype": "int8",
    }
    assert format_to_json(Affine(None))["bits"] is None


def swap(encoded: Encoded, **parts: Any) -> None:
    """The same tensor with parts replaced or, where None, left out."""
    codes = {n: parts.get(n, p) for n, p in encoded.codes.items() if parts.get(n, p) is not None}
    params = {n: parts.get(n, p) for n, p in encoded.params.items() if parts.get(n, p) is not None}
    Encoded(encoded.format, parts.get("shape", encoded.shape), encoded.dtype, codes, params)


def codes(shape: tuple[int, ...], alphabet: int) -> Codes:
    return Codes(torch.zeros(shape, dtype=torch.int32), alphabet)


@pytest.mark.parametrize(
    ("fmt", "parts"),
    [
        (Raw(), {"shape": (6, 4)}),
        (Raw(), {"values": torch.zeros(4, 6, dtype=torch.float16)}),
        (Affine(4, axis=0), {"shape": (6, 4)}),
        (Affine(4, axis=0), {"scale": torch.zeros(5)}),
        (Affine(4, axis=0), {"scale": torch.zeros(4, dtype=torch.float16)}),
        (Affine(4, axis=1), {"shape": (24,), "levels": codes((24,), 16)}),
        (Affine(4), {"levels": codes((4, 6), 17)}),
        (Affine(4), {"levels": None}),
        (Affine(4, grid="asymmetric"), {"zero": codes((2,), 16)}),
        (Affine(None), {"zero": codes((1,), 16)}),
        (Codebook(4), {"points": torch.zeros(5, dtype=torch.float16)}),
        (Codebook(4), {"points": torch.zeros(2, 2, dtype=torch.float16)}),
        (Codebook(4), {"points": torch.zeros(0, dtype=torch.float16)}),
        (Codebook(4, bucket=8), {"scale": torch.zeros(4)}),
        (Product(4, 3), {"centroids": torch.zeros(4, 4, dtype=torch.float16)}),
        (Product(4, 3), {"centroids": torch.zeros((), dtype=torch.float16)}),
        (Product(4, 3), {"indices": codes((4, 3), 3)}),
        (Product(4, 3, torch.int8), {"centroids": codes((3, 4), 255)}),
        (Mixed(), {"bits": codes((4,), 17)}),
        (Mixed(), {"bits": codes((3,), 17)}),
        (Mixed(), {"levels8": codes((23,), 256)}),
        (Mixed(), {"low": torch.zeros(2)}),
    ],
)
def test_parts_that_do_not_fit_are_refused(fmt: Format, parts: dict[str, Any]) -> None:
    encoded = fmt.encode(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(SpecError):
        swap(encoded, **parts)


@pytest.mark.parametrize(
    ("fmt", "params"),
    [
        (Affine(4), {}),
        (Affine(4), {"scale": torch.ones(2)}),
        (Affine(4), {"scale": torch.tensor([torch.nan])}),
        (Affine(4, scale_dtype=torch.float16), {"scale": torch.tensor([1e6])}),
        (Affine(4, grid="endpoint"), {"scale": torch.ones(1)}),
        (Affine(None), {"scale": torch.tensor([1e-9])}),
        (Affine(4, axis=2), {"scale": torch.ones(6)}),
        (Codebook(4), {"points": torch.arange(5.0)}),
        (Codebook(4), {"points": torch.tensor([1e6])}),
        (Codebook(4, bucket=8), {"points": torch.ones(1), "scale": -torch.ones(3)}),
        (Product(4, 3), {"centroids": torch.ones(4, 4)}),
        (Product(4, 3), {"centroids": torch.full((2, 4), torch.nan)}),
        (Product(4, 3, torch.int8), {"centroids": torch.full((2, 4), torch.nan)}),
        (Mixed(), {}),
        (Mixed(), {"bits": torch.tensor([4, 17, 4])}),
        (Mixed(), {"bits": torch.tensor([4, 4])}),
        (Mixed(), {"bits": torch.ones(3), "low": torch.tensor(torch.nan), "high": torch.ones(1)}),
    ],
)
def test_parameters_that_do_not_fit_are_refused(fmt: Format, params: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        fmt.assign(torch.randn(4, 6), params)


def test_an_unbounded_grid_names_the_step() -> None:
    with pytest.raises(SpecError, match=r"1e-09.*larger step"):
        Affine(None).assign(torch.ones(3), {"scale": torch.tensor([1e-9])})


def test_affine_says_what_overflows() -> None:
    with pytest.raises(SpecError, match=r"does not fit torch.float16.*scale_dtype=torch.float32"):
        Affine(2, scale_dtype=torch.float16).encode(torch.tensor([1e6]))
    with pytest.raises(SpecError, match=r"does not fit torch\.float16"):
        Affine(8, grid="endpoint", scale_dtype=torch.float16).encode(torch.tensor([1e6, 1e6]))
