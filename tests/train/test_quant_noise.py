"""Quant-Noise: papers.md's list of what a faithful implementation must show, and its traps."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dither import Affine, Codebook, Product, QuantNoise, Run, SpecError, StraightThrough
from dither.train import Method, Ramp, attach
from dither.train.method import spec_from_json, spec_to_json
from dither.train.noise import Noise
from dither.train.quant_noise import listed, marked
from tests.train.test_straight_through import draw, weight_of


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24))


def train(model: nn.Module, plan: Mapping[str, Method] | None, steps: int) -> Run | None:
    """A few steps of Adam on fixed data."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    run = None if plan is None else attach(model, plan, steps=steps)
    for step in range(steps):
        go(model, optimizer, step)
        if run is not None:
            run.step()
    return run


def go(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
    loss = (model(inputs) - 1).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("fmt", [Affine(4), Product(4, points=8), Codebook(4)], ids=repr)
@pytest.mark.parametrize("kind", ["quantizer", "proxy"])
def test_without_noise_training_is_plain_bit_for_bit(
    fmt: Affine | Product | Codebook, kind: str
) -> None:
    plain, noised = network(), network()
    train(plain, None, 6)
    train(noised, {"*.weight": QuantNoise(fmt, p=0.0, kind=kind)}, 6)
    assert same(plain, noised)


@pytest.mark.parametrize(
    "fmt", [Affine(4), Affine(8, axis=0), Product(4, points=8), Codebook(4)], ids=repr
)
def test_with_all_noise_training_is_quantization_aware_bit_for_bit(
    fmt: Affine | Product | Codebook,
) -> None:
    aware, noised, plain = network(), network(), network()
    train(aware, {"*.weight": StraightThrough(fmt, refresh=2)}, 6)
    train(noised, {"*.weight": QuantNoise(fmt, p=1.0, refresh=2)}, 6)
    train(plain, None, 6)
    assert same(aware, noised)
    assert not same(aware, plain)


@pytest.mark.parametrize("p", [0.03, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("block", [1, 4])
def test_a_share_of_whole_blocks_is_noised_at_each_step(p: float, block: int) -> None:
    weight = weight_of(120, 200)
    surrogate = QuantNoise(Affine(2), p=p, block=block).begin(weight.detach())
    full = StraightThrough(Affine(2)).begin(weight.detach())
    draw(full, weight)
    counts, seen = [], set()
    for step in range(5):
        draw(surrogate, weight, step)
        read = surrogate(weight).detach()
        noised = read != weight.detach()
        assert torch.equal(read[noised], full(weight).detach()[noised])
        blocks, unmoved = noised.view(-1, block), (full(weight) == weight).view(-1, block)
        assert torch.equal((blocks | unmoved).all(1), (blocks | unmoved.all(1, True)).any(1))
        counts.append(int(blocks.any(1).sum()))
        seen.add(bytes(blocks.any(1).numpy()))
    trials = 5 * weight.numel() // block
    assert abs(sum(counts) - p * trials) < 4.5 * math.sqrt(p * (1 - p) * trials)
    assert len(seen) == 5


@pytest.mark.parametrize("make", [listed, marked])
def test_draws_are_independent_and_even(make: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(1000)
    both = 0.0
    for _ in range(2000):
        found = make(1000, 0.2, generator, torch.device("cpu"))
        one = torch.zeros(1000)
        one[found] = 1
        total += one
        both += float((one[1:] * one[:-1]).sum())
    assert (total / 2000 - 0.2).abs().max() < 5 * math.sqrt(0.16 / 2000)
    assert abs(both / (999 * 2000) - 0.04) < 0.001


@pytest.mark.parametrize("kind", ["quantizer", "proxy", "mean"])
@pytest.mark.parametrize("p", [0.1, 0.6, 1.0])
def test_gradients_are_exact_where_there_is_no_noise_and_straight_elsewhere(
    kind: str, p: float
) -> None:
    weight = weight_of(32, 40)
    surrogate = QuantNoise(Product(8, points=8), p=p, kind=kind).begin(weight.detach())
    draw(surrogate, weight)
    slope = torch.randn(32, 40)
    (surrogate(weight) * slope).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, slope)


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_only_noised_weights_are_clipped(p: float) -> None:
    weight = weight_of(50, 40)
    surrogate = QuantNoise(Affine(4), p=p, refresh=100).begin(weight.detach())
    draw(surrogate, weight)
    with torch.no_grad():
        weight.mul_(3)
    draw(surrogate, weight, step=1)
    read = surrogate(weight)
    read.backward(torch.ones_like(read))
    noised = read.detach() != weight.detach()
    outside = weight.detach().abs() > weight.detach().abs().max() / 3 * 1.25
    assert weight.grad is not None
    assert torch.equal(weight.grad[~noised], torch.ones_like(weight.grad[~noised]))
    assert (weight.grad[noised & outside] == 0).all()
    assert (noised & outside).any()


def test_stored_weights_never_change_in_forward() -> None:
    # Another library overwrites them: 20 forwards at p = 0.1 leave 86 % zeros.
    model = network()
    before = copy.deepcopy(model.state_dict())
    run = attach(model, {"*.weight": QuantNoise(Product(8), p=0.1, kind="proxy")})
    for _ in range(20):
        model(torch.randn(4, 16)).sum().backward()
        run.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_evaluation_quantizes_everything_and_is_the_file() -> None:
    model = network()
    run = train(model, {"*.weight": QuantNoise(Product(4, points=8), p=0.3)}, 5)
    assert run is not None
    run.finish()
    model.eval()
    output = model(torch.ones(2, 16))
    plain = network()
    plain.load_state_dict({name: run.archive[name] for name in plain.state_dict()})
    assert torch.equal(output, plain.eval()(torch.ones(2, 16)))
    assert len(run.archive["0.weight"].view(-1, 4).unique(dim=0)) <= 8


def test_zero_mean_and_rescaled_blocks() -> None:
    weight = weight_of(30, 20)  # 8 does not divide 20
    for kind in ("proxy", "mean"):
        spec = QuantNoise(Product(8), p=0.3, kind=kind)
        surrogate = spec.begin(weight.detach())
        draw(surrogate, weight)
        read = surrogate(weight).detach()
        noised = read != weight.detach()
        padded = nn.functional.pad(weight.detach(), (0, 4)).view(-1, 8)
        mean = padded.mean(0) if kind == "mean" else torch.zeros(8)
        wanted = mean.repeat(3)[:20].expand(30, 20)
        assert torch.allclose(read[noised], wanted[noised], atol=1e-6)
        assert 0 < noised.sum() < weight.numel()
    surrogate = QuantNoise(Affine(4), p=0.2, block=4, kind="proxy", rescale=True).begin(weight)
    draw(surrogate, weight)
    read = surrogate(weight)
    read.sum().backward()
    dropped = read.detach() == 0
    assert torch.allclose(read[~dropped], weight[~dropped] / 0.8)
    assert weight.grad is not None
    assert torch.allclose(weight.grad, torch.where(dropped, 1.0, 1 / 0.8))


def test_clusters_fall_together() -> None:
    weight = weight_of(64, 32)
    spec = QuantNoise(Product(4, points=16), p=0.5, kind="proxy", selection="clusters")
    surrogate = spec.begin(weight.detach())
    draw(surrogate, weight)
    dropped = (surrogate(weight) == 0).view(-1, 4).all(1)
    codes = surrogate.encode(weight.detach()).codes["indices"].values.view(-1)
    for centroid in codes.unique():
        assert len(dropped[codes == centroid].unique()) == 1
    assert 0 < dropped.sum() < len(dropped)


@pytest.mark.parametrize(
    ("shape", "block"), [((16, 8, 3, 3), 9), ((16, 8, 1, 1), 4), ((16, 8, 5), 5), ((16, 8), 4)]
)
def test_blocks_of_convolutions_are_kernels_or_runs_of_channels(
    shape: tuple[int, ...], block: int
) -> None:
    # Another library crashes on 1x1 convolutions.
    weight = weight_of(*shape)
    spec = QuantNoise(Affine(4), p=0.4, block=4, kind="proxy")
    assert spec.block_of(shape) == block
    surrogate = spec.begin(weight.detach())
    draw(surrogate, weight)
    dropped = (surrogate(weight) == 0).reshape(-1, block)
    assert torch.equal(dropped.any(1), dropped.all(1))
    assert 0 < dropped.sum() < weight.numel()


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    "settings",
    [
        {"format": Affine(4, axis=0)},
        {"format": Affine(3, group=8, grid="asymmetric"), "refresh": 9},
        {"format": Product(8, points=16)},
        {"format": Product(7, points=16), "kind": "mean"},
        {"format": Affine(4), "block": 4, "kind": "proxy", "rescale": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [40, 400])
def test_an_embedding_reads_the_rows_that_the_table_has(
    p: float, settings: dict[str, Any], rows: int
) -> None:
    if p == 1:
        settings = settings | {"rescale": False}
    table = nn.Embedding(rows, 20, padding_idx=3)
    run = attach(table, {"weight": QuantNoise(p=p, **settings)})
    surrogate, index = run.surrogates["weight"], torch.tensor([[3, 1, 39], [1, 0, 7]])
    with torch.no_grad():
        table.weight.mul_(1.5)  # some are clipped, where parameters are not chosen anew
    assert surrogate.reads_rows()
    slope, results = torch.randn(2, 3, 20), []
    for read in (table(index), nn.functional.embedding(index, surrogate(table.weight), 3)):
        (gradient,) = torch.autograd.grad((read * slope).sum(), table.weight)
        results.append((read.detach().clone(), gradient))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)
    assert not torch.equal(results[0][0], table.weight.detach()[index])


def test_attention_projections_are_noised() -> None:
    # Another library reads them past its noise.
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        plain = attention(x, x, x)[0]
        for name in ("in_proj_weight", "out_proj.weight"):
            run = attach(attention, {name: QuantNoise(Product(4), p=0.3, kind="proxy")})
            assert not torch.equal(attention(x, x, x)[0], plain)
            run.detach()
    assert torch.equal(attention(x, x, x)[0], plain)


def test_the_share_follows_a_ramp() -> None:
    model = nn.Linear(64, 64)
    plan = {"weight": QuantNoise(Affine(2), p=Ramp(0.0, 0.8))}
    run = attach(model, plan, steps=10)
    shares = []
    for _ in range(11):
        read = run.surrogates["weight"](model.weight)
        shares.append(float((read != model.weight).float().mean()))
        run.step()
    assert shares[0] == 0.0
    assert [abs(share - 0.08 * n) < 0.04 for n, share in enumerate(shares)] == [True] * 11


@pytest.mark.parametrize("fmt", [Affine(4), Product(4, points=8)], ids=repr)
def test_resuming_is_exact(fmt: Affine | Product) -> None:
    plan = {"*.weight": QuantNoise(fmt, p=Ramp(0.2, 0.6), refresh=4)}
    whole = network()
    train(whole, plan, 12)
    first = network()
    optimizer = torch.optim.Adam(first.parameters(), 1e-2)
    run = attach(first, plan, steps=12)
    for step in range(8):
        go(first, optimizer, step)
        run.step()
    saved = copy.deepcopy([first.state_dict(), optimizer.state_dict(), run.state_dict()])
    second = network()
    optimizer = torch.optim.Adam(second.parameters(), 1e-2)
    run = attach(second, plan, steps=12)
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    run.load_state_dict(saved[2])
    for step in range(8, 12):
        go(second, optimizer, step)
        run.step()
    assert same(whole, second)


def test_accumulated_gradients_see_one_draw() -> None:
    model = nn.Linear(32, 32, bias=False)
    run = attach(model, {"weight": QuantNoise(Affine(2), p=0.4)})
    outputs = [model(torch.eye(32)) for _ in range(2)]
    assert torch.equal(outputs[0], outputs[1])
    (outputs[0].sum() + outputs[1].sum()).backward()
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad, torch.full((32, 32), 2.0))
    run.step()
    assert not torch.equal(model(torch.eye(32)), outputs[0])


@pytest.mark.parametrize("fmt", [Affine(4, axis=0), Product(4, points=32)], ids=repr)
@pytest.mark.parametrize("p", [0.2, 0.7])
def test_weights_that_are_loaded_get_parameters_of_their_own(
    fmt: Affine | Product, p: float
) -> None:
    model = nn.Linear(16, 16, bias=False)
    run = attach(model, {"weight": QuantNoise(fmt, p=p)})
    model.load_state_dict({"weight": model.weight.detach() * 100})
    with torch.no_grad():
        moved = model(torch.eye(16)).T - model.weight
        assert 0 < moved.norm() < 0.7 * (model.weight * (moved != 0)).norm()
    assert torch.equal(
        run.surrogates["weight"].soft_bits(model.weight),
        torch.tensor(float(run.encode()["weight"].bits)),
    )


def test_noise_is_a_function_of_seed_step_and_name() -> None:
    def read(seed: int, name: str) -> Tensor:
        layer = nn.Linear(32, 32)
        nn.init.ones_(layer.weight)
        plan = {"*": QuantNoise(Affine(4), p=0.5, kind="proxy")}
        run = attach(nn.ModuleDict({name: layer}), plan, noise=Noise(seed))
        values: Tensor = run.surrogates[f"{name}.weight"](layer.weight)
        return values.detach()

    assert torch.equal(read(0, "a"), read(0, "a"))
    assert not torch.equal(read(0, "a"), read(1, "a"))
    assert not torch.equal(read(0, "a"), read(0, "b"))


def test_settings_survive_json_and_nonsense_is_refused() -> None:
    spec = QuantNoise(Product(8), p=Ramp(0.0, 0.2, shape="cosine"), kind="proxy", rescale=True)
    assert spec_from_json(spec_to_json(spec)) == spec
    for settings, text in (
        ({"p": 1.5}, "0 to 1"),
        ({"p": Ramp(0.0, 2.0)}, "0 to 1"),
        ({"block": 4}, "leave block out"),
        ({"kind": "noise"}, "kind"),
        ({"rescale": True}, "proxy"),
    ):
        with pytest.raises(SpecError, match=text):
            QuantNoise(Product(8), **settings)
    with pytest.raises(SpecError, match="Product"):
        QuantNoise(Affine(4), selection="clusters")
