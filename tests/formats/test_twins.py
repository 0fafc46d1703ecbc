"""What compiled loops decode to is what plain code does, bit for bit."""

import mmap
import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dither import compiled
from dither.core import Encoded, Format
from dither.formats import Affine, Factors
from dither.formats.affine_twin import GRID
from dither.formats.factors_twin import PRODUCT
from dither.formats.memory import new_tensor

KINDS = [(1, "symmetric"), (4, "symmetric"), (None, "symmetric"), (5, "asymmetric")]
SHARED = [(None, None), (0, None), (1, None), (None, 40), (None, 8)]
GRIDS = [
    Affine(bits, grid=grid, axis=axis, group=group)
    for bits, grid in [*KINDS, (3, "endpoint"), (9, "endpoint")]
    for axis, group in SHARED
]
SHAPES = [(6, 5, 3, 40), (30, 95), (1, 200), (64,), (3, 0), (0, 3)]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CPU = torch.device("cpu")


@pytest.fixture(params=["interpreted", "compiled"], autouse=True, scope="module")
def twins(request: pytest.FixtureRequest) -> Iterator[None]:
    """Twins as numba compiles them, and as the plain functions that they are, numba or not."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "compiled":
            pytest.importorskip("numba")
        else:
            patch.setattr(compiled.Twin, "_call", property(lambda self: self.function))
            patch.setattr(compiled.Twin, "_prepared", lambda self: True)
            patch.setattr(compiled, "_load", lambda: True)
            patch.setattr(compiled, "find_spec", lambda name: True)
        yield


def decoded(encoded: Encoded, mode: str) -> Tensor:
    """What an encoding decodes to, with its bits as integers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITHER_COMPILED", mode)
        value = encoded.decode()
    return value.contiguous().view(torch.uint8) if value.numel() else value


def same(encoded: Encoded) -> None:
    assert torch.equal(decoded(encoded, "always"), decoded(encoded, "never"))


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("fmt", GRIDS, ids=repr)
def test_grids(fmt: Format) -> None:
    for shape in SHAPES:
        if len(shape) > 1 or getattr(fmt, "axis", None) != 1:
            for dtype in DTYPES:
                same(fmt.encode(draw(shape, dtype)))


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("most", [3, 40, 2000, 40_000])
def test_products(axis: int | None, most: int) -> None:
    """Sums of 16 bits and longer ones, rows of zeros, few codes and many, all types of codes."""
    generator = torch.Generator().manual_seed(most)
    for rows, rank, columns in [(50, 7, 9), (3, 1, 40), (9, 9, 9), (40, 4, 4), (5, 0, 8)]:
        right = torch.randint(-most, most + 1, (rank, columns), generator=generator)
        left = torch.randint(-most, most + 1, (rows, rank), generator=generator)
        left[torch.rand(rows, rank, generator=generator) < 0.5] = 0
        left[::5] = 0
        scale = torch.rand(1 if axis is None else rows, generator=generator) - 0.5
        for dtype in DTYPES:
            fmt = Factors(axis=axis)
            same(fmt.encoded(left.int(), right.int(), (rows, columns), dtype, scale))


def test_products_that_are_cut_into_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dither.formats.factors._BOX", 60)
    left, right = draw((70, 6)).mul(3).int(), draw((6, 21)).mul(9).int()
    same(Factors(axis=0).encoded(left, right, (70, 21), torch.float32, draw((70,))))


def test_loops_were_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITHER_COMPILED", "always")
    assert PRODUCT.chosen(0.0) is not None
    assert GRID.chosen(0.0) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_memory_of_large_tensors(dtype: torch.dtype) -> None:
    """It is writable, aligned, of the shape and type that are asked for, and free again."""
    for shape in [(1100, 1031), (3, 1 << 21), (5,), (0, 4), ()]:
        found = new_tensor(shape, dtype, CPU)
        assert (tuple(found.shape), found.dtype, found.device) == (shape, dtype, CPU)
        assert found.is_contiguous()
        assert found.data_ptr() % 64 == 0
        found.fill_(3)
        assert bool((found == 3).all())
        assert torch.equal(found.clone(), found)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="large pages are Linux's")
def test_memory_is_private_to_a_process_and_there_without_large_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = new_tensor((1 << 20,), torch.float32, CPU).fill_(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of torch: it computes nothing
        child = os.fork()
    if not child:
        found.fill_(2)
        os._exit(0)
    os.waitpid(child, 0)
    assert bool((found == 1).all())

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no such pages")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert new_tensor((1 << 20,), torch.float32, CPU).fill_(1).sum() == 1 << 20
