"""The laws that every format and encoder obeys, ours or a plugin's, as functions that check them.

Each raises ``AssertionError`` that says what broke. The numbers are the design's: 1 settings
survive JSON and ``repr``; 2 what is loaded decodes bit for bit; 3 codes fit their alphabets and
sizes add up; 5 a decoded tensor encodes to itself; 6 golden files keep their hash; 7 a damaged
file is refused. 4 is about training: without noise a surrogate is not there, and in evaluation it
shows exactly its encoding. What needs a file takes a function, so that any container
can be put to the test.

>>> from dither.formats import Affine
>>> for weight in awkward_weights().values():
...     _ = check_format(Affine(4, group=8), weight)
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from dither.core import ArchiveError, Encoded, Encoder, Format, Stats, code_dtype
from dither.formats import format_from_json, format_to_json
from dither.train.method import Method, begin, spec_from_json, spec_to_json
from dither.train.noise import Noise
from dither.train.surrogate import Surrogate

RoundTrip = Callable[[Encoded], Encoded]
"""Writes a tensor and reads it again."""


def awkward_weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Small tensors on which encoders stumble, by name: shapes, ranges and memory layouts.

    Values are within the range of ``dtype`` and of float32.
    """
    generator = torch.Generator().manual_seed(0)
    info = torch.finfo(dtype)
    largest = min(info.max, torch.finfo(torch.float32).max)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    outlier = normal(6, 20)
    outlier[3, 7] = 1e3
    weights = {
        "scalar": torch.tensor(0.7),
        "empty": torch.zeros(0),
        "no rows": torch.zeros(0, 4),
        "no columns": torch.zeros(4, 0),
        "one": torch.tensor([-2.5]),
        "vector": normal(13),
        "odd sizes": normal(5, 13),
        "kernel": normal(4, 3, 3, 3),
        "strided": normal(8, 6).T[:, ::2],
        "zeros": torch.zeros(3, 8),
        "constant": torch.full((3, 8), 0.3),
        "negative": normal(4, 10).abs().neg() - 1,
        "far from zero": normal(4, 10) * 1e-3 + 100,
        "outlier": outlier,
        "two values": normal(6, 9).sign(),
        "tiny": normal(4, 9) * info.tiny * 8,
        "denormal": normal(4, 9) * info.tiny / 8,
        "huge": normal(4, 9).clamp(-3, 3) / 3 * largest,
    }
    return {name: weight.to(dtype) for name, weight in weights.items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in type, shape and every bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(_bytes_of(one), _bytes_of(other))


def _bytes_of(tensor: Tensor) -> Tensor:
    # A copy, because a single value may have a stride of 0, of which there is no view as bytes.
    flat = tensor.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in type, shape and value; NaN equals NaN and -0 equals 0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return same_bits(one, other)
    if one.element_size() == 1:  # float8 cannot compare
        one, other = one.float(), other.float()
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def fingerprint(tensor: Tensor) -> str:
    """SHA-256 over type, shape and bytes: what golden files are held to.

    >>> fingerprint(torch.tensor([1.0]))[:16]
    'bb39dac711489797'
    """
    raw = _bytes_of(tensor).numpy().tobytes()
    head = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} ".encode()
    return hashlib.sha256(head + raw).hexdigest()


def check_repr(spec: object) -> None:
    """Law 1, for any spec: ``eval(repr(spec))`` equals it, with its classes and torch in scope."""
    scope: dict[str, Any] = {"torch": torch}

    def collect(value: object) -> None:
        scope[type(value).__name__] = type(value)
        if is_dataclass(value):
            for item in fields(value):
                collect(getattr(value, item.name))

    collect(spec)
    copy = eval(repr(spec), scope)  # noqa: S307 - the law itself; the text is the spec's own
    assert copy == spec, f"repr of {spec!r} evaluates to {copy!r}"


def check_settings(fmt: Format) -> None:
    """Law 1, for a format: settings survive JSON and ``repr``; the name is in the closed table."""
    check_repr(fmt)
    text = json.dumps(format_to_json(fmt))
    copy = format_from_json(json.loads(text))
    assert copy == fmt, f"{fmt!r} came back from JSON {text} as {copy!r}"
    assert hash(copy) == hash(fmt), f"{fmt!r} does not hash like its copy"


def check_encoded(encoded: Encoded) -> Tensor:
    """Law 3, and decoding: codes in their alphabets, exact ``bits``, a fresh and stable tensor.

    Returns:
        The decoded tensor.
    """
    total = 0
    for name, part in encoded.codes.items():
        values = part.values
        assert values.dtype == code_dtype(part.alphabet), (
            f"part {name!r} over {part.alphabet} symbols is kept as {values.dtype}"
        )
        if values.numel():
            low, high = int(values.min()), int(values.max())
            assert low >= 0, f"part {name!r} has the code {low}"
            assert high < part.alphabet, (
                f"part {name!r} has the code {high} over {part.alphabet} symbols"
            )
        total += values.numel() * (part.alphabet - 1).bit_length()
    total += sum(8 * part.numel() * part.element_size() for part in encoded.params.values())
    assert encoded.bits == total, f"bits says {encoded.bits}; the parts have {total}"
    decoded = encoded.decode()
    assert tuple(decoded.shape) == encoded.shape, f"{encoded.shape} decodes to {decoded.shape}"
    assert decoded.dtype == encoded.dtype, f"{encoded.dtype} decodes to {decoded.dtype}"
    copy = decoded.clone()
    decoded.zero_()  # must not reach the stored parts
    assert same_bits(encoded.decode(), copy), "decoding twice gives different values"
    return copy


def check_idempotent(encoded: Encoded, params: Mapping[str, Tensor] | None = None) -> None:
    """Law 5: with its parameters held fixed, a decoded tensor encodes to the same values.

    Args:
        encoded: of any format.
        params: those it was encoded with, or None: those it holds.
    """
    fmt, decoded = encoded.format, encoded.decode()
    held = fmt.params_of(encoded) if params is None else params
    again = fmt.assign(decoded, held).decode()
    assert same_values(again, decoded), (
        f"{fmt!r} re-encodes a decoded tensor to other values; largest difference "
        f"{(again.double() - decoded.double()).abs().max().item():.4g}"
    )


def check_round_trip(encoded: Encoded, round_trip: RoundTrip) -> None:
    """Law 2: what is loaded is equal in every part, and decodes to the same bits."""
    loaded = round_trip(encoded)
    _check_alike(loaded, encoded, "loaded")


def _check_alike(found: Encoded, encoded: Encoded, how: str) -> None:
    assert found.format == encoded.format, f"{encoded.format!r} was {how} as {found.format!r}"
    for kind in ("codes", "params"):
        given, got = getattr(encoded, kind), getattr(found, kind)
        assert set(given) == set(got), f"{kind} {sorted(given)} were {how} as {sorted(got)}"
    for name, part in encoded.params.items():
        assert same_bits(found.params[name], part), f"param {name!r} was {how} differently"
    for name, code in encoded.codes.items():
        other = found.codes[name]
        assert other.alphabet == code.alphabet, f"{name!r} was {how} over {other.alphabet} symbols"
        assert same_bits(other.values, code.values), f"codes {name!r} were {how} differently"
    assert same_bits(found.decode(), encoded.decode()), f"what was {how} decodes differently"


def check_size(encoded: Encoded, nbytes: int, overhead: int) -> None:
    """Law 3, for a file: never larger than ``bits`` plus the stated overhead in bytes."""
    limit = -(-encoded.bits // 8) + overhead
    assert nbytes <= limit, f"{nbytes} bytes in the file; at most {limit} were promised"


def check_encoder(
    encoder: Encoder,
    weight: Tensor,
    stats: Stats | None = None,
    round_trip: RoundTrip | None = None,
) -> Encoded:
    """The laws of an encoder: a valid, repeatable result, and an unchanged weight.

    Laws 2 (with ``round_trip``), 3 and 5. Floating-point results must be finite.

    Returns:
        The encoding, for further checks.
    """
    before = weight.detach().clone()
    encoded = encoder.encode(weight, stats)
    assert same_bits(weight.detach(), before), f"{encoder!r} changed the weight"
    assert encoded.shape == tuple(weight.shape), f"shape {encoded.shape} for {weight.shape}"
    assert encoded.dtype == weight.dtype, f"dtype {encoded.dtype} for {weight.dtype}"
    decoded = check_encoded(encoded)
    if _is_finite(weight):
        assert _is_finite(decoded), f"{encoder!r} made a finite weight infinite or NaN"
    again = encoder.encode(weight, stats).decode()
    assert same_bits(again, decoded), f"{encoder!r} encodes the same weight differently"
    check_idempotent(encoded)
    if round_trip is not None:
        check_round_trip(encoded, round_trip)
    return encoded


def check_device(
    encoder: Encoder, weight: Tensor, device: torch.device, stats: Stats | None = None
) -> None:
    """Where a model is makes no difference to its file.

    Encoders compute on the CPU: from a device they make every bit that they make of the same
    weight there, wherever the statistics are. Formats, which training runs at every step, compute
    where the weight is; what they make is there too, and decodes to the same bits on the CPU.

    Args:
        encoder: a format or another encoder.
        weight: on the CPU.
        device: another.
        stats: on the CPU.
    """
    away = weight.to(device)
    if isinstance(encoder, Format):
        found = encoder.encode(away, stats)
        _check_place(encoder, found, away.device)
        here, there = found.to(weight.device).decode(), found.decode()
        assert same_bits(here, there), f"{encoder!r} decodes differently there"
        return
    expected = encoder.encode(weight, stats)
    for given in {stats, None if stats is None else stats.to(device)}:
        found = encoder.encode(away, given)
        _check_place(encoder, found, weight.device)
        _check_alike(found, expected, "encoded from a device")


def _check_place(encoder: Encoder, encoded: Encoded, device: torch.device) -> None:
    parts = [*encoded.params.values(), *(part.values for part in encoded.codes.values())]
    places = {part.device for part in parts}
    assert places <= {device}, f"{encoder!r} leaves parts on {places}, not on {device}"


def _is_finite(tensor: Tensor) -> bool:
    narrow = tensor.is_floating_point() and tensor.element_size() == 1  # float8 cannot tell
    return bool((tensor.float() if narrow else tensor).isfinite().all())


def check_format(fmt: Format, weight: Tensor, round_trip: RoundTrip | None = None) -> Encoded:
    """All laws of a format on one weight: 1, 3, 5 and, with ``round_trip``, 2.

    Returns:
        The encoding, for further checks.
    """
    check_settings(fmt)
    encoded = check_encoder(fmt, weight, None, round_trip)
    params = fmt.fit(weight)
    check_idempotent(fmt.assign(weight, params), params)
    return encoded


def check_surrogate(spec: Method, weight: Tensor) -> Encoded:
    """The laws of a training method and its surrogate, on one weight: 4, and 1 for the method.

    Without noise ``train()`` returns the weight itself; ``eval()`` shows exactly the encoding;
    neither changes the weight; gradients reach it; sizes are finite; it can be pickled.

    Raises:
        SpecError: the method refuses this weight.

    Returns:
        The encoding, for further checks.
    """
    check_repr(spec)
    text = json.dumps(spec_to_json(spec))
    copy = spec_from_json(json.loads(text))
    assert copy == spec, f"{spec!r} came back from JSON {text} as {copy!r}"
    parameter = torch.nn.Parameter(weight.detach().clone())
    surrogate = begin(spec, weight.detach().clone())
    with torch.no_grad():
        surrogate.draw(parameter.detach(), Noise(0).generator(0, "weight", weight.device), 0)
    surrogate.train()
    _check_training(surrogate, parameter)
    surrogate.eval()
    encoded = surrogate.encode(parameter.detach())
    decoded = check_encoded(encoded).to(weight.device)
    loaded = pickle.loads(pickle.dumps(surrogate))  # noqa: S301 - our own bytes
    for kind in (surrogate, loaded):
        for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            with mode():
                shown = kind(parameter)
            # A value that is not finite, or is -0, does not survive the sum that carries gradients.
            assert same_values(shown.detach(), decoded) or not _is_finite(weight), (
                f"{spec!r} in eval() under {mode.__name__} does not show its encoding"
            )
    assert same_bits(parameter.detach(), weight.detach()), f"{spec!r} changed the weight"
    return encoded


def _check_training(surrogate: Surrogate, parameter: Tensor) -> None:
    name, before = type(surrogate).__name__, parameter.detach().clone()
    surrogate.active = False
    assert surrogate(parameter) is parameter, f"{name} without noise does not return the weight"
    surrogate.active = True
    noisy = surrogate(parameter)
    assert noisy.shape == parameter.shape, f"{name} makes {noisy.shape} of {parameter.shape}"
    assert noisy.dtype == parameter.dtype, f"{name} makes {noisy.dtype} of {parameter.dtype}"
    again = surrogate(parameter)
    assert same_bits(noisy, again), f"{name} draws anew within a step, which breaks checkpointing"
    size = surrogate.soft_bits(parameter)
    assert not size.ndim, (
        f"soft_bits of {name} has the shape {tuple(size.shape)}; expected a scalar"
    )
    assert bool(size.isfinite()), f"soft_bits of {name} is {size.item()}"
    (noisy.float().sum() + (size if size.requires_grad else 0)).backward()
    if _is_finite(noisy.detach()):
        learned = [p for p in surrogate.parameters() if p.requires_grad and p.grad is not None]
        reached = parameter.grad is not None or bool(learned)
        assert reached, f"{name} lets no gradient through to the weight or what it learns"
    assert same_bits(parameter.detach(), before), f"{name} changed the weight"


def check_golden(tensor: Tensor, recorded: str) -> None:
    """Law 6: a golden tensor still has its recorded :func:`fingerprint`."""
    found = fingerprint(tensor)
    assert found == recorded, f"a golden tensor decodes to {found}, not to {recorded}"


def check_damage(read: Callable[[bytes], object], data: bytes, trials: int = 64) -> None:
    """Law 7: truncated and bit-flipped copies of a file are refused with ``ArchiveError``.

    Args:
        read: reads and decodes everything in the file.
        data: an undamaged file, which must be read without an error.
        trials: cuts, and flips, spread evenly over the file; its ends are always among them.
    """
    read(data)
    places = {0, len(data) - 1, *range(0, len(data), max(1, len(data) // trials))}
    for place in sorted(places):
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        copies = {"cut at": data[:place], "one bit flipped in": bytes(flipped)}
        for damage, copy in copies.items():
            try:
                read(copy)
            except ArchiveError:
                continue
            raise AssertionError(f"a file with {damage} byte {place} of {len(data)} was read")
