"""Compiled twins compute what plain code computes: bytes, codes, and what they refuse."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dither import compiled
from dither.coding import (
    CodingError,
    decode_codes,
    encode_codes,
    histograms,
    lanes_twin,
    part_plan,
)
from dither.coding.bits import pack_bits, packed_nbytes, unpack_bits
from dither.coding.codes import checked
from dither.coding.contexts import Contexts
from dither.coding.histograms import histogram, joint_counts
from dither.coding.payload import Window
from dither.compiled import Twin
from tests.coding import test_hostile as hostile
from tests.coding.samples import KINDS, Codes, arrays, sample
from tests.coding.test_golden import PAYLOADS
from tests.coding.test_parity_contexts import POLYNOMIALS, SHAPES, steered

pytestmark = pytest.mark.usefixtures("twins")


@pytest.fixture(params=["interpreted", "compiled"], scope="module")
def twins(request: pytest.FixtureRequest) -> str:
    """Twins as numba compiles them, and as the plain functions that they are, numba or not."""
    if request.param == "compiled":
        pytest.importorskip("numba")
    return str(request.param)


T = TypeVar("T")


def outcome(action: Callable[[], T]) -> T | str:
    try:
        return action()
    except CodingError as error:
        return str(error)


def same(action: Callable[[], T], twins: str) -> T:
    """What an action does, the same with twins and without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITHER_COMPILED", "never")
        plain = outcome(action)
        patch.setenv("DITHER_COMPILED", "always")
        if twins == "interpreted":
            patch.setattr(Twin, "chosen", lambda self, seconds: self.function)
        with np.errstate(over="ignore"):  # numbers of a stated width wrap
            found = outcome(action)
    if isinstance(plain, np.ndarray) and isinstance(found, np.ndarray):
        assert plain.dtype == found.dtype
        assert np.array_equal(plain, found)
    else:
        assert plain == found
    return cast("T", found)  # or the text of an error, which both gave


def test_twins_are_compiled_where_numba_is(twins: str) -> None:
    codes = sample("peaked", (3000,), 40, 0)
    same(lambda: encode_codes(codes, 40), twins)
    if twins == "compiled":
        assert lanes_twin.ENCODE._compiled is not None


@given(arrays())
@settings(deadline=None, max_examples=60)
def test_codes(twins: str, drawn: tuple[Codes, int]) -> None:
    codes, alphabet = drawn
    if twins == "interpreted" and codes.size > 1000:
        codes = codes[:5]
    codec, payload = same(lambda: encode_codes(codes, alphabet), twins)
    found = same(lambda: decode_codes(codec, payload, codes.shape, alphabet), twins)
    assert np.array_equal(found, codes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alphabet", [2, 300])
def test_long_streams_are_decoded_in_several_calls(
    twins: str, alphabet: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if twins == "interpreted":
        pytest.skip("slow without numba")
    monkeypatch.setattr(lanes_twin, "_CALL", 4096)
    for shape in ((45_000,), (230, 200)):
        codes = sample(kind, shape, alphabet, 0)
        codec, payload = same(partial(encode_codes, codes, alphabet), twins)
        assert np.array_equal(
            same(partial(decode_codes, codec, payload, shape, alphabet), twins), codes
        )
        for cut in (payload[:-2], payload[: len(payload) // 2]):
            same(partial(decode_codes, codec, cut, shape, alphabet), twins)


@pytest.mark.parametrize("alphabet", [2, 16, 256, 257, 4097, 60_000, 1 << 24])
@pytest.mark.parametrize("shape", [(45_000,), (230, 200)])
def test_lanes(twins: str, shape: tuple[int, ...], alphabet: int) -> None:
    if twins == "interpreted":
        pytest.skip("slow without numba; small parts are tried in the same loops")
    for kind in KINDS:
        codes = sample(kind, shape, alphabet, 0)
        codec, payload = same(partial(encode_codes, codes, alphabet), twins)
        found = same(partial(decode_codes, codec, payload, shape, alphabet), twins)
        assert np.array_equal(found, codes)


@pytest.mark.parametrize("shape", SHAPES)
def test_machines(twins: str, shape: tuple[int, ...]) -> None:
    if twins == "interpreted" and np.prod(shape) > 1000:
        pytest.skip("slow without numba")
    codes, alphabet = steered(shape, 2.0)
    codec, payload = same(lambda: encode_codes(codes, alphabet, POLYNOMIALS), twins)
    found = same(lambda: decode_codes(codec, payload, shape, alphabet), twins)
    assert np.array_equal(found, codes)
    for end in range(1, len(payload), max(len(payload) // 40, 1)):
        same(partial(decode_codes, codec, payload[:end], shape, alphabet), twins)


@pytest.mark.parametrize("name", hostile.PARTS)
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_damage(twins: str, name: str, data: st.DataObject) -> None:
    codec, payload, codes = hostile.CODED[name]
    if twins == "interpreted" and codes.size > 1000:
        return
    alphabet = hostile.ALPHABETS.get(name, int(codes.max()) + 1)
    damaged = bytearray(payload)
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(payload) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    end = data.draw(st.none() | st.integers(0, len(payload) - 1))
    more = data.draw(st.binary(max_size=3))
    piece = bytes(damaged[:end]) + more
    same(lambda: decode_codes(codec, piece, codes.shape, alphabet), twins)


@pytest.mark.parametrize("name", PAYLOADS)
def test_golden_payloads(twins: str, name: str) -> None:
    codec, shape, alphabet, _, payload = PAYLOADS[name]
    same(lambda: decode_codes(codec, bytes.fromhex(payload), shape, alphabet), twins)


@given(width=st.integers(0, 24), count=st.integers(0, 40), seed=st.integers(0, 99))
@settings(deadline=None)
def test_bits(twins: str, width: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = checked(rng.integers(0, 1 << width, count), 1 << width)
    payload = same(lambda: pack_bits(values[::1], width), twins)
    assert np.array_equal(same(lambda: unpack_bits(payload, count, width), twins), values)
    if payload:
        filled = payload[:-1] + b"\xff"
        same(lambda: unpack_bits(filled, count, width), twins)
        noise = rng.bytes(packed_nbytes(count, width))
        same(lambda: unpack_bits(noise, count, width), twins)


@pytest.mark.parametrize("values", [np.arange(90)[::3], np.arange(40).reshape(5, 8).T])
def test_bits_of_views(twins: str, values: Codes) -> None:
    same(lambda: pack_bits(values, 7), twins)


@pytest.mark.parametrize("count", [0, 7, 8, 1001])
def test_counts(twins: str, count: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, count).astype(np.uint8)
    patch = pytest.MonkeyPatch()
    patch.setattr(histograms, "COUNTED", -1)
    same(lambda: histogram(values, 256), twins)
    patch.undo()


@pytest.mark.parametrize("stride", [1, 3, 700])
@pytest.mark.parametrize("alphabet", [2, 200, 60_000])
def test_counts_by_context(twins: str, stride: int, alphabet: int) -> None:
    tokens, _ = part_plan.split(
        checked(sample("rows", (20, 31), alphabet, 0).reshape(-1), alphabet),
        Window(0, 0, alphabet, 0),
    )
    contexts = Contexts({0: np.arange(20, dtype=np.uint8) % 4}, 1, 3).of((20, 31))
    for which, kinds in ((contexts, 3), (contexts.astype(np.uint32) * 300, 601)):
        found = same(partial(joint_counts, which, tokens, kinds, alphabet, stride), twins)
        assert found.sum() == len(tokens[::stride])


def test_a_symbol_of_no_table_is_no_place_in_memory(twins: str) -> None:
    codes = np.array([0, 1, 2, 200] * 20, np.uint8)
    frequency, start = np.array([86, 85, 85]), np.array([0, 86, 171])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITHER_COMPILED", "always")
        if twins == "interpreted":
            patch.setattr(Twin, "chosen", lambda self, seconds: self.function)
        with pytest.raises(IndexError, match="of no table"):
            lanes_twin.encoded(codes, None, (frequency, start, 3), np.full(1, 1 << 16, "u4"), 8)


def test_what_is_small_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_Ledger", type("_Ledger", (compiled._Ledger,), {"numba": None}))
    monkeypatch.setattr(compiled._Ledger, "seconds", 0.0)
    monkeypatch.setenv("DITHER_COMPILED", "auto")
    for twin in (lanes_twin.ENCODE, lanes_twin.DECODE):
        monkeypatch.setattr(twin, "_compiled", None)
        monkeypatch.setattr(twin, "_owed", 0.0)
    codes = sample("peaked", (45_000,), 16, 1)
    assert np.array_equal(decode_codes(*encode_codes(codes, 16), codes.shape, 16), codes)
    assert compiled._Ledger.numba is None
    assert compiled._Ledger.seconds > 0


def test_what_goes_on_is_compiled_in_time(twins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if twins == "interpreted":
        pytest.skip("numba decides")
    monkeypatch.setenv("DITHER_COMPILED", "auto")
    twin = Twin(lanes_twin.count_loop)
    assert twin.chosen(compiled.FIRST / 2) is None
    assert twin.chosen(compiled.LOADING) is not None
    assert twin.chosen(0.0) is not None
    monkeypatch.setenv("DITHER_COMPILED", "never")
    assert twin.chosen(99.0) is None


def test_what_is_known_to_be_much_is_compiled_from_the_start(
    twins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if twins == "interpreted":
        pytest.skip("numba decides")
    blank = {"numba": None, "missing": False, "seconds": 0.0}
    monkeypatch.setattr(compiled, "_Ledger", type("_Ledger", (), blank))
    monkeypatch.setenv("DITHER_COMPILED", "auto")
    twin = Twin(lanes_twin.count_loop)
    compiled.expect(compiled.LOADING / 2)
    assert twin.chosen(compiled.FIRST) is None
    compiled.expect(compiled.LOADING)
    assert twin.chosen(compiled.FIRST) is not None


@pytest.mark.parametrize("how", ["not there", "does not load"])
def test_without_numba_plain_code_runs(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blank = {"numba": None, "missing": False, "seconds": 0.0}
    monkeypatch.setattr(compiled, "_Ledger", type("_Ledger", (), blank))
    monkeypatch.setenv("DITHER_COMPILED", "always")
    if how == "not there":
        monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    else:

        def broken(name: str) -> None:
            raise ImportError("Numba needs NumPy 1.0 or less")

        monkeypatch.setattr(compiled.importlib, "import_module", broken)  # type: ignore[attr-defined]
        monkeypatch.setattr(compiled, "find_spec", lambda name: object())
    twin = Twin(lanes_twin.count_loop)
    assert twin.chosen(99.0) is None
    assert twin.chosen(99.0) is None


def test_where_nothing_can_be_kept_it_is_compiled_all_the_same(
    twins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if twins == "interpreted":
        pytest.skip("numba keeps it")
    from numba.core import caching

    monkeypatch.setattr(caching.FunctionCache._impl_class, "_locator_classes", [])
    monkeypatch.setenv("DITHER_COMPILED", "always")
    twin = Twin(lanes_twin.count_loop)
    counts = np.zeros(8 * 256, np.uint32)
    run = twin.chosen(0.0)
    assert run is not None
    run(np.arange(3, dtype=np.uint64), counts)
    assert counts.sum() == 24
    assert twin._compiled.stats.cache_path is None
