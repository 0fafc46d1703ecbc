"""Kinds of models that random ones brought up: none may end in a raw exception, or be changed."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

import dither


@pytest.mark.parametrize("kind", ["spectral_norm", "weight_norm", "orthogonal"])
def test_data_change_nothing_in_a_parametrized_model_in_training(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24)).train()
    getattr(parametrizations, kind)(model[2])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dither.compress(model, "3x", data=[torch.randn(20, 24)])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("wrap", [AveragedModel, nn.DataParallel])
def test_wrapped_models_are_attached_inside(wrap: type[nn.Module]) -> None:
    with pytest.raises(dither.SpecError, match=r"wrapped already; attach to the plain model"):
        dither.attach(wrap(nn.Linear(30, 40)), budget="4x", steps=5)


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.bool, torch.int8],
)
def test_buffers_of_any_type_are_finished_with(dtype: torch.dtype) -> None:
    model = nn.Linear(30, 40)
    model.register_buffer("held", torch.randn(4, 8).to(dtype))
    run = dither.attach(model, budget="3x", steps=2)
    nbytes = run.finish()
    assert nbytes <= 1240 * 4 // 3 + 4 * 8 * model.get_buffer("held").element_size() // 3
    assert run.archive["held"].dtype == dtype


class Beside(nn.Module):
    """A model, not the wrapper of one, some part of which is called as the wrapper's is."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)
        self.add_module(name, nn.Linear(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


@pytest.mark.parametrize("name", ["_orig_mod", "module"])
def test_a_part_named_like_a_wrapped_model_is_a_part(name: str) -> None:
    model = Beside(name)
    archive = dither.compress(model, "3x", data=[torch.randn(20, 12)])
    assert set(archive) == set(model.state_dict())
    assert dither.load_into(Beside(name), archive).exact
