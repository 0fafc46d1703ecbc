"""Mean outputs that codes move are taken back by what batch norms say, in no more bytes."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import dither
from dither import BudgetError, SpecError
from dither.search import correct_means
from dither.search.job import Job


def _seen(model: nn.Sequential) -> nn.Sequential:
    """The model with norms that say what passes through it, for normal inputs."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    model.train()
    shape = (256, 16) if isinstance(model[0], nn.Linear) else (64, 8, 9, 9)
    for _ in range(60):
        model(torch.randn(shape))
    return model.eval()


def _convolutions(bias: bool) -> nn.Sequential:
    return _seen(
        nn.Sequential(
            *(nn.Conv2d(8, 96, 1, bias=bias), nn.BatchNorm2d(96), nn.ReLU6()),
            *(nn.Conv2d(96, 96, 3, groups=96, bias=bias), nn.BatchNorm2d(96), nn.ReLU6()),
            *(nn.Conv2d(96, 64, 1, bias=bias), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
        )
    )


def _linear() -> nn.Sequential:
    hidden = (nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.SiLU())
    return _seen(
        nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), *hidden, nn.Linear(64, 9))
    )


MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "running means": lambda: _convolutions(bias=False),
    "biases": lambda: _convolutions(bias=True),
    "linear layers": _linear,
}


def _off(model: nn.Sequential, archive: dither.Archive) -> float:
    """Squared error of mean outputs."""
    generator = torch.Generator().manual_seed(5)
    shape = (4096, 16) if isinstance(model[0], nn.Linear) else (512, 8, 9, 9)
    inputs = torch.randn(shape, generator=generator)
    with torch.no_grad():
        wanted = model(inputs).mean(0)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        dither.load_into(model, archive)
        found = model(inputs).mean(0)
        model.load_state_dict(state)
    return float((found - wanted).square().sum())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", ["6x", "10x"])
def test_mean_outputs_come_back_in_no_more_bytes(name: str, size: str) -> None:
    model = MODELS[name]()
    plain = dither.compress(model, size)
    better = dither.compress(model, size, norms=True)
    total = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    assert better.nbytes <= total / int(size.rstrip("x"))
    assert _off(model, better) < 0.3 * _off(model, plain)


def _held(archive: dither.Archive) -> dict[str, torch.Tensor]:
    return {name: archive.encoded(name).decode() for name in archive.entries}


@pytest.mark.parametrize("name", MODELS)
def test_only_biases_and_running_means_change(name: str) -> None:
    model = MODELS[name]()
    plain = dither.compress(model, "10x")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = _held(plain), _held(correct_means(model, plain))
    assert {n.rpartition(".")[2] for n in first if not torch.equal(first[n], second[n])} <= {
        "bias",
        "running_mean",
    }
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_without_norms_or_room_the_file_stays() -> None:
    bare = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    archive = dither.compress(bare, "8x")
    assert correct_means(bare, archive) is archive
    model = _linear()
    archive = dither.compress(model, "8x")
    assert correct_means(model, archive, nbytes=100) is archive


class Branching(nn.Module):
    """Reads values to decide."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs) if inputs.sum() > 0 else inputs


def test_what_cannot_be_traced_is_refused_before_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Job, "archive", lambda *_: pytest.fail("searched"))
    with pytest.raises(SpecError, match="trac"):
        dither.compress(Branching(), "8x", norms=True)
    with pytest.raises(SpecError, match="give the model"):
        dither.compress(Branching().state_dict(), "8x", norms=True)


def test_a_wrapped_model_is_corrected_as_the_model() -> None:
    model = _linear()
    plain = dither.compress(model, "10x", norms=True)
    wrapped = dither.compress(nn.DataParallel(model), "10x", norms=True)
    assert plain.to_bytes() == wrapped.to_bytes()


def test_what_norms_cannot_say_is_refused_with_advice() -> None:
    model = _linear()
    with pytest.raises(SpecError, match="with data, samples say"):
        dither.compress(model, "8x", data=[torch.randn(8, 16)], norms=True)
    with pytest.raises(SpecError, match="without a base"):
        dither.compress(model, "8x", base=model.state_dict(), norms=True)
    with pytest.raises(BudgetError):
        dither.compress(model, 10, norms=True)
