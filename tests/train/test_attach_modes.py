"""Attached models under compilers, checkpointing, autocast, threads and odd training loops."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dither import LSQ, Affine, Run, attach
from dither.testing import same_bits
from tests.train.layers import EXAMPLES, Spec, attached, build, outputs, train

# Torch's compiler does itself what torch's autograd then warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

BREAKING = {"learned_codebook", "mqat", "straight_through", "quant_noise"}
"""Methods whose code looks at values (which blocks are noised?), where compilers must break."""

SPECS: list[Spec] = [Affine(4), LSQ(bits=None), *[s[0] for s in EXAMPLES.values() if s]]
NAMES = ["plain", "unbounded", *[name for name, s in EXAMPLES.items() if s]]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def backward(model: nn.Module, call: Callable[[], Any]) -> dict[str, Tensor]:
    model.zero_grad()
    call().float().square().sum().backward()
    return gradients(model)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_compiled_training_has_no_graph_break_and_equals_eager(spec: Spec) -> None:
    run, inputs = attached("linear", spec)
    model = run.model.train()
    expected = model(inputs).detach()
    wanted = backward(model, lambda: model(inputs))
    full = getattr(spec, "name", "") not in BREAKING
    compiled = torch.compile(model, fullgraph=full, backend="aot_eager" if full else "eager")
    got = backward(model, lambda: compiled(inputs))
    assert torch.equal(compiled(inputs), expected)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name])


@pytest.mark.parametrize("kind", ["conv2d", "tied", "attention", "encoder", "batch norm"])
def test_compiled_layers_have_no_graph_break(kind: str) -> None:
    run, inputs = attached(kind, LSQ(4))
    model = run.model.train()
    expected = copy.deepcopy(model)(inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(inputs), expected)
    run.finish()
    expected = outputs(model, inputs)
    with torch.no_grad():
        assert torch.equal(compiled(inputs), expected)


def test_compiled_models_notice_steps_finish_and_attaching() -> None:
    model, inputs = build("linear")
    compiled = torch.compile(model, backend="eager")
    compiled(inputs)
    run = attach(model, {"*.weight": LSQ(2)})
    assert torch.equal(compiled(inputs), model(inputs))
    train(run, inputs)
    for _ in range(2):
        assert torch.equal(compiled(inputs), model(inputs))
        model.eval()
        assert torch.equal(compiled(inputs), model(inputs))
        run.finish()
        assert torch.equal(compiled(inputs), model(inputs))
        model.train()
        train(run, inputs)
    plain = run.detach()
    assert torch.equal(compiled(inputs), plain(inputs))


def test_a_compiled_forward_undoes_finish() -> None:
    run, inputs = attached("linear", Affine(4))
    compiled = torch.compile(run.model, backend="eager")
    run.finish()
    run.model.train()
    compiled(inputs).sum().backward()
    assert all(surrogate.committed is None for surrogate in run.surrogates.values())


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.mode: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mode is None:
            out: Tensor = self.body(x)
        else:
            out = checkpoint(self.body, x, use_reentrant=self.mode)
        return out


def through_surrogates(run: Run, plain: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Gradients that torch finds for the values that `run` reads, passed on to what it trains."""
    values = {name: surrogate(run.parameter(name)) for name, surrogate in run.surrogates.items()}
    with torch.no_grad():
        for name, value in values.items():
            plain.get_parameter(name).copy_(value)
    found = backward(plain, lambda: plain(inputs))
    run.model.zero_grad()
    torch.autograd.backward(list(values.values()), [found[name] for name in values])
    others = {name: gradient for name, gradient in found.items() if name not in values}
    return others | gradients(run.model)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
@pytest.mark.parametrize("kind", ["linear", "lstm", "attention"])
def test_activation_checkpointing_gives_the_same_gradients(kind: str, spec: Spec) -> None:
    """As torch's own for the values read, bit for bit, with and without checkpoints.

    Not those with checkpoints as those without: on some processors torch's LSTM has other last bits
    without gradients, as the first pass of a reentrant checkpoint runs.
    """
    body, inputs = build(kind)
    names = [n for n, p in body.named_parameters() if p.ndim > 1]
    model, plain = Checkpointed(body).train(), Checkpointed(build(kind)[0]).train()
    run = attach(model, {f"body.{name}": spec for name in names})
    run.step()
    inputs = inputs.requires_grad_()
    for mode in (None, True, False):
        model.mode = plain.mode = mode
        wanted = through_surrogates(run, plain, inputs)
        got = backward(model, lambda: model(inputs))
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_autocast_trains_and_shows_float32_values(spec: Spec) -> None:
    run, inputs = attached("linear", spec)
    model = run.model.train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(inputs)
        loss = out.float().square().mean() + 1e-6 * run.penalty()
    assert out.dtype == torch.bfloat16
    loss.backward()
    assert any(p.grad is not None for n, p in model.named_parameters() if "weight" in n)
    run.finish()
    decoded, _ = build("linear")
    decoded.load_state_dict({n: e.decode() for n, e in run.encode().items()})
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(outputs(model, inputs), outputs(decoded, inputs))


def test_an_optimizer_may_be_made_before_or_after_attaching() -> None:
    results = []
    for early in (True, False):
        model, inputs = build("linear")
        own = list(model.parameters())
        optimizer = torch.optim.Adam(own, lr=0.01, weight_decay=0.1) if early else None
        run = attach(model, {"*.weight": LSQ(3)})
        if optimizer is None:
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
        run.join(optimizer)
        assert [len(g["params"]) for g in optimizer.param_groups] == [4, 2]
        assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], own, strict=True))
        assert optimizer.param_groups[1]["weight_decay"] == 0
        for _ in range(3):
            optimizer.zero_grad()
            model.train()(inputs).square().sum().backward()
            optimizer.step()
            run.step()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_gradients_accumulate_over_parts_of_a_batch(spec: Spec) -> None:
    run, inputs = attached("linear", spec)
    model = run.model.train()
    wanted = backward(model, lambda: model(inputs))
    model.zero_grad()
    for part in inputs.split(2):  # the same noise: it is drawn once for a step
        model(part).square().sum().backward()
    got = gradients(model)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name])


@pytest.mark.parametrize("kind", ["linear", "lstm", "attention", "encoder", "tied"])
def test_evaluation_from_several_threads(kind: str) -> None:
    run, inputs = attached(kind, LSQ(3))
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = outputs(run.model, inputs)
    torch.set_num_threads(threads_before)
    run.model.train().eval()  # no preview yet
    wrong: list[object] = []
    start = threading.Barrier(4)

    def work() -> None:
        torch.set_num_threads(1)  # a kernel's own threads are as many as happen to be free
        start.wait()
        for _ in range(40):
            with torch.no_grad():
                if not torch.equal(run.model(inputs), expected):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for module in run.model.modules():
        assert not {"weight", "dither_visitors"} & module.__dict__.keys()


def test_noise_without_activity_is_the_weight_itself() -> None:
    for spec in SPECS:
        run, inputs = attached("linear", spec)
        plain, _ = build("linear")
        for surrogate in run.surrogates.values():
            surrogate.active = False
        assert torch.equal(run.model.train()(inputs), plain(inputs))


def test_averaged_models_copy_attached_ones() -> None:
    run, inputs = attached("linear", LSQ(3))
    average = torch.optim.swa_utils.AveragedModel(run.model)
    train(run, inputs)
    average.update_parameters(run.model)
    average.update_parameters(run.model)
    out = outputs(average, inputs)
    assert out.isfinite().all()
