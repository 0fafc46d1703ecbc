"""An impossible budget says which tensors are kept exactly, and why."""

import math

import pytest
import torch
from torch import Tensor, nn

import dither

EXACT = {
    "NaN or infinite": torch.cat([torch.randn(4095), torch.tensor([math.nan])]).view(64, 64),
    "NaN or infinite values": torch.cat([torch.randn(4095), torch.tensor([math.inf])]).view(64, 64),
    "int32": torch.randint(-(2**30), 2**30, (64, 64), dtype=torch.int32),
    "complex": torch.randn(64, 64, dtype=torch.complex64),
    "beyond float32": torch.randn(64, 64, dtype=torch.float64) * 1e200,
}


@pytest.mark.parametrize(("why", "value"), EXACT.items(), ids=EXACT.keys())
def test_the_largest_is_named_with_its_reason(why: str, value: Tensor) -> None:
    state = {"w": torch.randn(64, 64), "spectrum": value, "count": torch.tensor(3)}
    with pytest.raises(dither.BudgetError, match=rf"Kept exactly: spectrum \(.* bytes: .*{why}"):
        dither.compress(state, "1kB")
    archive = dither.compress(state, "90%")
    assert torch.equal(archive["spectrum"].nan_to_num(7), value.nan_to_num(7))


def test_what_can_be_rounded_is_not_blamed() -> None:
    state = {"w": torch.randn(64, 64), "count": torch.tensor(3)}
    with pytest.raises(dither.BudgetError) as caught:
        dither.compress(state, 50)
    assert "Kept exactly" not in str(caught.value)


class Fourier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.modes = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.fft.ifft(torch.fft.fft(x) @ self.modes).real)
        return y


def test_complex_weights_are_stored_exactly() -> None:
    model = Fourier()
    archive = dither.compress(model, 1000)
    assert torch.equal(archive["modes"], model.modes.detach())


def test_a_plan_that_names_a_complex_weight_is_refused() -> None:
    with pytest.raises(dither.SpecError, match=r"'modes' names a tensor of torch.complex64"):
        dither.attach(Fourier(), {"modes": dither.Affine(4)})
    run = dither.attach(Fourier(), {"*": dither.Affine(4)})
    run.finish()
