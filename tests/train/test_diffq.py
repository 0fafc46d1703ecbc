"""DiffQ: noise, gradients in closed form, the paper's sizes, and widths that reach a budget."""

import copy
import io
import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import dither
from dither.archive import code
from dither.core import SpecError
from dither.formats import Affine, Mixed, Raw
from dither.train import LSQ, DiffQ, DiffQSize, Plan, Size, model_size_mib, true_model_size_mib
from dither.train.diffq import LearnedBits, fill_noise
from dither.train.method import AfterTraining


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def begun(spec: DiffQ, weight: Tensor, spread: float = 0.0) -> LearnedBits:
    """A surrogate with noise drawn, whose widths are spread about where they began."""
    surrogate = spec.begin(weight)
    assert isinstance(surrogate, LearnedBits)
    with torch.no_grad():
        surrogate.logits.add_(numbers(len(surrogate.logits), seed=9), alpha=spread)
    surrogate.draw(weight, generator(), 0)
    return surrogate


def golden() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 512), nn.Conv2d(3, 8, 3))


# --- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "deviation"), [("gaussian", 0.5), ("uniform", 12**-0.5)])
def test_noise_has_the_stated_deviation(kind: str, deviation: float) -> None:
    noise = torch.empty(1_000_003)
    fill_noise(noise, kind, generator())
    assert float(noise.std()) == pytest.approx(deviation, rel=0.004)  # five standard errors
    assert abs(float(noise.mean())) < 5 * deviation / 1000
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 5 * deviation**2 / 1000
    if kind == "uniform":
        assert float(noise.abs().max()) < 0.5
    else:
        share = float((noise.abs() < deviation).double().mean())
        assert share == pytest.approx(0.6827, abs=0.0025)


def test_noise_is_scaled_by_each_groups_step_and_memory_is_reused() -> None:
    weight = numbers(64, 64)
    surrogate = begun(DiffQ(group=8), weight, spread=1.0)
    memory = surrogate._noise
    assert memory is not None
    assert "_noise" not in dict(surrogate.named_buffers())
    with torch.no_grad():
        first = surrogate.train()(weight) - weight
        assert torch.equal(first, surrogate(weight) - weight)
        step = (weight.max() - weight.min()) / (2 ** surrogate.bits() - 1)
        units = first.view(-1, 8) / step.unsqueeze(1)
    assert float(units.std()) == pytest.approx(0.5, rel=0.05)
    place = memory.data_ptr()
    surrogate.draw(weight, generator(1), 1)
    assert surrogate._noise is not None
    assert surrogate._noise.data_ptr() == place
    assert not torch.equal(first, surrogate(weight) - weight)


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("param", ["bits", "noise"])
@pytest.mark.parametrize("group", [0, 1, 8, 7, 100])
def test_gradients_are_those_of_the_formula(param: str, group: int) -> None:
    weight = numbers(9, 11)
    surrogate = begun(DiffQ(group=group, param=param, init_bits=4), weight, spread=0.7)
    surrogate.logits.data = surrogate.logits.data.double()
    weight = weight.double().requires_grad_()
    upstream = numbers(9, 11, seed=3).double()
    got = surrogate.train().noisy(weight)
    mine = torch.autograd.grad((got * upstream).sum(), [weight, surrogate.logits])

    noise = surrogate._noise
    assert noise is not None
    size = group or weight.numel()
    bits = surrogate.bits().repeat_interleave(size)[: weight.numel()].view(9, 11)
    step = (weight.max() - weight.min()) / (2**bits - 1)
    expected = weight + step * noise.double().view(9, 11)
    theirs = torch.autograd.grad((expected * upstream).sum(), [weight, surrogate.logits])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_slope_of_a_logit_in_closed_form() -> None:
    weight = torch.tensor([-1.0, 3.0, 0.5, 0.0])
    surrogate = begun(DiffQ(group=2, init_bits=5), weight)
    (surrogate.train()(weight).sum()).backward()
    share, noise = 3 / 13, surrogate._noise
    assert noise is not None
    assert surrogate.logits.grad is not None
    slope = -4.0 * 2**5 * torch.log(torch.tensor(2.0)) / 31**2 * 13 * share * (1 - share)
    torch.testing.assert_close(surrogate.logits.grad, slope * noise.view(2, 2).sum(1))


@pytest.mark.parametrize("param", ["bits", "noise"])
def test_widths_begin_as_asked_within_their_bounds(param: str) -> None:
    weight = numbers(40)
    surrogate = begun(DiffQ(init_bits=6.5, min_bits=3, max_bits=9, param=param), weight)
    torch.testing.assert_close(surrogate.bits().detach(), torch.full((5,), 6.5))
    with torch.no_grad():
        surrogate.logits.copy_(torch.tensor([-50.0, 50, 0, 1, -1]))
    bits = surrogate.bits().detach()
    assert float(bits[0]) == pytest.approx(3)
    assert float(bits[1]) == pytest.approx(9, rel=1e-5)
    assert bool((bits[2:] > 3).all() and (bits[2:] < 9).all())


# torch's compiler itself still makes instances of autograd functions
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole() -> None:
    weight = numbers(8, 16).requires_grad_()
    surrogate = begun(DiffQ(group=8), weight.detach()).train()
    compiled = torch.compile(lambda w: surrogate(w).square().sum(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(weight), surrogate(weight).square().sum())
    surrogate.draw(weight.detach(), generator(5), 1)
    torch.testing.assert_close(compiled(weight), surrogate(weight).square().sum())


# --- encoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [0, 1, 8, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_is_the_file(group: int, dtype: torch.dtype) -> None:
    weight = numbers(13, 9).to(dtype)
    surrogate = begun(DiffQ(group=group, extra_bits=0.3), weight, spread=2.0)
    encoded = surrogate.encode(weight)
    assert isinstance(encoded.format, Mixed)
    widths = (surrogate.bits() + 0.3).round().clamp(1, 15)
    assert torch.equal(encoded.codes["bits"].values.float(), widths)
    assert torch.equal(surrogate.eval()(weight), encoded.decode())
    low, high = weight.float().min(), weight.float().max()
    spread = widths.repeat_interleave(group or weight.numel())[: weight.numel()].view(13, 9)
    step = ((high - low) / (2**spread - 1)).detach()
    plain = ((weight.float() - low) / step).round() * step + low
    torch.testing.assert_close(encoded.decode(), plain.to(dtype))


def test_trim_lowers_widths_bit_by_bit() -> None:
    weight = numbers(64, 64)
    surrogate = begun(DiffQ(), weight)  # all at 8 bits: they must not all fall at once
    sizes = []
    for trim in [-0.25, 0, 0.46, 0.48, 0.5, 0.52, 1, 2, 4, 6, 7]:
        surrogate.trim = trim
        sizes.append(code(surrogate.encode(weight)).nbytes)
    assert all(large >= small for large, small in pairwise(sizes))
    assert len(set(sizes[2:6])) == 4
    assert sizes[-1] < 0.05 * sizes[1]
    surrogate.trim = 0
    assert set(surrogate.encode(weight).codes["bits"].values.tolist()) == {8}


def test_start_takes_the_steps_that_were_found() -> None:
    weight = numbers(32, 24)
    surrogate = begun(DiffQ(), weight)
    steps = torch.linspace(0.02, 0.3, 32)
    surrogate.start(Affine(None, axis=0).assign(weight, {"scale": steps}))
    own = (weight.max() - weight.min()) / (2 ** surrogate.bits() - 1)
    torch.testing.assert_close(own.detach(), steps.repeat_interleave(3), rtol=0.05, atol=0)
    before = surrogate.logits.detach().clone()
    surrogate.start(Raw().encode(weight))
    assert torch.equal(before, surrogate.logits.detach())


def test_small_and_empty_tensors_stay_as_they_are() -> None:
    assert isinstance(DiffQ(min_size=0.01).begin(torch.zeros(2621)), AfterTraining)
    assert isinstance(DiffQ(min_size=0.01).begin(torch.zeros(2622)), LearnedBits)
    assert isinstance(DiffQ().begin(torch.zeros(0, 3)), AfterTraining)


def test_constant_weights_have_no_noise_and_survive() -> None:
    weight = torch.full((4, 8), 0.3)
    surrogate = begun(DiffQ(), weight)
    assert torch.equal(surrogate.train()(weight), weight)
    assert torch.equal(surrogate.eval()(weight), weight)
    assert bool(surrogate.soft_bits(weight).isfinite())


def test_specs_survive_json_and_bad_ones_are_refused() -> None:
    spec = DiffQ(group=16, noise="uniform", param="noise", init_bits=5.5, min_size=0.01)
    plan = Plan({"*": spec})
    assert Plan.from_json(plan.to_json()) == plan
    assert eval(repr(spec)) == spec
    for bad in ({"group": -1}, {"min_bits": 9}, {"max_bits": 16}, {"noise": "pink"}, {"param": ""}):
        with pytest.raises(SpecError):
            DiffQ(**bad)


def test_pickles_and_copies_with_its_noise() -> None:
    net = nn.Sequential(nn.Linear(12, 5))
    dither.attach(net, {"*weight": DiffQ()})
    net.train()
    x = numbers(3, 12)
    again = pickle.loads(pickle.dumps(net))
    assert torch.equal(net(x), again(x))
    assert torch.equal(net(x), copy.deepcopy(net)(x))


def test_resumes_exactly() -> None:
    def steps(net: nn.Module, run: dither.Run, count: int) -> None:
        for _ in range(count):
            (net(numbers(4, 12)).square().mean() + run.penalty()).backward()
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05)  # no state of its own
            optimizer.step()
            optimizer.zero_grad()
            run.step()

    def made() -> tuple[nn.Module, dither.Run]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(12, 6))
        return net, dither.attach(net, {"*weight": DiffQ()}, penalties=[Size(1e3)])

    net, run = made()
    steps(net, run, 13)
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "run": run.state_dict()}, file)
    steps(net, run, 4)
    other, again = made()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["run"])
    steps(other, again, 4)
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "half", "expected"),
    [
        (DiffQ(min_size=0.01), False, 0.26453495025634766),
        (DiffQ(min_size=0.01), True, 0.26313114166259766),
        (Affine(4, grid="endpoint"), False, 0.12781524658203125),
        (LSQ(4), False, 0.12781143188476562),
    ],
)
def test_sizes_are_the_packages_own(spec: object, half: bool, expected: float) -> None:
    glob = "*" if isinstance(spec, DiffQ) else "0.weight"
    run = dither.attach(golden(), {glob: spec})  # type: ignore[dict-item]
    assert float(true_model_size_mib(run, half=half)) == pytest.approx(expected, rel=1e-7)
    assert float(model_size_mib(run, half=half).detach()) == pytest.approx(expected, rel=1e-6)


def test_size_counts_ragged_groups_ties_and_rounding() -> None:
    net = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    net[1].weight = net[0].weight
    run = dither.attach(net, {"*": DiffQ(group=8, init_bits=6.4)})
    exact, soft = float(true_model_size_mib(run)), float(model_size_mib(run).detach())
    assert exact * 2**23 == pytest.approx(25 * 6 + 72 + 3 * 4)
    assert soft * 2**23 == pytest.approx(25 * 6.4 + 72 + 3 * 4)


@pytest.mark.parametrize("exact", [False, True])
def test_the_papers_penalty_and_its_slope(exact: bool) -> None:
    net = nn.Sequential(nn.Linear(16, 16, bias=False))
    run = dither.attach(net, {"*": DiffQ()}, penalties=[DiffQSize(5.0, exact=exact)])
    run.penalty().backward()
    (surrogate,) = run.surrogates.values()
    assert isinstance(surrogate, LearnedBits)
    assert surrogate.logits.grad is not None
    share = 6 / 13
    slope = 5.0 * 8 * 13 * share * (1 - share) / 2**23
    torch.testing.assert_close(surrogate.logits.grad, torch.full((32,), slope))


def test_widths_move_away_from_where_they_began_and_bytes_follow() -> None:
    net = nn.Sequential(nn.Linear(64, 64))
    run = dither.attach(net, {"*weight": DiffQ(lr=0.03)}, penalties=[DiffQSize(100.0)])
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    run.join(optimizer)
    before, counted = run.measure(), float(true_model_size_mib(run))
    for step in range(60):
        x = numbers(32, 64, seed=step) * torch.linspace(0, 2, 64)  # some inputs matter more
        (0.01 * (net(x) - x).square().mean() + run.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()
    widths = run.encode()["0.weight"].codes["bits"].values
    assert widths.max() <= 8
    assert widths.float().mean() < 6
    assert run.measure() < 0.8 * before
    assert float(true_model_size_mib(run)) < 0.8 * counted


# --- the coded size ------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 8])
def test_soft_bits_track_the_file_on_real_weights(data_dir: Path, group: int) -> None:
    weights = load_file(data_dir / "resnet20-cifar10.safetensors")
    matrices = [w for w in weights.values() if w.ndim > 1][::3]
    for bits, spread in [(2.2, 0.2), (3, 0.3), (4, 0.0), (5.4, 0.5), (8, 0.3), (11, 0.3)]:
        soft = nbytes = 0.0
        for weight in matrices:
            surrogate = begun(DiffQ(group=group, init_bits=bits), weight, spread=spread)
            soft += float(surrogate.soft_bits(weight).detach()) / 8
            nbytes += code(surrogate.encode(weight)).nbytes
        assert soft == pytest.approx(nbytes, rel=0.03), (bits, spread)


def test_slopes_of_soft_bits_are_those_of_the_file() -> None:
    weight = numbers(200, 100)
    surrogate = begun(DiffQ(init_bits=5), weight, spread=0.3)
    weight.requires_grad_()
    surrogate.soft_bits(weight).backward()
    assert surrogate.logits.grad is not None
    assert weight.grad is not None

    def nbytes(w: Tensor) -> float:
        return 8 * code(surrogate.encode(w.detach())).nbytes

    with torch.no_grad():
        before = nbytes(weight)
        surrogate.logits.add_(0.2)
        wider = nbytes(weight) - before
        surrogate.logits.sub_(0.2)
        # Shrinking all weights but those at the ends keeps the range and saves bits.
        middle = (weight.abs() < 2.5).float()
        smaller = nbytes(weight * (1 - 0.1 * middle)) - before
    predicted = 0.2 * float(surrogate.logits.grad.sum())
    assert predicted == pytest.approx(wider, rel=0.1)
    shrinking = -0.1 * float((weight.grad * weight.detach() * middle).sum())
    assert shrinking == pytest.approx(smaller, rel=0.2)
