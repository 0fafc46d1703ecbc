"""Codes come back exactly, in few bytes, and as the specification says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dither.coding import decode_codes, encode_codes, histograms, part_plan
from dither.coding.part_plan import LANES_SHARE
from tests.coding import reference
from tests.coding.samples import ALPHABETS, KINDS, Codes, arrays, entropy_nbytes, sample


def check(codes: Codes, alphabet: int) -> tuple[str, bytes]:
    codec, payload = encode_codes(codes, alphabet)
    back = decode_codes(codec, payload, codes.shape, alphabet)
    assert back.dtype == (
        np.uint8 if alphabet <= 256 else np.int16 if alphabet <= 32768 else np.int32
    )
    assert back.shape == codes.shape
    assert np.array_equal(back, codes)
    assert len(payload) <= (codes.size * (alphabet - 1).bit_length() + 7) // 8
    return codec, payload


@given(arrays())
@settings(deadline=None, max_examples=200)
def test_round_trip(given_codes: tuple[Codes, int]) -> None:
    check(*given_codes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_round_trip_in_many_lanes(kind: str, alphabet: int) -> None:
    check(sample(kind, (301, 211), alphabet, 1), alphabet)


@given(arrays(most=400))
@settings(deadline=None, max_examples=100)
def test_the_specification_suffices_to_decode(given_codes: tuple[Codes, int]) -> None:
    codes, alphabet = given_codes
    codec, payload = encode_codes(codes, alphabet)
    if codec == "rans":
        assert reference.decode_rans(payload, codes.shape, alphabet) == codes.reshape(-1).tolist()


@pytest.mark.parametrize(
    ("kind", "shape", "alphabet"),
    [
        ("rows", (230, 200), 40),
        ("rows", (40, 12, 3, 3), 40),
        ("outliers", (41000,), 60000),
        ("uniform", (44000,), 3000),
        ("few", (43000,), 1 << 24),
    ],
)
def test_the_specification_suffices_for_large_parts(
    kind: str, shape: tuple[int, ...], alphabet: int
) -> None:
    codes = sample(kind, shape, alphabet, 2)
    codec, payload = encode_codes(codes, alphabet)
    assert codec == "rans"
    assert reference.decode_rans(payload, shape, alphabet) == codes.reshape(-1).tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_any_integer_type_and_layout(dtype: type) -> None:
    codes = sample("peaked", (40, 50), 20, 3)
    assert encode_codes(codes.astype(dtype), 20) == encode_codes(codes, 20)
    flipped = np.asfortranarray(codes)
    assert encode_codes(flipped, 20) == encode_codes(codes, 20)
    assert encode_codes(codes > 10, 2)[0] == "rans"


def test_nothing_to_code() -> None:
    assert encode_codes(np.zeros((3, 0, 2), int), 7) == ("bits", b"")
    assert encode_codes(np.zeros((3, 2), int), 1) == ("bits", b"")
    assert decode_codes("bits", b"", (3, 0, 2), 7).shape == (3, 0, 2)
    assert decode_codes("bits", b"", (3, 2), 1).tolist() == [[0, 0]] * 3


@pytest.mark.parametrize(
    ("codes", "alphabet", "message"),
    [
        (np.array([3]), 3, "codes lie in 0 to 2; these reach from 3 to 3"),
        (np.array([-1]), 3, "codes lie in 0 to 2"),
        (np.array([0]), 0, "an alphabet has 1 to 16777216 symbols, not 0"),
        (np.array([0]), (1 << 24) + 1, "not 16777217"),
        (np.array([0.5]), 3, "codes are integers, not float64"),
    ],
)
def test_no_codes(codes: np.ndarray, alphabet: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_codes(codes, alphabet)


@pytest.mark.parametrize(
    ("count", "share", "more"),
    [
        (64, 0.0, 12),
        (300, 0.0, 16),
        (2000, 0.0, 24),
        (36864, 0.005, 8),
        (300_000, LANES_SHARE + 0.001, 8),
    ],
)
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("draw", ["normal", "laplace"])
def test_size_is_near_the_entropy(
    draw: str, scale: float, count: int, share: float, more: int
) -> None:
    values = getattr(np.random.default_rng(4), draw)(size=count) * scale
    codes = np.rint(values).astype(np.int64)
    codes -= codes.min()
    _, payload = check(codes, int(codes.max()) + 1)
    assert len(payload) <= (1 + share) * entropy_nbytes(codes) + more


@pytest.mark.parametrize("alphabet", [60_000, 1 << 20, 1 << 24])
def test_outliers_do_not_cost_the_others(alphabet: int) -> None:
    codes = sample("outliers", (50_000,), alphabet, 5)
    codes[(codes < alphabet // 2 - 30) | (codes > alphabet // 2 + 30)] = alphabet - 1
    codes[:7] = np.arange(7) * (alphabet // 7)
    _, payload = check(codes, alphabet)
    assert len(payload) <= (1.005 + LANES_SHARE) * entropy_nbytes(codes) + 60


def test_smooth_wide_alphabets_split_off_low_bits() -> None:
    codes = np.rint(np.random.default_rng(6).normal(size=30_000) * 4000 + 32_000).astype(np.int64)
    _, payload = check(codes, 65_000)
    ideal = 30_000 * np.log2(4000 * np.sqrt(2 * np.pi * np.e)) / 8
    assert len(payload) <= 1.005 * ideal


def test_near_uniform_indices_are_at_most_packed() -> None:
    codes = sample("uniform", (8000,), 256, 7)
    _, payload = check(codes, 256)
    assert len(payload) <= 8000
    _, payload = check(sample("uniform", (50_000,), 200, 8), 200)
    assert len(payload) <= 50_000 * np.log2(200) / 8 * 1.003


def test_a_constant_part_takes_a_few_bytes() -> None:
    for alphabet in ALPHABETS[1:]:
        assert len(check(np.full((500, 100), alphabet - 1), alphabet)[1]) <= 12


def test_contexts_follow_the_spread_of_rows_and_columns() -> None:
    rng = np.random.default_rng(9)
    spread = np.exp(0.6 * rng.normal(size=(256, 1)) + 0.4 * rng.normal(size=(1, 256)))
    values = rng.normal(size=(256, 256)) * spread * 2
    codes = np.rint(values).astype(np.int64)
    codes -= codes.min()
    alphabet = int(codes.max()) + 1
    shaped, flat = (len(check(c, alphabet)[1]) for c in (codes, codes.reshape(-1)))
    ideal = entropy_of_normals(np.broadcast_to(2 * spread, codes.shape))
    assert shaped < 0.94 * flat
    assert shaped < 1.025 * ideal


def entropy_of_normals(scales: np.ndarray) -> float:
    """Bytes of rounded normal numbers, each coded with its true distribution."""
    edges = np.arange(-120, 121) - 0.5
    total = 0.0
    for scale in np.unique(np.round(np.log2(scales), 2)):
        density = np.exp(-0.5 * (np.arange(-3000, 3001) / 25 / 2**scale) ** 2)
        mass = np.add.reduceat(density, np.searchsorted(np.arange(-3000, 3001) / 25, edges[20:-20]))
        mass /= mass.sum()
        bits = -(mass[mass > 0] * np.log2(mass[mass > 0])).sum()
        total += bits * (np.round(np.log2(scales), 2) == scale).sum()
    return total / 8


@given(st.integers(2, 300), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_encoding_is_deterministic(alphabet: int, seed: int) -> None:
    codes = sample("rows", (40, 30), alphabet, seed)
    assert encode_codes(codes, alphabet) == encode_codes(codes.copy(), alphabet)


@pytest.mark.parametrize("alphabet", [5000, 200_000])
def test_pieces_of_large_parts_make_the_same_payload(
    monkeypatch: pytest.MonkeyPatch, alphabet: int
) -> None:
    values = np.random.default_rng(0).laplace(alphabet / 2, alphabet / 100, 30_000)
    codes = np.clip(values, 0, alphabet - 1).astype(np.int32).reshape(300, 100)
    codes[7, :5] = [0, alphabet - 1, 1, 2, 3]  # far out: they escape
    whole = encode_codes(codes, alphabet)
    for room in (part_plan, histograms):
        monkeypatch.setattr(room, "_PIECE", 999)
    assert encode_codes(codes, alphabet) == whole
