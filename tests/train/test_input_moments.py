"""Moments of inputs: they say what an error of a block does to the outputs, for all kinds."""

import copy

import pytest
import torch
from torch import Tensor, nn

import dither
from dither import Product, ProductCodes
from dither.calibrate import collect
from dither.train import IterativePQ
from dither.train.input_moments import input_metrics
from dither.train.ipq import LearnedCentroids
from tests.calibrate.test_collect import CONVOLUTIONS, normal


def numbers_of(spec: nn.Module) -> int:
    """A block: as long as the kernel, or half of the inputs of a matrix."""
    weight = spec.get_parameter("weight")
    return weight[0, 0].numel() if weight.ndim > 2 else weight.shape[1] // 2


@pytest.mark.parametrize(("layer", "shape"), [*CONVOLUTIONS, (nn.Linear(6, 4), (3, 5, 6))], ids=str)
def test_a_metric_is_the_squared_error_of_the_outputs(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    values, block = normal(*shape), numbers_of(layer)
    metric = input_metrics(layer, {}, {"weight": block}, [values])["weight"]
    error, change = normal(block, seed=1), copy.deepcopy(layer)
    change.register_parameter("bias", None)
    weight = change.get_parameter("weight")
    total = 0.0
    with torch.no_grad():
        for start in range(0, weight.numel(), block):  # the same error in each block by itself
            weight.zero_().view(-1)[start : start + block] = error
            total += float(change(values).double().square().sum())
    # Rows of one group read the same inputs.
    axis = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
    alike = weight.shape[axis]
    if axis == 0:
        alike //= getattr(layer, "groups", 1)
    assert float(error.double() @ metric @ error.double()) == pytest.approx(total / alike, rel=1e-4)


def test_what_does_not_fit_blocks_is_left_out() -> None:
    for layer, shape, block in (
        (nn.Linear(6, 4), (2, 6), 4),
        (nn.Conv2d(2, 2, 3), (1, 2, 5, 5), 4),
        (nn.ConvTranspose2d(2, 4, 3), (1, 2, 5, 5), 18),  # two outputs
        (nn.Embedding(6, 4), (), 2),
    ):
        values = torch.arange(3) if not shape else normal(*shape)
        assert input_metrics(layer, {}, {"weight": block}, [values]) == {}


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.memory = nn.LSTM(16, 8, 2, batch_first=True)

    def forward(self, values: Tensor) -> Tensor:
        attended, _ = self.attention(values, values, values, need_weights=False)
        found: Tensor = self.memory(attended)[0]
        return found


def test_inner_inputs_are_those_of_the_weights_placed_so_far() -> None:
    model, data = Attending(), [normal(4, 6, 16), normal(3, 6, 16, seed=1)]
    names = [name for name, weight in model.named_parameters() if weight.ndim > 1]
    run = dither.attach(model, dict.fromkeys(names, ProductCodes(Product(4, 16))))
    first = ["attention.in_proj_weight", "memory.weight_ih_l0"]
    for name in first:
        surrogate = run.surrogates[name]
        assert isinstance(surrogate, LearnedCentroids)
        surrogate.place(run.parameter(name))
    found = input_metrics(model, run.surrogates, dict.fromkeys(names, 4), data)

    plain = Attending()
    with torch.no_grad():
        for name in first:
            plain.get_parameter(name).copy_(run.encode()[name].decode())
    stats = collect(plain, data)
    assert set(found) == set(names)
    for name in names:
        gram = stats[name].gram
        assert gram is not None
        grams = gram if gram.ndim == 3 else gram[None]
        blocks = [g[n : n + 4, n : n + 4] for g in grams for n in range(0, g.shape[1], 4)]
        expected = stats[name].samples * torch.stack(blocks).sum(0)
        assert torch.allclose(found[name].float(), expected, rtol=1e-4, atol=1e-4), name


def test_grouped_and_padded_layers_are_placed_by_their_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 32, 3, padding="same", groups=2), nn.ReLU(), nn.Conv2d(32, 16, 3, groups=4)
    )
    values = normal(8, 4, 9, 9) * torch.linspace(0.02, 3, 9)  # few columns matter
    with torch.no_grad():
        wanted = model(values)
    errors = []
    for loader in (None, [values]):
        trained = copy.deepcopy(model)
        run = dither.attach(
            trained,
            {"*.weight": ProductCodes(Product(9, 8))},
            schedules=[IterativePQ(1, "layers", data=loader)],
        )
        run.step()
        run.finish()
        with torch.no_grad():
            errors.append(float((trained.eval()(values) - wanted).square().mean()))
    assert errors[1] < 0.97 * errors[0]
