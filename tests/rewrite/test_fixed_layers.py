"""Layers whose weights are made elsewhere, read elsewhere or hooked are left as they are."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from dither.rewrite import equalize, fold_batch_norm


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 4)
    )
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(torch.logspace(-1, 1, 6)[:, None])
    return model


def weight_norm(model: nn.Sequential) -> None:
    parametrizations.weight_norm(model[2])


def orthogonal(model: nn.Sequential) -> None:
    parametrizations.orthogonal(model[2])


def old_weight_norm(model: nn.Sequential) -> None:

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[2])


def pruned(model: nn.Sequential) -> None:
    prune.l1_unstructured(model[2], "weight", 0.3)


def hooked(model: nn.Sequential) -> None:
    model[2].register_forward_hook(lambda module, args, output: output.tanh())


def tied(model: nn.Sequential) -> None:
    model[4].weight = model[2].weight


def tied_transposed(model: nn.Sequential) -> None:
    model[4].weight = nn.Parameter(model.get_parameter("2.weight").detach().t())


def tied_bias(model: nn.Sequential) -> None:
    model[5] = nn.Linear(6, 6)
    model[5].bias = model[2].bias


CHANGES: list[Callable[[nn.Sequential], None]] = [
    *(weight_norm, orthogonal, old_weight_norm, pruned),
    *(hooked, tied, tied_transposed, tied_bias),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_equalize_keeps_the_function(change: Callable[[nn.Sequential], None]) -> None:
    model = plain()
    change(model)
    x = torch.randn(16, 6)
    expected: Tensor = model.eval()(x)
    with pytest.warns(UserWarning, match=r"left as they are.* 2: "):
        factors = equalize(model, [("0", "2"), ("2", "4"), ("4", "5")])
    assert "2" not in factors
    assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_fold_keeps_the_function(change: Callable[[nn.Sequential], None]) -> None:
    model = plain()
    change(model)
    norm = nn.BatchNorm1d(6)
    norm.get_buffer("running_var").uniform_(0.5, 2)
    norm.get_buffer("running_mean").normal_()
    model.insert(3, norm)
    x = torch.randn(16, 6)
    expected: Tensor = model.eval()(x)
    with pytest.warns(UserWarning, match=r"left as they are.* 2: "):
        assert fold_batch_norm(model, [("2", "3")]) == {}
    assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-4)


def test_free_layers_are_changed_without_a_word() -> None:
    assert equalize(plain()).keys() == {"0", "2", "4"}
