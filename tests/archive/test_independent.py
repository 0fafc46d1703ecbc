"""The library and the decoder that was written from docs/FORMAT.md alone agree bit for bit."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.mutations import closed, edit_index, edit_payload, unpacked
from dither import Archive, ArchiveError
from dither.archive import pack
from dither.core import DTYPES, Encoded, Format, SpecError, dtype_name
from dither.encoders.gptq import GPTQ
from dither.formats import Affine, Codebook, Mixed, Product, Raw
from fixtures.make import BRANCHES, archives, branches, coded
from packages.python import dither_decode as independent
from tests.coding.samples import arrays

Restored = dict[str, tuple[str, tuple[int, ...], bytes]]

FLOATS = [DTYPES[name] for name in independent.FLOATING]
SCALES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = ("gaussian", "laplacian", "constant", "zero", "outliers", "rows", "columns", "levels")


def by_library(data: bytes) -> Restored:
    return {
        name: (
            dtype_name(tensor.dtype),
            tuple(tensor.shape),
            tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, tensor in Archive.from_bytes(data, max_nbytes=1 << 24).state_dict().items()
    }


def agree(*tensors: Encoded) -> None:
    data = pack({str(i): tensor for i, tensor in enumerate(tensors)}).to_bytes()
    assert independent.decode(data) == by_library(data)


def are_equal(a: tuple[str, tuple[int, ...], bytes], b: tuple[str, tuple[int, ...], bytes]) -> bool:
    """Whether two tensors are the same but for which NaN stands where one does."""
    if a == b or a[:2] != b[:2]:
        return a == b
    kind = {"complex64": "float32", "complex128": "float64"}.get(a[0], a[0])
    x, y = (independent.to_numbers(tensor[2], kind) for tensor in (a, b))
    return kind in independent.FLOATING and np.array_equal(x, y, equal_nan=True)


def weights(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=chance)
    if kind == "laplacian":
        weight *= torch.randn(shape, generator=chance).abs().sqrt()
    if kind == "constant":
        weight = torch.full(shape, 0.3)
    if kind == "zero":
        weight = torch.zeros(shape)
    if kind == "outliers":
        weight *= torch.where(torch.rand(shape, generator=chance) < 0.003, 100, 1)
    if kind == "levels":
        weight = (weight * 2).round()
    if kind in ("rows", "columns") and shape:
        axis = 0 if kind == "rows" else -1
        lengths = [1] * len(shape)
        lengths[axis] = shape[axis]
        weight *= torch.randn(lengths, generator=chance).exp()
    return weight


shapes = st.one_of(
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 2000)),
)
tensors = st.builds(weights, st.sampled_from(KINDS), shapes, st.integers(0, 1000))
groups = st.none() | st.integers(1, 70)
affine = st.builds(
    lambda bits, grid, by, scale: Affine(bits, grid=grid, scale_dtype=scale, **by),
    st.integers(1, 16),
    st.sampled_from(["symmetric", "asymmetric", "endpoint"]),
    st.one_of(
        st.just({}),
        st.integers(-2, 1).map(lambda axis: {"axis": axis}),
        st.integers(1, 70).map(lambda group: {"group": group}),
    ),
    st.sampled_from(SCALES),
)
codebook = st.builds(
    lambda points, bucket, shift, dtype, scale: Codebook(
        points, bucket, shift and bucket is not None, dtype, scale
    ),
    st.integers(2, 40),
    groups,
    st.booleans(),
    st.sampled_from(SCALES),
    st.sampled_from(SCALES),
)
product = st.builds(
    Product, st.integers(1, 10), st.integers(2, 12), st.sampled_from([*SCALES, torch.int8])
)
mixed = st.builds(Mixed, st.integers(1, 12), st.sampled_from(["endpoint", "symmetric"]))
raw = st.builds(Raw, st.none() | st.sampled_from(FLOATS))
formats: st.SearchStrategy[Format] = st.one_of(affine, codebook, product, mixed, raw)


@cache
def fresh() -> dict[str, bytes]:
    """The archives that the golden files were once, made by the library as it is now."""
    return archives()


def test_archives_that_take_every_branch() -> None:
    for data in fresh().values():
        assert independent.decode(data) == by_library(data)
    assert not BRANCHES.difference(*map(branches, fresh().values()))


@given(formats, tensors, st.sampled_from(FLOATS))
@settings(max_examples=200)
def test_formats(form: Format, weight: Tensor, dtype: torch.dtype) -> None:
    try:
        encoded = form.encode(weight.to(dtype))
    except SpecError:  # no such axis, a scale beyond its type, a number that does not fit
        return
    agree(encoded)


@given(tensors, st.data())
@settings(max_examples=50)
def test_mixed_widths(weight: Tensor, data: st.DataObject) -> None:
    form = data.draw(mixed)
    count = form.groups(tuple(weight.shape))
    widths = torch.randint(0, 17, (count,), generator=torch.Generator().manual_seed(count))
    agree(form.assign(weight, {"bits": widths}))


@given(tensors, st.floats(0.01, 2), st.sampled_from(FLOATS))
@settings(max_examples=100)
def test_grids_without_bounds(weight: Tensor, step: float, dtype: torch.dtype) -> None:
    agree(GPTQ(step).encode(weight.to(dtype)))


@given(arrays())
@settings(max_examples=200)
def test_codes(codes: tuple[NDArray[np.int64], int]) -> None:
    agree(coded(*codes))


@given(st.sampled_from(sorted(DTYPES)), tensors, st.sampled_from([1.0, 30.0, 1e6]))
@settings(max_examples=150)
def test_numbers(kind: str, weight: Tensor, scale: float) -> None:
    agree(Raw().encode((weight * scale).to(DTYPES[kind])))


@pytest.mark.parametrize("count", [40_000, 40_001, 50_001])
def test_lanes(count: int) -> None:
    codes = np.random.default_rng(count).normal(20, 5, count)
    agree(coded(np.rint(codes).clip(0, 40), 41))


def test_every_damage_is_refused() -> None:
    data = pack({"a": Affine(4).encode(weights("gaussian", (30, 40), 1))}).to_bytes()
    for at in range(len(data)):
        with pytest.raises(ValueError, match=r"."):
            independent.decode(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"."):
            independent.decode(data[:at])


@pytest.mark.parametrize("edit", [edit_index, edit_payload])
@pytest.mark.parametrize("name", ["formats", "numbers", "payloads", "factors"])
def test_both_refuse_the_same(name: str, edit: Callable[[bytes, random.Random], bytes]) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(60):
        data = edit(fresh()[name], random.Random(seed))
        try:
            expected = by_library(data)
        except ArchiveError:
            outcomes["refused"] += 1
            with pytest.raises(ValueError, match=r"."):
                independent.decode(data)
        else:
            outcomes["read"] += 1
            found = independent.decode(data)
            assert found.keys() == expected.keys()
            assert all(are_equal(found[tensor], expected[tensor]) for tensor in found)
    assert outcomes["refused"] > 10
    assert outcomes["read"] > 0


def _texts(index: dict[str, Any]) -> dict[str, bytes]:
    """Indexes that a reader must refuse, all but the first."""
    text = json.dumps(index)
    extra = {**index, "parts": {**index["parts"], "crc": [*index["parts"]["crc"], None]}}
    return {
        "as it is": text.encode(),
        "UTF-16": text.encode("utf-16"),
        "UTF-32": text.encode("utf-32-le"),
        "a byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "Latin-1": text.replace("grid", "gr\xefd").encode("latin-1"),
        "version 1.0": text.replace('"version": 1', '"version": 1.0').encode(),
        "version true": text.replace('"version": 1', '"version": true').encode(),
        "a checksum of nothing": json.dumps(extra).encode(),
    }


@pytest.mark.parametrize(
    "what",
    [
        "UTF-16",
        "UTF-32",
        "a byte order mark",
        "Latin-1",
        "version 1.0",
        "version true",
        "a checksum of nothing",
    ],
)
def test_both_refuse_an_index_that_is_not_as_the_page_says(what: str) -> None:
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    payloads, index = unpacked(pack({"grid": Affine(4).encode(weight)}).to_bytes())
    texts = _texts(index)
    assert by_library(closed(payloads, texts["as it is"])).keys() == {"grid"}
    data = closed(payloads, texts[what])
    with pytest.raises(ArchiveError):
        by_library(data)
    with pytest.raises(ValueError, match=r"."):
        independent.decode(data)
