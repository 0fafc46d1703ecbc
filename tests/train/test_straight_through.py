"""Quantization-aware training: what is read, and what gets a gradient."""

import pytest
import torch
from torch import Tensor, nn

from dither import Affine, Codebook, Mixed, Product, SpecError, StraightThrough, attach
from dither.core import Format
from dither.train.method import spec_from_json, spec_to_json
from dither.train.noise import Noise
from dither.train.surrogate import Surrogate

FORMATS = [
    Affine(4),
    Affine(4, axis=0),
    Affine(8, axis=1, grid="asymmetric"),
    Affine(3, group=7, grid="endpoint", scale_dtype=torch.float16),
    Affine(1),
    Affine(16),
    Affine(None),
    Codebook(8),
    Product(4, points=16),
    Product(5, points=16, dtype=torch.int8),
    Mixed(4),
]


def weight_of(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1)


def draw(surrogate: Surrogate, weight: Tensor, step: int = 0) -> None:
    generator = Noise(0).generator(step, "weight", weight.device)
    surrogate.draw(weight.detach(), generator, step)


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("shape", [(48, 40), (6, 3, 3, 3), (13,)])
def test_training_reads_what_the_file_would_hold(fmt: Format, shape: tuple[int, ...]) -> None:
    if len(shape) == 1 and isinstance(fmt, Affine) and fmt.axis == 1:
        pytest.skip("a vector has no second axis")
    weight = weight_of(*shape)
    with torch.no_grad():
        weight.view(-1)[::5] = weight.abs().max() / 7 * 1.5  # ties between codes
    surrogate = StraightThrough(fmt).begin(weight.detach())
    draw(surrogate, weight)
    read = surrogate(weight)
    assert torch.equal(read, surrogate.encode(weight.detach()).decode())
    read.backward(torch.ones_like(read))
    if fmt != Affine(1):
        assert weight.grad is not None
        assert torch.equal(weight.grad, torch.ones(shape))


@pytest.mark.parametrize("grid", ["symmetric", "asymmetric", "endpoint"])
def test_between_two_codes_of_a_fine_grid_nothing_is_clipped(grid: str) -> None:
    weight = weight_of(200, 200)
    surrogate = StraightThrough(Affine(16, grid=grid)).begin(weight.detach())
    draw(surrogate, weight)
    surrogate(weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(200, 200))


def test_the_gradient_stops_where_a_stale_range_clips() -> None:
    weight = weight_of(40, 10)
    surrogate = StraightThrough(Affine(4, axis=0), refresh=100).begin(weight.detach())
    draw(surrogate, weight)
    with torch.no_grad():
        weight[3] *= 4
    draw(surrogate, weight, step=1)
    read = surrogate(weight)
    read.backward(torch.ones_like(read))
    scale = weight.detach()[3].abs().max() / 4 / 7
    place = weight.detach()[3] / scale
    assert weight.grad is not None
    assert torch.equal(weight.grad[:3], torch.ones(3, 10))
    sure = ((place - 7.5).abs() > 0.6) & ((place + 8.5).abs() > 0.6)
    assert torch.equal(weight.grad[3][sure], ((place <= 7) & (place >= -8)).float()[sure])
    assert 0 < weight.grad[3].sum() < 10
    draw(surrogate, weight, step=100)  # chosen anew
    assert torch.equal(surrogate(weight), surrogate.encode(weight.detach()).decode())


def test_stochastic_rounding_leaves_the_mean_where_it_was() -> None:
    weight = weight_of(64, 20)
    surrogate = StraightThrough(Affine(3), stochastic=True).begin(weight.detach())
    total, draws = torch.zeros_like(weight), 400
    for step in range(draws):
        draw(surrogate, weight, step)
        total += surrogate(weight).detach()
    encoded = surrogate.encode(weight.detach())
    scale = encoded.params["scale"].item()
    grid = surrogate(weight).detach() / scale
    assert torch.allclose(grid, grid.round(), atol=1e-5)
    error = (total / draws - weight.detach()) / scale
    assert error.abs().max() < 5 * 0.5 / draws**0.5
    assert error.mean().abs() < 5 * 0.5 / (draws * weight.numel()) ** 0.5
    surrogate.eval()
    assert torch.equal(surrogate(weight), encoded.decode())


def test_draws_repeat_within_a_step_and_differ_between_steps() -> None:
    weight = weight_of(32, 8)
    surrogate = StraightThrough(Affine(3), stochastic=True).begin(weight.detach())
    draw(surrogate, weight)
    first = surrogate(weight).detach().clone()
    assert torch.equal(first, surrogate(weight))
    draw(surrogate, weight, step=1)
    assert not torch.equal(first, surrogate(weight))


def test_memory_that_is_used_again_spoils_no_gradient_unseen() -> None:
    weight = weight_of(4, 4)
    surrogate = StraightThrough(Affine(4)).begin(weight.detach())
    draw(surrogate, weight)
    old = (surrogate(weight) * surrogate(weight)).sum()
    draw(surrogate, weight, step=1)
    with torch.no_grad():
        weight.mul_(2)
    surrogate(weight)
    with pytest.raises(RuntimeError, match=r"modified .*inplace"):
        old.backward()


def test_narrow_weights_do_not_share_what_is_kept() -> None:
    weight = nn.Parameter(weight_of(16, 16).detach().bfloat16())
    surrogate = StraightThrough(Affine(4)).begin(weight.detach())
    draw(surrogate, weight)
    first = surrogate(weight)
    assert first.dtype == torch.bfloat16
    with torch.no_grad():
        weight.mul_(0.5)
    assert not torch.equal(first, surrogate(weight))


def test_least_squared_error_clips() -> None:
    weight = weight_of(64, 64)
    with torch.no_grad():
        weight[0, 0] = 2.0
    losses = []
    for ranges in ("minmax", "mse"):
        surrogate = StraightThrough(Affine(4), ranges=ranges).begin(weight.detach())
        draw(surrogate, weight)
        read = surrogate(weight)
        assert torch.equal(read, surrogate.encode(weight.detach()).decode())
        losses.append(float((read - weight).detach()[1:].square().sum()))
    assert losses[1] < losses[0] / 2


def test_training_through_four_bits_beats_rounding_afterwards() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(256, 16)
    wanted = torch.relu(inputs @ torch.randn(16, 8))
    models = []
    for spec in (Affine(3), StraightThrough(Affine(3))):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        run = attach(model, {"*.weight": spec}, steps=200)
        for _ in range(200):
            loss = nn.functional.mse_loss(model(inputs), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step()
        run.finish()
        model.eval()
        models.append(nn.functional.mse_loss(model(inputs), wanted).item())
    assert models[1] < 0.75 * models[0]


def test_settings_survive_json_and_nonsense_is_refused() -> None:
    spec = StraightThrough(Affine(4, grid="asymmetric"), stochastic=True, refresh=10)
    assert spec_from_json(spec_to_json(spec)) == spec
    with pytest.raises(SpecError, match="bounded Affine"):
        StraightThrough(Codebook(4), stochastic=True)
    with pytest.raises(SpecError, match="refresh"):
        StraightThrough(Affine(4), refresh=0)
    with pytest.raises(SpecError, match="mse"):
        StraightThrough(Product(4), ranges="mse")
