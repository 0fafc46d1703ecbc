"""Learned points: Polino et al. 2018's formulas, gradients, sizes and files."""

import heapq
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.archive import code
from dither.core import SpecError
from dither.train import LearnedCodebook, Plan, gradient_norms, redistribute
from dither.train.learned_codebook import LearnedPoints, polino_bits


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(weight: Tensor, levels: int, bucket: int) -> Tensor:
    """The paper's uniform quantizer, written from its formula; the last bucket is padded."""
    flat = weight.flatten()
    padded = torch.cat([flat, flat[-1:].expand(-len(flat) % bucket)]).reshape(-1, bucket)
    low = padded.amin(1, keepdim=True)
    alpha = padded.amax(1, keepdim=True) - low
    alpha = torch.where(alpha < 1e-10, 1.0, alpha)
    place = ((padded - low) / alpha * (levels - 1)).round() / (levels - 1)
    return (alpha * place + low).flatten()[: len(flat)].reshape(weight.shape)


def surrogate(weight: Tensor, **settings: object) -> LearnedPoints:
    made = LearnedCodebook(**settings).begin(weight)  # type: ignore[arg-type]
    assert isinstance(made, LearnedPoints)
    return made


def test_uniform_points_are_the_papers_uniform_quantizer() -> None:
    weight = weights(7, 100)
    made = surrogate(weight, points=16, bucket=64, init="uniform", dtype=torch.float32)
    assert torch.allclose(made.noisy(weight), uniform(weight, 16, 64), atol=1e-6)


@pytest.mark.parametrize("init", ["quantiles", "uniform"])
@pytest.mark.parametrize("train_weights", [False, True])
def test_training_evaluation_and_encoding_agree(init: str, train_weights: bool) -> None:
    weight = nn.Parameter(weights(9, 50))
    made = surrogate(weight, points=5, bucket=32, init=init, train_weights=train_weights)
    training = made(weight)
    assert torch.equal(training, made.encode(weight.detach()).decode())
    assert torch.equal(training, made.eval()(weight))


def test_a_points_gradient_is_the_sum_over_its_weights_of_range_times_gradient() -> None:
    weight = nn.Parameter(weights(3, 40))
    made = surrogate(weight, points=4, bucket=16, dtype=torch.float32)
    goal = weights(3, 40, seed=1)
    ((made(weight) - goal) ** 2).sum().backward()

    encoded = made.encode(weight.detach())
    points = encoded.params["points"].clone().requires_grad_()
    scale = encoded.params["scale"].repeat_interleave(16)[: weight.numel()]
    offset = encoded.params["offset"].repeat_interleave(16)[: weight.numel()]
    chosen = encoded.codes["indices"].values.flatten().long()
    values = (points[chosen] * scale + offset).reshape(weight.shape)
    ((values - goal) ** 2).sum().backward()

    assert points.grad is not None
    assert points.grad.abs().min() > 0
    assert made.points.grad is not None
    assert torch.allclose(made.points.grad, points.grad, rtol=1e-5)
    assert weight.grad is None, "weights are frozen"


def test_gradients_reach_weights_straight_through_where_these_learn() -> None:
    weight = nn.Parameter(weights(3, 40))
    made = surrogate(weight, points=4, train_weights=True, learn=False, init="uniform")
    (made(weight) * weights(3, 40, seed=1)).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, weights(3, 40, seed=1))
    assert made.points.grad is None


def test_gradients_of_unsorted_points_reach_the_right_ones() -> None:
    weight = weights(2, 30)
    made = surrogate(weight, points=3, bucket=60)
    with torch.no_grad():
        made.points.copy_(torch.tensor([0.8, 0.2, 0.5]))
    values = made(weight)
    encoded = made.encode(weight)
    members = encoded.codes["indices"].values == 0  # of the least point, 0.2
    (values * members).sum().backward()
    assert made.points.grad is not None
    assert made.points.grad[1] == pytest.approx(float(encoded.params["scale"]) * int(members.sum()))
    assert made.points.grad[[0, 2]].tolist() == [0.0, 0.0]


def test_points_are_sorted_again_at_each_step() -> None:
    made = surrogate(weights(2, 30), points=3)
    with torch.no_grad():
        made.points.copy_(torch.tensor([0.8, 0.2, 0.5]))
    made.draw(weights(2, 30), torch.Generator(), 1)
    assert torch.equal(made.points.detach(), torch.tensor([0.2, 0.5, 0.8]))


def test_sizes_are_the_papers() -> None:
    ratios = [32 * 4096 / polino_bits(4096, bits) for bits in (2, 4, 8)]
    assert [round(r, 2) for r in ratios] == [14.22, 7.53, 3.88]
    for bits in (2, 4, 8):
        made = surrogate(weights(16, 256), points=2**bits)
        encoded = made.encode(weights(16, 256))
        stored = encoded.params["points"].numel() * 16
        assert encoded.bits - stored == polino_bits(4096, bits)
        assert float(made.soft_bits(weights(16, 256))) == encoded.bits


def huffman_bits(symbols: list[int]) -> int:
    """Bits of a Huffman code for these symbols, without its table."""
    heap = list(Counter(symbols).values())
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        total += both
        heapq.heappush(heap, both)
    return total


def test_files_are_smaller_than_huffman_with_its_table() -> None:
    weight = weights(64, 256)
    made = surrogate(weight, points=16, init="uniform")
    encoded = made.encode(weight)
    codes = encoded.codes["indices"].values.flatten().tolist()
    params = sum(p.numel() * p.element_size() for p in encoded.params.values())
    table = 16  # one byte for the code length of each symbol
    assert code(encoded).nbytes < huffman_bits(codes) / 8 + table + params


def test_buckets_help_where_scales_differ() -> None:
    weight = weights(8, 256) * torch.logspace(-1, 1, 8)[:, None]
    errors = [
        float((surrogate(weight, bucket=b, init="uniform", learn=False)(weight) - weight).norm())
        for b in (256, weight.numel())
    ]
    assert errors[0] < 0.7 * errors[1]


def test_learning_points_lowers_the_loss_and_leaves_weights_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.pow_(3).mul_(10)  # long tails: uniform points stand badly
    inputs = weights(256, 16)
    goals = model(inputs).detach()
    before = [p.detach().clone() for p in model.parameters()]
    run = dither.attach(model, {"*.weight": LearnedCodebook(4, init="uniform", lr=3e-3)})
    optimizer = torch.optim.Adam(run.extras.groups())
    losses = []
    for _ in range(40):
        loss = (model(inputs) - goals).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    after = run.detach().parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_file_is_what_was_evaluated_and_resuming_is_exact(tmp_path: Path) -> None:
    def begin() -> tuple[nn.Module, dither.Run, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        plan = {"*.weight": LearnedCodebook(6, train_weights=True)}
        return model, dither.attach(model, plan, optimizer=optimizer), optimizer

    def train(model: nn.Module, run: dither.Run, optimizer: torch.optim.Optimizer) -> None:
        for step in range(run.done, run.done + 4):
            loss = model(weights(16, 8, seed=step)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step()

    model, run, optimizer = begin()
    train(model, run, optimizer)
    saved = [part.state_dict() for part in (model, optimizer, run)]
    torch.save(saved, tmp_path / "half.pt")
    train(model, run, optimizer)

    other, again, another = begin()
    states = torch.load(tmp_path / "half.pt", weights_only=True)
    other.load_state_dict(states[0])
    another.load_state_dict(states[1])
    again.load_state_dict(states[2])
    train(other, again, another)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )

    run.finish()
    run.save(tmp_path / "model.dither")
    plain = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    dither.load_into(plain, tmp_path / "model.dither")
    assert torch.equal(model.eval()(weights(5, 8)), plain.eval()(weights(5, 8)))


def test_gradient_norms_are_averages_over_batches_and_leave_gradients_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    first, second = model.get_parameter("0.weight"), model.get_parameter("1.weight")
    first.grad = torch.ones_like(first)
    batches = [weights(6, 4, seed=s) for s in range(3)]

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        result: Tensor = net(batch).square().sum()
        return result

    norms = gradient_norms(model, loss, batches, ["0.weight", "1.weight"])
    assert first.grad.eq(1).all()
    wanted = 0.0
    for batch in batches:
        (g,) = torch.autograd.grad(loss(model, batch), [second])
        wanted += float(g.norm()) / 3
    assert norms["1.weight"] == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(SpecError, match="mini-batch"):
        gradient_norms(model, loss, [], ["0.weight"])


def test_points_are_given_out_by_gradient_and_none_is_lost() -> None:
    norms = {"a": 5.0, "b": 1.0, "c": 0.1, "d": 0.0}
    for points in (4, 5, 16, 255):
        counts = redistribute(points, norms)
        assert sum(counts.values()) == 4 * points
        assert sorted(counts.values(), reverse=True) == list(counts.values())
        assert min(counts.values()) >= points // 2
    assert set(redistribute(16, dict.fromkeys("abc", 0.0)).values()) == {16}
    with pytest.raises(SpecError, match="finite"):
        redistribute(16, {"a": float("nan")})


def test_settings_survive_json_and_bad_ones_are_refused() -> None:
    plan = Plan({"*": LearnedCodebook(12, bucket=64, dtype=torch.float32)})
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(SpecError, match="quantiles or uniform"):
        LearnedCodebook(init="random")
    with pytest.raises(SpecError, match="points"):
        LearnedCodebook(1)


def test_tensors_with_few_values_have_few_points() -> None:
    model = nn.BatchNorm1d(10)  # weights all 1, biases all 0
    run = dither.attach(model, {"*": LearnedCodebook(16)})
    assert run.finish() > 0
    assert torch.equal(run.archive["weight"], torch.ones(10))
