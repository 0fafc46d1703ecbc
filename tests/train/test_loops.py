"""Loops as people write them: averages of weights, two runs at once, and what goes wrong in one."""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from dither import LSQ, Affine, Data, Run, SpecError, attach, load_into
from dither.testing import same_bits
from dither.train import LayerDrop
from tests.train.layers import SPECS, Recurrent, Spec, outputs


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))


INPUTS = torch.randn(12, 16, generator=torch.Generator().manual_seed(3))


def train(
    model: Callable[[Tensor], Tensor],
    run: Run,
    after: Callable[[], object] = lambda: None,
    *,
    inputs: Tensor = INPUTS,
    steps: int = 3,
) -> None:
    optimizer = torch.optim.SGD(run.model.parameters(), 0.05)
    run.join(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(inputs).float().square().mean() + 1e-6 * run.penalty()).backward()
        optimizer.step()
        run.step()
        after()


def shipped(run: Run, fresh: nn.Module, inputs: Tensor, path: Any) -> bool:  # noqa: ANN401
    """Whether a plain model with the file's values computes what was evaluated."""
    run.finish()
    run.save(path)
    load_into(fresh, path)
    return same_bits(outputs(fresh, inputs), outputs(run.model, inputs))


# --- averages of weights -------------------------------------------------------------------------


def averaged(average: nn.Module) -> Callable[[nn.Module], None]:
    keeper = AveragedModel(average, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.load_state_dict(keeper.module.state_dict())

    def update(model: nn.Module) -> None:
        keeper.update_parameters(model)
        average.load_state_dict(keeper.module.state_dict())

    return update


def by_parameters(average: nn.Module) -> Callable[[nn.Module], None]:
    def update(model: nn.Module) -> None:
        with torch.no_grad():
            for mine, its in zip(average.parameters(), model.parameters(), strict=False):
                mine.copy_(torch.lerp(mine, its, 0.5))
            for kept, new in zip(average.buffers(), model.buffers(), strict=False):
                kept.copy_(new)

    return update


def by_state(average: nn.Module) -> Callable[[nn.Module], None]:
    def update(model: nn.Module) -> None:
        states = average.state_dict().values(), model.state_dict().values()
        for mine, its in zip(*states, strict=False):
            mine.copy_(mine * 0.5 + its.to(mine.dtype) * 0.5)

    return update


@pytest.mark.parametrize("make", [averaged, by_parameters, by_state])
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel], ids=["plain", "wrapped"])
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_averages_made_before_attaching_stay_aligned(
    make: Callable[[nn.Module], Callable[[nn.Module], None]],
    wrap: Callable[[nn.Module], nn.Module],
    spec: Spec,
) -> None:
    model = net()
    average, known = copy.deepcopy(model), copy.deepcopy(model)
    update, follow = make(average), make(known)
    run = attach(model, {"0.weight": spec, "3.weight": spec})
    wrapped, plain = wrap(model), net(1)

    def both() -> None:
        update(wrapped)
        own = {name: value for name, value in model.state_dict().items() if name in plain_names}
        plain.load_state_dict(own)
        follow(plain)

    plain_names = set(plain.state_dict())
    train(model, run, both)
    for name, value in known.state_dict().items():
        assert torch.equal(average.state_dict()[name], value), name


def test_what_was_added_comes_last_until_detached() -> None:
    model = net()
    before = [list(model.state_dict()), [n for n, _ in model.named_modules()]]
    run = attach(model, {"*": LSQ(4)})
    for names, old in zip([model.state_dict(), dict(model.named_modules())], before, strict=True):
        assert list(names)[: len(old)] == old
        assert len(names) > len(old)
    run.detach()
    assert [list(model.state_dict()), [n for n, _ in model.named_modules()]] == before


# --- who reads a weight, and when ----------------------------------------------------------------


class Reader(nn.Module):
    """Reads a child's weight itself, in a part that checkpointing runs again."""

    def __init__(self, mode: bool | None = None, *, called: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.mode = nn.Linear(16, 16), nn.Linear(16, 16), mode
        self.called = called

    def part(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        hidden = self.last(hidden) if self.called else hidden
        return functional.linear(hidden, self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.mode is None:
            return self.part(x)
        out: Tensor = checkpoint(self.part, x, use_reentrant=self.mode)
        return out


@pytest.mark.parametrize("mode", [True, False], ids=["reentrant", "plain"])
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_what_checkpointing_runs_again_reads_the_same(spec: Spec, mode: bool) -> None:
    found: list[dict[str, Tensor]] = []
    for way in (None, mode):
        torch.manual_seed(0)
        model = Reader(way)
        run = attach(model, {"*.weight": spec})
        run.step()
        model(INPUTS.clone().requires_grad_()).square().mean().backward()
        named = model.named_parameters()
        found.append({name: p.grad for name, p in named if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def test_traced_models_read_and_copy() -> None:
    model: nn.Module = symbolic_trace(Reader(called=True))
    before = set(vars(model))
    run = attach(model, {"*.weight": LSQ(3)})
    train(model, run)
    run.finish()
    plain = Reader(called=True)
    plain.load_state_dict({name: e.decode() for name, e in run.encode().items()})
    wanted = outputs(plain, INPUTS)
    for same in (model, copy.deepcopy(model)):
        assert same_bits(outputs(same, INPUTS), wanted)
    run.detach()
    assert set(vars(model)) == before
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not model._forward_hooks_always_called


def test_traced_models_pickle() -> None:
    model: nn.Module = symbolic_trace(net())
    run = attach(model, {"*.weight": LSQ(3)})
    train(model, run)
    for act in (run.step, run.finish):
        act()
        wanted = outputs(model, INPUTS)
        assert same_bits(outputs(pickle.loads(pickle.dumps(model)), INPUTS), wanted)


# --- models and loops that must go on working ----------------------------------------------------


class Words(nn.Module):
    """An LSTM language model whose softmax is tied to its table, by a module or by the weight."""

    def __init__(self, *, by_module: bool = True) -> None:
        super().__init__()
        self.table, self.rnn = nn.Embedding(20, 16), nn.LSTM(16, 16, batch_first=True)
        if by_module:
            self.head = nn.Linear(16, 20)
            self.head.weight = self.table.weight
        self.by_module = by_module

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.rnn(self.table(tokens))[0]
        if self.by_module:
            out: Tensor = self.head(hidden)
            return out
        return functional.linear(hidden, self.table.weight)


class Threefold(nn.Module):
    """One weight in three modules, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        for layer in self.layers:
            layer.weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


TOKENS = torch.arange(20).view(4, 5)
LOOPS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "gru": (lambda: Recurrent(nn.GRU, num_layers=2), INPUTS[:, :8].unsqueeze(1)),
    "lstm, tied module": (Words, TOKENS),
    "lstm, tied weight": (lambda: Words(by_module=False), TOKENS),
    "one weight in three modules": (Threefold, INPUTS),
}


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("spec", [Affine(4), LSQ(3), LSQ(None)], ids=repr)
def test_recurrent_and_tied_models_ship_what_is_evaluated(
    kind: str,
    spec: Spec,
    tmp_path: Any,  # noqa: ANN401
) -> None:
    make, inputs = LOOPS[kind]
    torch.manual_seed(0)
    model = make()
    run = attach(model, {"*": spec})
    train(model, run, inputs=inputs)
    assert shipped(run, make(), inputs, tmp_path / "model.dither")


def test_two_runs_train_against_each_other(tmp_path: Any) -> None:  # noqa: ANN401
    torch.manual_seed(0)
    maker, judge = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (maker, judge)]
    runs = [
        attach(model, {"*weight": LSQ(3)}, optimizer=optimizer)
        for model, optimizer in zip((maker, judge), optimizers, strict=True)
    ]
    before = [copy.deepcopy(model.state_dict()) for model in (maker, judge)]
    real, noise = torch.randn(12, 16), torch.randn(12, 16)
    for _ in range(3):
        made = maker(noise)
        for turn, score in enumerate((-judge(made), judge(made.detach()) - judge(real))):
            optimizers[turn].zero_grad()
            score.mean().backward()
            optimizers[turn].step()
            runs[turn].step()
    for run, state in zip(runs, before, strict=True):
        now = run.model.state_dict()
        assert all(not torch.equal(now[name], v) for name, v in state.items() if "weight" in name)
        fresh: nn.Module = copy.deepcopy(run).detach(commit=False)
        assert shipped(run, fresh, noise, tmp_path / "model.dither")


@pytest.mark.parametrize("attaches_first", [True, False])
@pytest.mark.parametrize("detaches_first", [True, False])
def test_layers_of_the_model_itself_may_be_dropped_in_any_order(
    attaches_first: bool, detaches_first: bool
) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))

    model = make()
    before = set(vars(model))
    drop = None if attaches_first else LayerDrop(model, 0.5)
    run = attach(model, {"*.weight": LSQ(4)})
    drop = drop or LayerDrop(model, 0.5)
    run.schedules.append(drop)
    train(model, run)
    run.finish()
    plain = make()
    plain.load_state_dict({name: e.decode() for name, e in run.encode().items()})
    wanted = outputs(plain, INPUTS)
    assert same_bits(outputs(model, INPUTS), wanted)
    for undo in (run, drop) if detaches_first else (drop, run):
        undo.detach()
        assert same_bits(outputs(model, INPUTS), wanted)
    assert type(model) is nn.Sequential
    assert set(vars(model)) == before


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_all_of_training_may_be_within_autocast(spec: Spec) -> None:
    model = net()
    with torch.autocast("cpu", torch.bfloat16):
        run = attach(model, {"*.weight": spec})
        train(model, run)
        run.finish([INPUTS])
    plain = net(1)
    plain.load_state_dict({name: e.decode() for name, e in run.encode().items()})
    assert same_bits(outputs(model, INPUTS), outputs(plain, INPUTS))


# --- what is not finite, and samples that cannot be read -----------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_one_bad_step_is_named_whatever_it_reaches(spec: Spec, bad: float) -> None:
    for place in ("loss", "batch", "rest"):
        model = net()
        run = attach(model, {"3.weight" if place == "rest" else "*.weight": spec})
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        run.join(optimizer)
        for step in range(2):
            is_bad = step == 1
            inputs = INPUTS.clone()
            inputs[0, 0] = bad if is_bad and place == "batch" else 0.0
            loss = model(inputs).square().mean()
            if place == "rest" and is_bad:  # a weight that no rule names
                weight = model.get_parameter("0.weight")
                weight.grad = torch.full_like(weight, bad)
                optimizer.step()
            elif place == "loss" or not is_bad:  # a gradient scaler leaves the step out
                (loss * (bad if is_bad else 1.0)).backward()
                optimizer.step()
            optimizer.zero_grad()
            if not is_bad:
                run.step()
        name = {"loss": r"\S+", "batch": r"1\.running_\S+", "rest": r"0\.weight"}[place]
        with pytest.raises(SpecError, match=rf"step 2, \d+ of \d+ values of {name} are NaN"):
            run.step()
        with pytest.raises(SpecError, match="NaN or infinite"):
            run.finish()


def test_a_parameter_that_was_never_finite_is_no_fault_of_training() -> None:
    model = net()
    model.register_parameter("mask", nn.Parameter(torch.tensor([0.0, -math.inf])))
    run = attach(model, {"*.weight": LSQ(4)})
    train(model, run)
    assert run.finish()


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_a_weight_resized_in_place_is_named_when_it_is_read(spec: Spec, mode: bool) -> None:
    for name in ("table.weight", "out.weight"):
        model = nn.Sequential()
        model.add_module("table", nn.Embedding(20, 16))
        model.add_module("out", nn.Linear(16, 20))
        run = attach(model, {"*.weight": spec})
        train(model, run, inputs=TOKENS)
        weight = model.get_parameter(name)
        weight.data = torch.randn(28, 16)  # as `resize_token_embeddings` does
        model.get_parameter("out.bias").data = torch.zeros(28 if name == "out.weight" else 20)
        with pytest.raises(SpecError, match=rf"{name}.*\(20, 16\) to \(28, 16\).*attach\(\)"):
            model.train(mode)(TOKENS)
        weight.data = torch.randn(20, 16)  # other values are no other shape
        model.get_parameter("out.bias").data = torch.zeros(20)
        model(TOKENS)


def exhausted() -> Iterator[Tensor]:
    loader = iter([INPUTS])
    next(loader)
    return loader


UNREADABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "a number": (lambda: 5, "int"),
    "a text": (lambda: "texts", "str|text"),
    "an exhausted generator": (exhausted, "no batch"),
    "no batches": (list, "no batch"),
    "batches of texts": (lambda: [INPUTS, "text"], "batch 1"),
    "batches of nothing": (lambda: [None], "batch 0"),
    "another width": (lambda: [INPUTS, torch.randn(3, 5)], "batch 1"),
    "names of no arguments": (lambda: [{"pixels": INPUTS}], "batch 0"),
    "NaN": (lambda: [INPUTS, INPUTS * math.nan], r"running_\S+ is not finite after batch 1"),
    "a forward that fails": (lambda: Data([INPUTS], lambda *_: 1 // 0), "batch 0"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_samples_that_finish_cannot_read_are_named_and_change_nothing(kind: str) -> None:
    make, text = UNREADABLE[kind]
    model = net()
    run = attach(model, {"*.weight": LSQ(4)})
    train(model, run)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SpecError, match=text):
        run.finish(make())
    assert all(same_bits(model.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(SpecError, match="not finished"):
        _ = run.archive
    assert run.finish([INPUTS])
