"""What must hold while a model is attached: who reads a weight sees its stand-in, or is told."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dither
from dither import LSQ, Affine, BayesianBits, BudgetError, DiffQ, QuantNoise, Raw, SpecError
from dither.core import Encoder
from dither.train.method import Method

Spec = Encoder | Method


class Language(nn.Module):
    """The head reads the embedding's table without being its module."""

    def __init__(self, read: str = "attribute") -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(40, 16), nn.Linear(16, 16)
        self.read = read

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.body(self.embed(tokens))
        if self.read == "attribute":
            return functional.linear(hidden, self.embed.weight)
        if self.read == "getattr":
            table: Tensor = getattr(self.embed, "weight")  # noqa: B009 - as users write it
            return torch.matmul(hidden, table.T)
        return self.head(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """In a method of its own, which also scales."""
        return functional.linear(hidden * self.body.weight.mean(), self.embed.weight)


class Wrapped(nn.Module):
    """A module around: the reader is in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Language()
        self.out = nn.Linear(40, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.out(self.inner(tokens))
        return out


def tokens() -> Tensor:
    return torch.randint(0, 40, (8, 6), generator=torch.Generator().manual_seed(1))


def trained(
    build: Callable[[], nn.Module], spec: Spec, steps: int = 4
) -> tuple[dither.Run, Tensor]:
    torch.manual_seed(0)
    model, inputs = build(), tokens()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    run = dither.attach(model, {"*": spec}, optimizer=optimizer, steps=4)
    for _ in range(4):
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()
    return run, inputs


@pytest.mark.parametrize("spec", [LSQ(3), Affine(3), DiffQ(), QuantNoise(Affine(3), 0.5)])
@pytest.mark.parametrize(
    "build",
    [Language, lambda: Language("getattr"), lambda: Language("method"), Wrapped],
    ids=["attribute", "getattr", "method", "wrapped"],
)
def test_a_weight_that_others_read_is_what_the_file_holds(
    build: Callable[[], nn.Module], spec: Spec, tmp_path: Path
) -> None:
    run, inputs = trained(build, spec)
    run.finish()
    run.save(tmp_path / "m.dither")
    fresh = build().eval()
    dither.load_into(fresh, tmp_path / "m.dither")
    with torch.no_grad():
        evaluated = run.model.eval()(inputs)
        assert torch.equal(fresh(inputs), evaluated)
        compiled = torch.compile(run.model, backend="eager")
        torch.testing.assert_close(compiled(inputs), evaluated)
    plain = run.detach()
    with torch.no_grad():
        assert torch.equal(plain(inputs), evaluated)


def test_others_read_the_noise_of_the_step_while_training() -> None:
    run, inputs = trained(Language, LSQ(2))
    model: Any = run.model.train()
    values = run.surrogates["embed.weight"](model.embed.weight)
    hidden = model.body(model.embed(inputs))
    assert torch.equal(model(inputs), functional.linear(hidden, values))
    assert isinstance(model.embed.weight, nn.Parameter)  # outside forward it is the weight itself
    assert set(model.state_dict()) >= {"embed.weight", "body.weight"}


CHANGES: dict[str, Callable[[Any], None]] = {
    "another head": lambda m: setattr(m, "out", nn.Linear(40, 6)),
    "another head of that shape": lambda m: setattr(m, "out", nn.Linear(40, 4)),
    "a longer table": lambda m: setattr(m.inner, "embed", nn.Embedding(48, 16)),
    "another weight": lambda m: setattr(m.out, "weight", nn.Parameter(torch.zeros(4, 8))),
    "no bias": lambda m: setattr(m.out, "bias", None),
    "no module": lambda m: delattr(m, "out"),
}


@pytest.mark.parametrize("act", [dither.Run.step, dither.Run.finish])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_surgery_after_attach_is_named(
    change: Callable[[Any], None], act: Callable[[dither.Run], object]
) -> None:
    run, _ = trained(Wrapped, LSQ(4))
    change(run.model)
    with pytest.raises(SpecError, match=r"'(out|inner\.embed)\.(weight|bias)'.*dither\.attach\(\)"):
        act(run)


def test_values_may_change_in_place_and_by_assignment() -> None:
    run, inputs = trained(Wrapped, LSQ(4))
    model: Any = run.model
    model.out.weight = nn.Parameter(torch.ones(4, 40))
    model.load_state_dict({n: 2 * v for n, v in model.state_dict().items()})
    model(inputs).sum().backward()
    run.step()
    assert run.finish() > 0


SPECS = {
    "lsq": LSQ(4),
    "learned size": LSQ(None),
    "diffq": DiffQ(),
    "noise": QuantNoise(Affine(4), 0.5),
    "bayesian_bits": BayesianBits(),
    "format": Affine(4),
    "raw": Raw(),
}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_loss_that_is_not_finite_names_tensor_and_step(spec: Spec, bad: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    run = dither.attach(model, {"*": spec}, optimizer=optimizer)
    inputs = torch.randn(8, 16)
    for step in range(3):
        loss = model(inputs).square().mean() * (bad if step == 2 else 1.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step < 2:
            run.step()
    with pytest.raises(SpecError, match=r"after optimizer step 3, \d+ of \d+ values of \S+.*NaN"):
        run.step()
    with pytest.raises(SpecError, match="NaN or infinite"):
        run.finish()


@pytest.mark.parametrize("kind", [Affine, LSQ, Raw, DiffQ, QuantNoise])
def test_a_class_in_place_of_an_instance_is_refused(kind: Any) -> None:  # noqa: ANN401
    with pytest.raises(SpecError, match=rf"class {kind.__name__}.*write {kind.__name__}\("):
        dither.attach(nn.Linear(4, 4), {"*": kind})
    with pytest.raises(SpecError, match="class"):
        dither.Plan({"*.bias": Raw(), "*": kind})


@pytest.mark.parametrize("glob", ["*.wieght", "decoder.*", "layers.?.weight", "running_*"])
def test_a_plan_that_matches_nothing_is_refused(glob: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(SpecError, match=r"match no parameter.*0\.bias, 0\.weight"):
        dither.attach(model, {glob: Affine(4)})
    dither.attach(model, {glob: Affine(4), "*": Affine(8)})


@pytest.mark.parametrize("budget", [6.5, 0, -3, "6.5.5kB", "9 parsecs", [1], math.nan, True])
def test_a_budget_that_is_no_size_is_refused(budget: str) -> None:
    with pytest.raises(BudgetError, match="write for example"):
        dither.attach(nn.Linear(64, 64), budget=budget, steps=10)


def test_finish_raises_where_batch_norm_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 8))
    run = dither.attach(model, budget="1.5kB", steps=1)
    inputs = torch.randn(32, 64)
    (model(inputs).square().mean() + run.penalty()).backward()
    run.step()
    # What is trimmed fits; what batch norm then takes does not, however small the trimming aimed.
    monkeypatch.setattr("dither.train.finish.Trimming.to", lambda *_: 0)
    run.controller.nbytes = 700  # type: ignore[union-attr]
    with pytest.raises(BudgetError, match="700 bytes was missed 3 times") as error:
        run.finish([inputs])
    assert error.value.smallest is not None
    assert error.value.smallest > 700
