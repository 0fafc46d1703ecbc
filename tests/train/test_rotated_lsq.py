"""Token tables that are trained along their axes."""

import pytest
import torch
from torch import Tensor, nn

import dither
from dither import LSQ
from dither.archive import packed_nbytes
from dither.train import RotatedLSQ, default_plan
from dither.train.rotated_lsq import RotatedStep

ROWS, COLUMNS = 2400, 24


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def table(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Columns have much in common."""
    common = drawn(rows, columns // 4) @ drawn(columns // 4, columns, seed=1)
    return common + 0.2 * drawn(rows, columns, seed=2)


class Words(nn.Module):
    """Tokens to logits over a table of their own or the same."""

    def __init__(self, weight: Tensor, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(*weight.shape)
        self.embedding.weight.data.copy_(weight)
        self.mix = nn.Linear(weight.shape[1], weight.shape[1])
        self.output = nn.Linear(weight.shape[1], len(weight) if tied else 8, bias=False)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.output(self.mix(self.embedding(tokens)))
        return logits


def begun(weight: Tensor, steps: Tensor) -> RotatedStep:
    """A surrogate that begins where a search found steps, at its first look."""
    surrogate = RotatedLSQ().begin(weight)
    assert isinstance(surrogate, RotatedStep)
    surrogate.start(dither.Rotated(steps).encode(weight))
    surrogate.draw(weight, torch.Generator(), 0)
    return surrogate


STEPS = {
    "one step": torch.tensor([0.5]),
    "of rows": torch.tensor([0.25, 0.5, 0.5, 1.0]).repeat_interleave(ROWS // 4),
    "coarse": torch.tensor([2.0]),
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_it_begins_where_the_search_ended_and_trains_what_the_file_holds(steps: Tensor) -> None:
    weight = table()
    surrogate = begun(weight, steps)
    found = surrogate.steps().detach().reshape(-1)
    assert torch.equal(found.expand(ROWS), steps.expand(ROWS))
    held = surrogate.encode(weight).decode()
    torch.testing.assert_close(surrogate.noisy(weight).detach(), held, rtol=1e-4, atol=1e-4)
    assert float((held - weight).square().mean()) > 1e-3


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_gradients_pass_straight_through_both_rotations(steps: Tensor) -> None:
    weight, mixed = table().requires_grad_(), drawn(ROWS, COLUMNS, seed=3)
    surrogate = begun(weight.detach(), steps)
    (surrogate.noisy(weight) * mixed).sum().backward()
    torch.testing.assert_close(weight.grad, mixed, rtol=1e-3, atol=1e-4)
    # A step's is that of learned steps, seen along the axes.
    along = mixed @ surrogate.basis
    place = (weight.detach() @ surrogate.basis) / surrogate.steps().detach()
    each = ((place.round() - place) * surrogate.steps().detach() * along).sum(1)
    classes = torch.zeros(ROWS, dtype=torch.int64)
    classes = classes if surrogate.classes is None else surrogate.classes
    wanted = torch.zeros(len(surrogate.log_step)).index_add_(0, classes, each)
    torch.testing.assert_close(surrogate.log_step.grad, wanted, rtol=1e-3, atol=0.05)


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_the_size_is_that_of_the_file(steps: Tensor) -> None:
    weight = table()
    surrogate = begun(weight, steps)
    held = packed_nbytes({"embedding.weight": surrogate.encode(weight)})
    assert 0.9 < float(surrogate.soft_bits(weight).detach()) / (8 * held) < 1.1


@pytest.mark.parametrize("step", [0.25, 0.5, 2.0])
def test_slopes_of_the_size_are_those_of_a_plain_grid_turned(
    step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where columns are all of one kind, and so counted together."""
    monkeypatch.setattr("dither.train.rotated_lsq.KINDS", 1)
    weight = table().requires_grad_()
    surrogate = begun(weight.detach(), torch.tensor([step]))
    turned = (weight.detach() @ surrogate.basis).requires_grad_()
    plain = LSQ(bits=None, step=step).begin(turned.detach())
    found, wanted = surrogate.soft_bits(weight), plain.soft_bits(turned)
    mine = torch.autograd.grad(found, [weight, *surrogate.parameters()])
    theirs = torch.autograd.grad(wanted, [turned, *plain.parameters()])
    assert float(found.detach()) == float(wanted.detach())
    torch.testing.assert_close(mine[0] @ surrogate.basis, theirs[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-4, atol=1.0)


def test_a_table_with_axes_is_trained_along_them_and_no_other_tensor() -> None:
    plan = default_plan(Words(table()))
    kinds = {name: type(plan.find(name)) for name in ("embedding.weight", "mix.weight")}
    assert kinds == {"embedding.weight": RotatedLSQ, "mix.weight": LSQ}
    for other in (drawn(ROWS, COLUMNS), table(rows=100)):  # white, and small
        assert type(default_plan(Words(other)).find("embedding.weight")) is LSQ


@pytest.mark.parametrize("tied", [False, True])
def test_training_to_a_budget_loses_less_of_the_table(*, tied: bool) -> None:
    errors = []
    for kind in (LSQ, RotatedLSQ):
        model = Words(table(), tied=tied)
        plan = dict(default_plan(model, steps=4))
        plan |= {
            name: kind(bits=None)
            for name in plan
            if name.endswith(("embedding.weight", "output.weight"))
        }
        run = dither.attach(model, plan, budget="12x", steps=4)
        tokens = torch.arange(64).reshape(4, 16)
        optimizer = torch.optim.SGD(model.parameters(), 1e-5)
        for _ in range(4):
            (model(tokens).square().mean() + run.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
        nbytes = run.finish()
        model.eval()
        fresh = Words(torch.zeros(ROWS, COLUMNS), tied=tied).eval()
        dither.load_into(fresh, run.archive)
        assert run.archive.nbytes == nbytes
        assert torch.equal(fresh(tokens), model(tokens))
        errors.append(float((fresh.embedding.weight - table()).square().mean().detach()))
    assert errors[1] < 0.8 * errors[0]


def test_what_it_learned_is_taken_up_again() -> None:
    weight = table()
    surrogate = begun(weight, STEPS["of rows"])
    surrogate.nudge(0.3)
    copy = RotatedLSQ().begin(weight + 1)
    copy.load_state_dict(surrogate.state_dict())
    copy.load_aside(surrogate.aside())
    assert torch.equal(copy.noisy(weight), surrogate.noisy(weight))
    assert torch.equal(copy.encode(weight).decode(), surrogate.encode(weight).decode())


@pytest.mark.parametrize("shape", [(8, 8), (6, 12), (20,), (30, 4, 3)])
def test_other_shapes_train_as_with_learned_steps(shape: tuple[int, ...]) -> None:
    weight = drawn(*shape)
    found, plain = (kind(bits=None).begin(weight) for kind in (RotatedLSQ, LSQ))
    assert torch.equal(found.noisy(weight), plain.noisy(weight))


@pytest.mark.parametrize("settings", [{"bits": 4}, {"axis": 0}, {"group": 8}])
def test_what_makes_no_sense_along_axes_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(dither.SpecError, match="LSQ"):
        RotatedLSQ(**settings)  # type: ignore[arg-type]


def test_with_data_rows_that_are_read_often_have_finer_steps() -> None:
    model = Words(table())
    often = torch.arange(2000, 2064)
    tokens = often[torch.randint(64, (32, 40), generator=torch.Generator().manual_seed(0))]
    run = dither.attach(model, budget="12x", data=[tokens], steps=4)
    surrogate = run.surrogates["embedding.weight"]
    assert isinstance(surrogate, RotatedStep)
    steps = surrogate.steps().detach().expand(ROWS, 1)
    assert float(steps[often].max()) < float(steps[2100:].min())
