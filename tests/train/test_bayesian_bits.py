"""Bayesian Bits: nested grids, gates, widths that give way to the regulariser, pruned channels."""

import pickle

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.archive import code
from dither.core import SpecError
from dither.formats import Affine, Mixed
from dither.train import BayesianBits, GatePenalty, Plan
from dither.train.bayesian_bits import GatedBits, hard_concrete, is_open, open_share


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def begun(spec: BayesianBits, weight: Tensor) -> GatedBits:
    surrogate = spec.begin(weight)
    assert isinstance(surrogate, GatedBits)
    return surrogate.train()


def set_width(surrogate: GatedBits, bits: int) -> None:
    """Open all gates up to a width, and none above."""
    with torch.no_grad():
        for number, width in enumerate([4, 8, 16][: len(surrogate.logits)]):
            surrogate.logits[number] = 40.0 if width <= bits else -40.0


def draw(surrogate: GatedBits, weight: Tensor, seed: int = 0) -> None:
    surrogate.draw(weight, torch.Generator().manual_seed(seed), 1)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("clip", [1.0, 0.4])
def test_open_gates_are_the_plain_quantizer_on_the_same_range(bits: int, clip: float) -> None:
    weight = numbers(40, 30)
    surrogate = begun(BayesianBits(), weight)
    with torch.no_grad():
        surrogate.log_range.add_(torch.tensor(clip).log())
    set_width(surrogate, bits)
    draw(surrogate, weight)
    largest = surrogate.log_range.detach().double().exp()
    step = 2 * largest / (2**bits - 1)
    inside = weight.double().clamp(-largest * (1 - 1e-7), largest * (1 - 1e-7))
    plain = (inside / step).round() * step
    with torch.no_grad():
        got = surrogate(weight).double()
    apart = (got - plain).abs()
    assert float(apart.max()) <= float(step) * 1.001  # float32 may round a tie the other way
    assert float((apart > 1e-6).double().mean()) < (0.02 if bits == 16 else 0.001)
    encoded = surrogate.encode(weight)
    assert encoded.format == Mixed(1200, grid="symmetric")
    torch.testing.assert_close(encoded.decode(), got.float(), rtol=0, atol=float(step) * 1.001)
    assert torch.equal(surrogate.eval()(weight), encoded.decode())
    assert set(encoded.codes["bits"].values.tolist()) == {bits}


@pytest.mark.parametrize("phi", [-3.0, -1.0, 0.0, 1.0, 4.0])
def test_gates_are_open_as_often_as_stated(phi: float) -> None:
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(1))
    gates = hard_concrete(torch.full((200_000,), phi), uniform)
    expected = float(open_share(torch.tensor(phi)))
    error = (expected * (1 - expected) / 200_000) ** 0.5
    assert float((gates > 0).double().mean()) == pytest.approx(expected, abs=5 * error)
    assert float(gates.min()) >= 0
    assert float(gates.max()) <= 1


def test_the_threshold_is_a_third_of_a_chance_of_zero() -> None:
    phi = torch.linspace(-4, 4, 81)
    assert torch.equal(is_open(phi), 1 - open_share(phi) < 0.34)


@pytest.mark.parametrize("prune", [False, True])
def test_gradients_are_those_of_the_formula(prune: bool) -> None:
    weight = numbers(5, 12).double()
    surrogate = begun(BayesianBits(prune=prune), weight.float())
    for parameter in surrogate.parameters():
        parameter.data = parameter.data.double()
    with torch.no_grad():
        surrogate.logits.copy_(torch.tensor([0.3, 0.1, -0.2]))
        surrogate.log_range.sub_(0.6)  # some weights are clipped
    draw(surrogate, weight)
    assert surrogate._uniform is not None
    surrogate._uniform.fill_(0.6)  # all gates are between 0 and 1
    weight.requires_grad_()
    upstream = numbers(5, 12, seed=4).double()
    leaves = [weight, *surrogate.parameters()]
    mine = torch.autograd.grad((surrogate.noisy(weight) * upstream).sum(), leaves)

    def rounded(x: Tensor) -> Tensor:
        return x + (x.round() - x).detach()

    gates, kept = surrogate.gates()
    largest = surrogate.log_range.exp()
    limit = largest * (1 - 1e-7)
    # The double ReLU of PACT; at its ends the gradient goes to the range.
    inside = torch.where(weight.abs() <= limit, weight, weight.sign() * largest)
    clipped = weight.detach().clamp(-limit.detach(), limit.detach())
    inside = inside + (clipped - inside).detach()
    step = largest * 2 / 3
    parts = [step * rounded(inside / step)]
    for bits in (2, 4, 8):
        step = step / (2**bits + 1)
        parts.append(step * rounded((inside - sum(parts)) / step))
    total = parts[3]
    for number in (2, 1, 0):
        total = parts[number] + gates[number] * total
    expected = total * kept.unsqueeze(1)
    theirs = torch.autograd.grad((expected * upstream).sum(), leaves)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_pruned_channels_cost_nothing() -> None:
    weight = numbers(16, 50)
    surrogate = begun(BayesianBits(prune=True, max_bits=4), weight)
    whole = code(surrogate.encode(weight)).nbytes
    assert surrogate.keep is not None
    with torch.no_grad():
        surrogate.keep[4:] = -8.0
    encoded = surrogate.encode(weight)
    assert encoded.codes["bits"].values.tolist() == [4] * 4 + [0] * 12
    assert encoded.codes["levels4"].values.numel() == 200
    assert not encoded.decode()[4:].any()
    assert code(encoded).nbytes < 0.4 * whole


def test_the_regulariser_is_the_papers() -> None:
    net = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 3, bias=False))
    plan = {"0.*": BayesianBits(prune=True), "1.*": BayesianBits(max_bits=8)}
    macs = {"0.weight": 24.0, "1.weight": 12.0}
    run = dither.attach(net, plan, penalties=[GatePenalty(0.1, macs)])
    first, second = run.surrogates.values()
    assert isinstance(first, GatedBits)
    assert isinstance(second, GatedBits)
    with torch.no_grad():
        first.logits.copy_(torch.tensor([1.0, 0.0, -1.0]))
        second.logits.copy_(torch.tensor([0.5, -0.5]))
        assert first.keep is not None
        first.keep.copy_(torch.tensor([2.0, 1.0, 0.0, -3.0]))
    q = [float(open_share(torch.tensor(phi))) for phi in (1.0, 0.0, -1.0, 0.5, -0.5)]
    kept = float(open_share(torch.tensor([2.0, 1.0, 0.0, -3.0])).mean())
    one = kept * (2 + 4 * q[0] + 8 * q[0] * q[1] + 16 * q[0] * q[1] * q[2])
    two = 2 + 4 * q[3] + 8 * q[3] * q[4]
    assert float(run.penalty().detach()) == pytest.approx(0.1 * (one + 0.5 * two), rel=1e-5)


def trained(mu: float) -> float:
    """Mean bits of a weight after a small task under a regulariser."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    run = dither.attach(net, {"*weight": BayesianBits(lr=0.05)}, penalties=[GatePenalty(mu)])
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    run.join(optimizer)
    for step in range(250):
        x = numbers(32, 16, seed=step)
        ((net(x) - x.flip(1)).square().mean() + run.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()
    gated = [s for s in run.surrogates.values() if isinstance(s, GatedBits)]
    return sum(float(s.widths().float().mean()) for s in gated) / len(gated)


def test_a_stronger_regulariser_leaves_fewer_bits() -> None:
    bits = [trained(mu) for mu in (0.0, 1e-3, 3.0)]
    assert bits[0] == 16
    assert 2 < bits[1] < 16
    assert bits[2] == 2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_soft_bits_track_the_file(bits: int) -> None:
    weight = numbers(120, 100)
    surrogate = begun(BayesianBits(), weight)
    set_width(surrogate, bits)
    soft = float(surrogate.soft_bits(weight).detach()) / 8
    assert soft == pytest.approx(code(surrogate.encode(weight)).nbytes, rel=0.03)


def test_a_wider_range_costs_what_soft_bits_say() -> None:
    weight = numbers(200, 100)
    surrogate = begun(BayesianBits(), weight)
    set_width(surrogate, 8)
    surrogate.soft_bits(weight).backward()
    assert surrogate.log_range.grad is not None
    before = code(surrogate.encode(weight)).nbytes
    surrogate.trim = 0.1
    octave = surrogate.log_range.grad.item() * 0.1 * 0.6931
    assert 8 * (code(surrogate.encode(weight)).nbytes - before) == pytest.approx(octave, rel=0.15)


def test_start_takes_the_step_that_was_found() -> None:
    weight = numbers(30, 20)
    surrogate = begun(BayesianBits(), weight)
    surrogate.start(Affine(None).assign(weight, {"scale": torch.tensor([0.11])}))
    assert surrogate.widths().tolist() == [8]
    step = 2 * float(surrogate.log_range.detach().exp()) / 255
    assert step == pytest.approx(float(torch.tensor(0.11)), rel=1e-5)


def test_specs_survive_json_pickling_and_refusal() -> None:
    spec = BayesianBits(max_bits=8, prune=True)
    plan = Plan({"*": spec})
    assert Plan.from_json(plan.to_json()) == plan
    assert eval(repr(spec)) == spec
    with pytest.raises(SpecError, match="2, 4, 8 or 16"):
        BayesianBits(max_bits=6)
    net = nn.Sequential(nn.Linear(12, 5))
    dither.attach(net, {"*weight": BayesianBits(prune=True)})
    again = pickle.loads(pickle.dumps(net.train()))
    assert torch.equal(net(numbers(3, 12)), again(numbers(3, 12)))
    with pytest.raises(SpecError, match="GatePenalty"):
        dither.attach(nn.Linear(2, 2), {"*": Affine(4)}, penalties=[GatePenalty(1.0)]).penalty()


def test_constant_zero_and_vector_weights() -> None:
    for weight in (torch.zeros(4, 8), torch.full((7,), 0.5), torch.tensor(2.0)):
        surrogate = begun(BayesianBits(prune=True), weight)
        draw(surrogate, weight)
        assert surrogate(weight).shape == weight.shape
        torch.testing.assert_close(surrogate.eval()(weight), weight, rtol=1e-3, atol=0)
        assert bool(surrogate.soft_bits(weight).isfinite())


# torch's compiler itself still makes instances of autograd functions
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole() -> None:
    weight = numbers(8, 16)
    surrogate = begun(BayesianBits(prune=True), weight)
    draw(surrogate, weight)
    weight.requires_grad_()
    compiled = torch.compile(lambda w: surrogate(w).square().sum(), fullgraph=True, backend="eager")
    for seed in (1, 2):
        draw(surrogate, weight.detach(), seed)
        torch.testing.assert_close(compiled(weight), surrogate(weight).square().sum())
