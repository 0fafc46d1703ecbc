"""Decoding a box at a time gives what decoding at once does, wherever boxes end."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dither.archive import Archive, pack
from dither.coding import byte_planes, payload
from dither.core import Codes, Encoded
from dither.encoders.gptq import GPTQ
from dither.formats import (
    Affine,
    Codebook,
    Factors,
    Mixed,
    Product,
    Raw,
    Trellis,
    codebook,
    factors,
    grouping,
    mixed,
    product,
    trellis,
)
from dither.formats.parity_machine import POLYNOMIALS, last_steps, quantizers

SHAPES = [(7, 23), (1, 40), (40, 1), (29,), (), (5, 3, 2, 2), (0, 4), (4, 0)]


def _weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _shrink(patch: pytest.MonkeyPatch) -> None:
    for room in (trellis, mixed, codebook, grouping):
        patch.setattr(room, "CHUNK", 12)
    patch.setattr(trellis, "_ACROSS", 3)
    patch.setattr(factors, "_BOX", 16)
    patch.setattr(product, "chunks", lambda shape: grouping.chunks(shape, 5))
    for room in (payload, byte_planes):
        patch.setattr(room, "CHUNK", 8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize(
    "encode",
    [
        lambda w: Trellis(4).encode(w),
        lambda w: Trellis(256, axis=-1 if w.ndim else None).encode(w),
        lambda w: Trellis(8, axis=0 if w.ndim else None).encode(w),
        lambda w: Product(4, 6).encode(w),
        lambda w: Product(7, 6, torch.int8).encode(w),
        lambda w: Mixed(3).encode(w),
        lambda w: Mixed(17, "symmetric").encode(w),
        lambda w: Codebook(6, bucket=5, shift=True, scale_dtype=torch.float16).encode(w),
        lambda w: Affine(3, group=5, grid="asymmetric").encode(w),
    ],
)
def test_formats(
    encode: Callable[[torch.Tensor], Encoded],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded = encode(_weight(*shape).to(dtype))
    whole = encoded.decode()
    _shrink(monkeypatch)
    boxes = encoded.decode()
    assert (boxes.shape, boxes.dtype) == (whole.shape, whole.dtype)
    assert boxes.tolist() == whole.tolist()


@pytest.mark.parametrize("rank", [0, 1, 5, 9])
@pytest.mark.parametrize("axis", [None, 0])
def test_factors(rank: int, axis: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.Generator().manual_seed(rank)
    left, right = (torch.randint(0, 9, n, generator=noise) for n in ((9, rank), (rank, 31)))
    zero = Codes(torch.tensor([4, 3]), 1 << 24)
    encoded = Encoded(
        Factors(axis),
        (9, 31),
        torch.float32,
        {"left": Codes(left, 9), "right": Codes(right, 9), "zero": zero},
        {"scale": _weight(1 if axis is None else 9)},
    )
    whole = encoded.decode()
    assert torch.equal(whole, ((left - 4) @ (right - 3)).float() * encoded.params["scale"][:, None])
    _shrink(monkeypatch)
    assert torch.equal(encoded.decode(), whole)


@pytest.mark.parametrize(
    "encoded",
    [
        GPTQ(0.1).encode(_weight(30, 20) ** 5),
        GPTQ(0.001).encode(_weight(30, 20)),
        GPTQ(0.2).encode(_weight(40, 30) * torch.linspace(0.1, 3, 40)[:, None]),
        Raw().encode(_weight(600)),
        Raw().encode(torch.ones(100, dtype=torch.complex128)),
    ],
)
def test_payloads(encoded: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pack({"t": encoded}).to_bytes()
    _shrink(monkeypatch)
    assert torch.equal(Archive.from_bytes(data)["t"], encoded.decode())


@given(st.data(), st.sampled_from(sorted(POLYNOMIALS)))
def test_a_machine_goes_on_where_it_was(data: st.DataObject, states: int) -> None:
    bits = data.draw(st.lists(st.integers(0, 1), max_size=60))
    parities = torch.tensor(bits, dtype=torch.uint8).reshape(-1, 1)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(bits)), max_size=6)))
    pieces, before = [], None
    for begin, end in zip([0, *cuts], [*cuts, len(bits)], strict=True):
        part = parities[begin:end]
        pieces.append(quantizers(part, states, before))
        before = last_steps(pieces[-1], part, before)
    assert torch.cat(pieces).tolist() == quantizers(parities, states).tolist()
