"""Grids, quantizers and the ranges that calibration finds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dither.activations import Activation, Encoding, Encodings, Quantizer, observe
from dither.activations.histogram import Histogram
from dither.activations.integer_grid import cover, rounded
from dither.core import SpecError


def ready(low: float, high: float, **settings: Any) -> Quantizer:
    made = Quantizer(Activation(**settings)).eval()
    made.set(torch.tensor([low]), torch.tensor([high]))
    return made


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_values_are_those_of_integer_arithmetic(bits: int, symmetric: bool) -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(bits)) * 3
    quantizer = ready(-2.0, 5.0, bits=bits, symmetric=symmetric)
    scale, zero = quantizer.grid()
    codes = quantizer.codes(values).long()
    assert int(codes.min()) >= 0
    assert int(codes.max()) <= 2**bits - 1
    assert torch.equal(quantizer(values), (codes - zero.long()) * scale)
    # The same by exact rational arithmetic of Python for a few.
    for value, code in zip(values[:50].tolist(), codes[:50].tolist(), strict=True):
        place = float(torch.tensor(value) / scale)
        assert code == min(max(round(place) + int(zero), 0), 2**bits - 1)
    if symmetric:
        assert int(zero) == 2 ** (bits - 1)


def test_grid_holds_zero_and_covers_the_range() -> None:
    for low, high in [(-1.0, 3.0), (2.0, 3.0), (-4.0, -1.0), (0.0, 0.0), (-1e-30, 1e30)]:
        for symmetric in (False, True):
            scale, zero = cover(torch.tensor([low]), torch.tensor([high]), 8, symmetric=symmetric)
            assert float(zero) == int(zero)
            grid = (torch.arange(256.0) - zero) * scale
            assert 0.0 in grid.tolist()
            assert float(grid[0]) <= low + 0.51 * float(scale)
            assert float(grid[-1]) >= high * (1 - 1e-6) - 0.51 * float(scale)


def test_relu_uses_all_codes() -> None:
    scale, zero = ready(0.0, 2.55, bits=8).grid()
    assert float(zero) == 0
    assert float(scale) == pytest.approx(0.01)


def test_gradient_passes_within_the_range_only() -> None:
    values = torch.tensor([-3.0, -0.9, 0.1, 0.9, 3.0], requires_grad=True)
    ready(-1.0, 1.0, bits=8)(values).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0, 1, 1, 1, 0]


def test_gradients_of_scale_and_zero() -> None:
    """Against the published formulas, written out value by value."""
    values = torch.tensor([-3.0, -0.93, 0.12, 0.91, 3.0])
    scale = torch.tensor([0.25], requires_grad=True)
    zero = torch.tensor([4.0], requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    (rounded(values, scale, zero, 4, "learned") * upstream).sum().backward()
    to_scale = to_zero = 0.0
    for value, factor in zip(values.tolist(), upstream.tolist(), strict=True):
        level = round(value / 0.25)
        if -4 <= level <= 11:
            to_scale += factor * (level - value / 0.25)
        else:
            to_scale += factor * (min(max(level + 4, 0), 15) - 4)
            to_zero += factor * -0.25
    assert scale.grad is not None
    assert zero.grad is not None
    assert float(scale.grad) == pytest.approx(to_scale, rel=1e-5)
    assert float(zero.grad) == pytest.approx(to_zero)
    clip = torch.tensor([0.25], requires_grad=True)
    (rounded(values, clip, torch.tensor([4.0]), 4, "clip") * upstream).sum().backward()
    assert clip.grad is not None
    assert float(clip.grad) == pytest.approx(1.0 * -4 + 5.0 * 11)


def test_types_are_kept_and_computed_in_float32() -> None:
    values = torch.randn(64)
    quantizer = ready(-2.0, 2.0, bits=8)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        given = values.to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            found = quantizer(given)
        assert found.dtype == dtype
        assert torch.equal(found, quantizer(given.float()).to(dtype))
    whole = torch.arange(5)
    assert quantizer(whole) is whole
    assert quantizer.half().scale.dtype == torch.float32


# --- groups of embeddings ------------------------------------------------------------------------


def test_groups_equal_permuting_splitting_and_permuting_back() -> None:
    torch.manual_seed(0)
    spread = torch.tensor([0.1, 9.0, 0.2, 3.0, 0.15, 8.0])
    batches = [torch.randn(4, 5, 6) * spread for _ in range(3)]
    found = observe(nn.Identity(), {"@in": Activation(8, groups=3)}, batches)["@in"]
    order = torch.tensor(found.order)
    assert (
        order.tolist()
        == torch.cat(batches)
        .flatten(0, 1)
        .aminmax(dim=0)
        .max.sub(torch.cat(batches).flatten(0, 1).amin(0))
        .argsort()
        .tolist()
    )
    values = batches[0]
    quantizer = found.quantizer().eval()
    parts = []
    for group, part in enumerate(values[..., order].split(2, -1)):
        everything = torch.cat(batches)[..., order].split(2, -1)[group]
        single = ready(float(everything.min()), float(everything.max()), bits=8)
        assert float(single.grid()[0]) == found.scale[group]
        parts.append(single(part))
    back = torch.empty_like(values)
    back[..., order] = torch.cat(parts, -1)
    assert torch.equal(quantizer(values), back)
    assert sorted(found.scale) == list(found.scale)  # similar ranges stand together


def test_sorted_groups_lose_less_than_neighbours_and_these_than_none() -> None:
    torch.manual_seed(1)
    spread = torch.ones(12)
    spread[[1, 4, 7, 10]] = 100.0  # outliers in fixed dimensions, one in each group of neighbours
    values = torch.randn(512, 12) * spread

    def error(**settings: Any) -> float:
        found = observe(nn.Identity(), {"@in": Activation(8, **settings)}, [values])["@in"]
        difference = found.quantizer().eval()(values) - values
        return float((difference / spread).square().mean())

    assert error(groups=3) < 0.75 * error(groups=3, permute=False)
    assert error(groups=12) < 0.01 * error()


def test_groups_must_divide_and_share_alike() -> None:
    with pytest.raises(SpecError, match="10 dimensions cannot be split into 3"):
        observe(nn.Identity(), {"@in": Activation(groups=3)}, [torch.randn(2, 10)])
    with pytest.raises(SpecError, match="observe calibration data first"):
        Quantizer(Activation(groups=2)).train()(torch.randn(2, 4))


def test_shared_permutation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    plan = {"*@in": Activation(groups=2, share=1), "*@out": Activation(groups=2)}
    found = observe(model, plan, [torch.randn(8, 6)])
    assert found["0.0@in"].order == found["0.1@in"].order
    assert found["0.0@out"].order != found["0.0@in"].order


def test_tokens_have_their_own_range() -> None:
    values = torch.randn(2, 3, 8) * torch.tensor([0.1, 1.0, 50.0]).reshape(1, 3, 1)
    quantizer = Quantizer(Activation(8, per="token")).eval()
    found = quantizer(values)
    for row, column in ((0, 0), (1, 2)):
        token = values[row, column]
        own = ready(float(token.min()), float(token.max()), bits=8)
        assert torch.equal(found[row, column], own(token))
    assert Quantizer(Activation(8, dynamic=True)).eval()(values).unique().numel() <= 256


# --- ranges --------------------------------------------------------------------------------------


def test_histogram_does_not_depend_on_batches() -> None:
    values = torch.randn(1, 10_000) * torch.logspace(-3, 2, 10_000)
    one, many = Histogram(1), Histogram(1)
    one.add(values)
    for part in values.split(777, 1):
        many.add(part)
    assert one.width == many.width
    assert torch.equal(one.counts, many.counts)
    assert int(one.counts.sum()) == 10_000


def estimate(values: Tensor, **settings: Any) -> tuple[float, float]:
    """Ends of the grid that is found for values in ten batches."""
    found = observe(nn.Identity(), {"@in": Activation(**settings)}, values.split(len(values) // 10))
    scale, zero = found["@in"].scale[0], found["@in"].zero[0]
    return -zero * scale, (2 ** found["@in"].spec.bits - 1 - zero) * scale


def test_estimators_on_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(100_000, generator=generator)
    assert estimate(uniform)[1] == pytest.approx(1.0, abs=1e-3)
    assert estimate(uniform, ranges="percentile", percentile=90.0)[1] == pytest.approx(
        0.95, abs=5e-3
    )
    # A uniform distribution is best covered whole, but for half a step at its end.
    assert estimate(uniform, bits=4, ranges="mse")[1] == pytest.approx(31 / 32 * 1.0, abs=0.04)
    normal = torch.randn(100_000, generator=generator)
    # The best symmetric uniform quantizers of a Gaussian: 16 levels 0.3352 apart (Max 1960).
    low, high = estimate(normal, bits=4, ranges="mse")
    assert (high - low) / 15 == pytest.approx(0.3352, rel=0.06)
    low, high = estimate(normal, ranges="percentile", percentile=95.45)
    assert low == pytest.approx(-2, abs=0.05)
    assert high == pytest.approx(2, abs=0.05)
    assert estimate(normal)[1] == pytest.approx(float(normal.max()), abs=0.03)


def test_least_squares_is_never_worse_than_the_extremes() -> None:
    generator = torch.Generator().manual_seed(3)
    for kind in range(4):
        values = torch.randn(20_000, generator=generator) ** (kind + 1)
        for symmetric in (False, True):
            errors = []
            for ranges in ("mse", "minmax"):
                spec = Activation(4, ranges=ranges, symmetric=symmetric)
                grid = observe(nn.Identity(), {"@in": spec}, [values])["@in"].quantizer().eval()
                errors.append(float((grid(values) - values).square().mean()))
            assert errors[0] <= errors[1]


def test_running_extremes_are_the_recursion() -> None:
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0]), torch.tensor([-2.0, 8.0])]
    spec = Activation(16, ranges="running", momentum=0.75)
    found = observe(nn.Identity(), {"@in": spec}, batches)["@in"]
    high = 0.25 * 8 + 0.75 * (0.25 * 1 + 0.75 * 2)
    low = 0.25 * -2 + 0.75 * (0.25 * -3 + 0.75 * -1)
    assert found.scale[0] == pytest.approx((high - low) / 65535)


def test_cross_entropy_keeps_the_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.randn(256, 10) * 2
    logits[:, 0] -= 60  # a class that is never chosen stretches the range
    errors = {}
    for ranges in ("crossentropy", "minmax", "mse"):
        spec = Activation(4, ranges=ranges)
        grid = observe(nn.Identity(), {"@in": spec}, [logits])["@in"].quantizer().eval()
        soft = nn.functional.cross_entropy(grid(logits), logits.softmax(1))
        errors[ranges] = float(soft)
    assert errors["crossentropy"] < errors["mse"] <= errors["minmax"]
    entropy = float(nn.functional.cross_entropy(logits, logits.softmax(1)))
    assert errors["crossentropy"] - entropy < 0.3 * (errors["minmax"] - entropy)


def test_values_that_are_not_finite_are_named() -> None:
    with pytest.raises(SpecError, match="@in"):
        observe(nn.Identity(), {"@in": Activation()}, [torch.tensor([1.0, math.inf])])


# --- JSON ----------------------------------------------------------------------------------------


def test_encodings_survive_json() -> None:
    import json

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    plan = {
        "0@in": Activation(4, groups=3, ranges="mse"),
        "2@in": Activation(8, per="token"),
        "*@out": Activation(6, symmetric=True, training="learned", lr=1e-2),
    }
    found = observe(model, plan, [torch.randn(16, 6) for _ in range(3)])
    again = Encodings.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert found.parameters == 3 + 3 + 6 + 2 * 3
    for encoding in found.values():
        assert Encoding.of(encoding.quantizer()) == encoding
        assert Activation.from_json(encoding.spec.to_json()) == encoding.spec
        assert eval(repr(encoding.spec)) == encoding.spec


@pytest.mark.parametrize(
    "change",
    [
        {"scale": [0.0]},
        {"scale": [math.inf]},
        {"scale": [0.1]},  # no float32 number
        {"scale": ["1.0"]},
        {"scale": [0.5, 0.5]},
        {"scale": 3},
        {"zero": [256]},
        {"zero": [-1]},
        {"zero": [1.0]},
        {"zero": [True]},
        {"zero": []},
        {"order": [0, 1]},
        {"bits": 1},
        {"bits": "8"},
        {"groups": 10**9},
        {"unknown": 1},
        {"site": "gradient"},
        {"dynamic": True},
        {"permute": 1},
    ],
)
def test_damaged_encodings_are_refused(change: dict[str, Any]) -> None:
    good = Encoding(Activation(8), (0.5,), (3,)).to_json()
    assert Encodings.from_json({"fc@in": good})
    with pytest.raises(SpecError, match="fc@in"):
        Encodings.from_json({"fc@in": good | change})
    others: list[object] = [None, [], 3, "x", {}]
    for other in others:
        with pytest.raises(SpecError):
            Encodings.from_json({"fc@in": other})
