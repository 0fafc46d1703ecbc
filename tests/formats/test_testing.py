"""The laws themselves: each one notices what it is there for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dither import testing
from dither.core import ArchiveError, Codes, Encoded, Format, Stats
from dither.formats import Affine

WEIGHT = torch.tensor([[0.5, -1.0, 0.25], [2.0, 0.1, -0.3]])


@dataclass(frozen=True)
class Faulty:
    """An Affine with one fault."""

    fault: str
    calls: list[int] = field(default_factory=list)

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        self.calls.append(0)
        encoded = Affine(4).encode(weight)
        parts, dtype, shape = dict(encoded.codes), encoded.dtype, encoded.shape
        if self.fault == "changes the weight":
            weight += 1
        if self.fault == "code 15":
            parts["levels"] = Codes(parts["levels"].values + 16, 16)
        if self.fault == "differently":
            return Affine(4).encode(weight * len(self.calls))
        if self.fault == "dtype":
            dtype = torch.float16
        if self.fault == "shape":
            return Affine(4).encode(weight.T)
        return Encoded(encoded.format, shape, dtype, parts, encoded.params)


@dataclass(frozen=True)
class Silent:
    """Its repr does not say all."""

    bits: int = field(default=4, repr=False)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("changes the weight", "changed the weight"),
        ("code 15", "has the code"),
        ("differently", "differently"),
        ("dtype", "dtype"),
        ("shape", "shape"),
    ],
)
def test_check_encoder_notices(fault: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        testing.check_encoder(Faulty(fault), WEIGHT.clone())
    testing.check_encoder(Faulty("none"), WEIGHT)


def test_check_idempotent_notices() -> None:
    class Drifting(Affine):
        def decode(self, encoded: Encoded) -> Tensor:
            return super().decode(encoded) + float(encoded.params["scale"])

    with pytest.raises(AssertionError, match="re-encodes"):
        testing.check_idempotent(Drifting(4).encode(WEIGHT))


def test_check_encoded_notices_shared_memory() -> None:
    class Sharing(Format):
        name: ClassVar[str] = "sharing"

        def fit(self, weight: Tensor, stats: Stats | None = None) -> dict[str, Tensor]:
            return {}

        def assign(self, weight: Tensor, params: Mapping[str, Tensor]) -> Encoded:
            return Encoded(self, tuple(weight.shape), weight.dtype, {}, {"values": weight.clone()})

        def decode(self, encoded: Encoded) -> Tensor:
            return encoded.params["values"]

        def check(self, encoded: Encoded) -> None: ...

    with pytest.raises(AssertionError, match="decoding twice"):
        testing.check_encoded(Sharing().encode(WEIGHT))


def test_check_settings_and_repr_notice() -> None:
    with pytest.raises(AssertionError, match="evaluates to"):
        testing.check_repr(Silent(bits=5))
    testing.check_repr(Silent())


def test_check_round_trip_notices() -> None:
    encoded = Affine(4).encode(WEIGHT)
    levels = encoded.codes["levels"]
    other = Codes(levels.values.flip(0), 16)
    scale = {"scale": encoded.params["scale"] * 2}
    faults: list[tuple[str, dict[str, Any]]] = [
        ("codes 'levels'", {"codes": {"levels": other}, "params": encoded.params}),
        ("param 'scale'", {"codes": encoded.codes, "params": scale}),
    ]
    for message, parts in faults:
        loaded = Encoded(encoded.format, encoded.shape, encoded.dtype, **parts)
        with pytest.raises(AssertionError, match=message):
            testing.check_round_trip(encoded, lambda _, loaded=loaded: loaded)  # type: ignore[misc]
    with pytest.raises(AssertionError, match="loaded as"):
        testing.check_round_trip(encoded, lambda _: Affine(5).encode(WEIGHT))
    testing.check_round_trip(encoded, lambda _: Affine(4).encode(WEIGHT))


def test_check_size() -> None:
    encoded = Affine(4).encode(WEIGHT)  # 24 bits of levels, 32 of scale
    testing.check_size(encoded, 17, overhead=10)
    with pytest.raises(AssertionError, match="18 bytes in the file; at most 17"):
        testing.check_size(encoded, 18, overhead=10)


def test_check_golden() -> None:
    recorded = testing.fingerprint(WEIGHT)
    testing.check_golden(WEIGHT.T.contiguous().T, recorded)
    for other in (WEIGHT.double(), WEIGHT.reshape(-1), -WEIGHT):
        with pytest.raises(AssertionError, match="golden"):
            testing.check_golden(other, recorded)


def test_check_damage() -> None:
    def strict(data: bytes) -> None:
        if len(data) != 9 or sum(data[:8]) % 256 != data[8]:
            raise ArchiveError("part 'sum' is damaged")

    data = bytes(range(8)) + bytes([28])
    testing.check_damage(strict, data)
    with pytest.raises(AssertionError, match="a file with cut at byte 0 of 9 was read"):
        testing.check_damage(lambda _: None, data)


def test_same_bits_and_values() -> None:
    zero, minus = torch.tensor([0.0, torch.nan]), torch.tensor([-0.0, torch.nan])
    assert testing.same_values(zero, minus)
    assert not testing.same_bits(zero, minus)
    assert testing.same_bits(zero, zero.clone())
    assert not testing.same_values(zero, zero.double())
    assert not testing.same_values(zero, zero.reshape(1, 2))
    assert testing.same_values(torch.arange(3), torch.arange(3))
