"""Attaching changes what forward reads, and nothing else."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from dither import LSQ, Affine, Data, Plan, SpecError, attach
from dither.core import CheckpointError
from dither.model import SHADOWS
from dither.testing import same_bits
from dither.train.shadow import is_shadowed
from tests.train.layers import (
    EXAMPLES,
    MODELS,
    OWNERS,
    Functional,
    Listed,
    Spec,
    Text,
    Tied,
    Twice,
    attached,
    build,
    outputs,
    train,
    weights_of,
)

LEARNED, UNBOUNDED, PLAIN = LSQ(4), LSQ(bits=None), Affine(4)
BASIC: list[Spec] = [LEARNED, UNBOUNDED, PLAIN]
FIRST = [specs[0] for specs in EXAMPLES.values() if specs]


@pytest.mark.parametrize("spec", BASIC, ids=("bounded", "unbounded", "plain"))
@pytest.mark.parametrize("kind", MODELS)
def test_a_preview_computes_what_a_plain_copy_with_decoded_weights_does(
    kind: str, spec: Spec
) -> None:
    run, inputs = attached(kind, spec)
    train(run, inputs)
    plain, _ = build(kind, seed=1)
    plain.load_state_dict({name: e.decode() for name, e in run.encode().items()}, strict=False)
    for model in (run.model, plain):
        model.eval()
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            expected, got = plain(inputs), run.model(inputs)
        assert same_bits(got, expected), mode.__name__
    assert got.requires_grad


@pytest.mark.parametrize("kind", MODELS)
def test_training_reads_surrogates_and_keeps_the_weights(kind: str) -> None:
    run, inputs = attached(kind, LSQ(2))
    run.model.train()
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    noisy = run.model(inputs)
    noisy.float().sum().backward()
    run.model.zero_grad()
    plain, _ = build(kind)
    assert not torch.equal(plain.train()(inputs), noisy), "forward reads the raw weights"
    assert all(same_bits(p.detach(), before[n]) for n, p in run.model.named_parameters())
    swapped = copy.deepcopy(plain)
    with torch.no_grad():
        for name, surrogate, weight in run.weights():
            swapped.get_parameter(name).copy_(surrogate(weight))
    torch.testing.assert_close(swapped.train()(inputs), noisy)


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_reach_weights_and_what_is_learned(kind: str) -> None:
    run, inputs = attached(kind, LEARNED)
    run.model.train()(inputs).float().square().sum().backward()
    for name, parameter in run.model.named_parameters():
        if "norm" not in name:
            assert parameter.grad is not None, name


@pytest.mark.parametrize("spec", FIRST, ids=lambda spec: spec.name)
def test_every_method_copies_and_pickles_at_any_time(spec: Spec) -> None:
    run, inputs = attached("linear", spec)
    copies: list[Callable[[nn.Module], nn.Module]] = [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        _saved,
    ]
    for act in (lambda: None, lambda: train(run, inputs), run.finish):
        act()
        for make in copies:
            torch.manual_seed(0)
            expected = outputs(run.model, inputs)
            assert same_bits(outputs(make(run.model), inputs), expected)
        run.model.train()
    committed = copy.deepcopy(run.model)
    assert all(
        surrogate.committed is not None
        for module in committed.modules()
        if is_shadowed(module)
        for surrogate in getattr(module, SHADOWS, nn.ModuleDict()).children()
    )


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("kind", ["lstm", "attention", "encoder", "tied", "listed"])
def test_models_copy_after_a_forward_with_gradients(kind: str) -> None:
    run, inputs = attached(kind, LEARNED)
    noisy = run.model.train()(inputs)
    clone = copy.deepcopy(run.model)
    assert torch.equal(clone(inputs), noisy)
    assert {id(p) for p in clone.parameters()}.isdisjoint({id(p) for p in run.model.parameters()})
    assert [n for n, _ in clone.named_parameters()] == [n for n, _ in run.model.named_parameters()]


def test_names_stay_and_extras_may_be_absent() -> None:
    plain, _ = build("encoder")
    run, _ = attached("encoder", LEARNED)
    own, state = set(plain.state_dict()), run.model.state_dict()
    assert own <= set(state)
    assert all(SHADOWS in name.split(".") for name in set(state) - own)
    assert set(state) - own
    run.model.load_state_dict(plain.state_dict())  # strictly
    assert [n for n, _ in run.model.named_parameters() if n in own] == [
        n for n, _ in plain.named_parameters()
    ]
    run.model.load_state_dict(state)


def test_loading_changes_previews() -> None:
    run, inputs = attached("linear", PLAIN)
    other, _ = build("linear", seed=1)
    before = outputs(run.model, inputs)
    run.model.load_state_dict(other.state_dict())
    assert not torch.equal(outputs(run.model, inputs), before)
    with torch.no_grad():
        run.model.get_parameter("0.weight").data.mul_(2)  # no version counter shows this
    middle = outputs(run.model.train(), inputs)
    run.model.eval()
    assert not torch.equal(middle, before)


def test_a_tied_weight_has_one_surrogate_and_one_draw() -> None:
    seen: list[torch.Tensor] = []
    for spec in FIRST:
        seen.clear()
        run, tokens = attached("tied", spec)
        assert list(run.surrogates) == ["embed.weight"]
        model = run.model
        assert isinstance(model, Tied)
        for layer in (model.embed, model.head):
            shadows = layer.get_submodule(SHADOWS)
            shadows.get_submodule("weight").register_forward_hook(
                lambda module, args, out: seen.append(out)
            )
        model.train()(tokens)
        assert all(torch.equal(seen[0], other) for other in seen[1:])
        assert len([n for n in model.state_dict() if SHADOWS in n]) == len(
            run.surrogates["embed.weight"].state_dict()
        )


def test_parameters_that_share_memory_are_one_weight() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight.data = model[0].weight.data
    run = attach(model, {"*": Affine(2)})
    inputs = torch.randn(3, 8)
    decoded = run.encode()["0.weight"].decode()
    assert torch.equal(outputs(model, inputs), F.linear(F.linear(inputs, decoded), decoded))


def test_a_module_used_twice_and_calls_to_submodules() -> None:
    run, inputs = attached("twice", PLAIN)
    assert isinstance(run.model, Twice)
    decoded, bias = run.encode()["one.weight"].decode(), run.model.one.bias
    expected = F.linear(inputs, decoded, bias)
    assert torch.equal(outputs(run.model.one, inputs), expected.detach())


def test_owners_say_who_reads_a_weight() -> None:
    run, tokens = attached("functional", PLAIN)
    assert isinstance(run.model, Functional)
    decoded = run.encode()["emb.weight"].decode()
    expected = F.linear(F.embedding(tokens, decoded), decoded)
    assert torch.equal(outputs(run.model, tokens), expected)
    assert "weight" not in run.model.emb.__dict__
    plan = Plan({"*": PLAIN}, OWNERS["functional"])
    assert Plan.from_json(plan.to_json()) == plan
    for owners in ({"emb.weight": "elsewhere"}, {"emb.weight": "emb.deeper"}):
        model, _ = build("functional")
        with pytest.raises(SpecError, match="name a module that holds it"):
            attach(model, Plan({"*": PLAIN}, owners))
        assert not any(is_shadowed(module) for module in model.modules())


def test_lists_of_parameters_are_read_by_what_holds_them() -> None:
    run, _ = attached("listed", PLAIN)
    assert is_shadowed(run.model)
    assert isinstance(run.model, Listed)
    assert not is_shadowed(run.model.weights)
    with pytest.raises(SpecError, match="no forward of its own"):
        attach(nn.ParameterList([torch.ones(2, 2)]), {"*": PLAIN})


def test_an_exception_in_forward_leaves_nothing_behind() -> None:
    for kind in ("linear", "lstm", "attention", "encoder"):
        run, inputs = attached(kind, LEARNED)
        expected = run.model.train()(inputs)
        with pytest.raises((RuntimeError, ValueError, IndexError, AssertionError, TypeError)):
            run.model(inputs[..., :1].float().repeat(1, 1, 3, 1))
        for module in run.model.modules():
            assert not {"weight", "in_proj_weight", "dither_visitors"} & module.__dict__.keys()
        assert torch.equal(run.model(inputs), expected)


def test_a_surrogate_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    run, inputs = attached("attention", LEARNED)

    def fail(weight: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no")

    monkeypatch.setattr(run.surrogates["attention.out_proj.weight"], "noisy", fail)
    with pytest.raises(RuntimeError, match="no"):
        run.model.train()(inputs)
    attention = run.model.get_submodule("attention")
    assert not {"in_proj_weight", "dither_visitors"} & attention.__dict__.keys()


@pytest.mark.parametrize("kind", MODELS)
def test_detach_gives_the_plain_classes_back(kind: str) -> None:
    plain, _ = build(kind)
    run, inputs = attached(kind, LEARNED)
    before = dict(run.model.named_parameters())
    model = run.detach()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(p is before[n] for n, p in model.named_parameters())
    assert same_bits(outputs(model, inputs), outputs(plain, inputs))


def test_detach_after_finish_leaves_the_values_of_the_file() -> None:
    run, inputs = attached("encoder", UNBOUNDED)
    train(run, inputs)
    run.finish()
    expected, encoded = outputs(run.model, inputs), run.encode()
    model = run.detach()
    assert all(same_bits(model.state_dict()[n], e.decode()) for n, e in encoded.items())
    assert same_bits(outputs(model, inputs), expected)
    assert attach(model, {"*weight": LEARNED}).surrogates  # and again


@pytest.mark.parametrize("spec", BASIC, ids=("bounded", "unbounded", "plain"))
def test_training_again_undoes_finish(spec: Spec) -> None:
    run, inputs = attached("linear", spec)
    train(run, inputs)
    run.finish()
    assert run.archive.nbytes
    run.model.train()(inputs).sum().backward()
    with pytest.raises(SpecError, match="not finished"):
        _ = run.archive
    run.finish()
    with torch.no_grad():
        run.model.get_parameter("0.bias").add_(1)
    with pytest.raises(SpecError, match=r"'0.bias' changed since finish"):
        _ = run.archive
    run.finish()
    held = outputs(run.model, inputs)
    run.step()
    with torch.no_grad():
        run.model.get_parameter("0.weight").mul_(-1)
    assert not torch.equal(outputs(run.model, inputs), held)


def test_frozen_weights_are_encoded_and_get_no_gradient() -> None:
    model, inputs = build("linear")
    model.requires_grad_(requires_grad=False)
    model.get_submodule("2").requires_grad_()
    run = attach(model, {"*.weight": LSQ(2)})
    model.train()(inputs).sum().backward()
    assert model.get_parameter("0.weight").grad is None
    assert model.get_parameter("2.weight").grad is not None
    run.finish()
    decoded = run.encode()["0.weight"].decode()
    assert len(decoded.unique()) <= 4
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            model.eval()(inputs)
    model(inputs.requires_grad_()).sum().backward()  # what inference mode made serves here too


def test_half_precision_before_and_after_attaching() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for early in (True, False):
            model, inputs = build("linear")
            model = model.to(dtype) if early else model
            run = attach(model, {"*.weight": LEARNED})
            model.to(dtype)
            extras = [p for n, p in model.named_parameters() if SHADOWS in n]
            assert {p.dtype for p in extras} == {torch.float32}
            noisy = model.train()(inputs.to(dtype))
            assert noisy.dtype == dtype
            noisy.sum().backward()
            run.finish()
            model.to(torch.bfloat16)
            assert outputs(model, inputs.bfloat16()).dtype == torch.bfloat16


def test_what_cannot_work_is_refused_and_nothing_is_attached() -> None:
    old = nn.Sequential(nn.Linear(4, 4))
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(old[0])
    pruned = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    cases: list[tuple[nn.Module, type[Exception], str]] = [
        (old, SpecError, "parametrizations"),
        (pruned, SpecError, "hook of torch.nn.utils"),
        (nn.Embedding(4, 4, max_norm=1.0), SpecError, "max_norm"),
        (nn.Embedding(4, 4, sparse=True), SpecError, "sparse"),
        (nn.Linear(4, 4, device="meta"), CheckpointError, "meta"),
        (nn.LazyLinear(4), CheckpointError, "lazy"),
        (nn.DataParallel(nn.Linear(4, 4)), SpecError, "wrapped already"),
        (torch.compile(nn.Linear(4, 4), backend="eager"), SpecError, "wrapped already"),  # type: ignore[list-item]
    ]
    for model, error, text in cases:
        with pytest.raises(error, match=text):
            attach(model, {"*": LEARNED})
        assert not any(is_shadowed(module) for module in model.modules())
    run, _ = attached("linear", LEARNED)
    with pytest.raises(SpecError, match="attached already"):
        attach(run.model, {"*": LEARNED})


def test_sparse_embeddings_take_plain_formats() -> None:
    model = nn.Embedding(10, 4, sparse=True)
    run = attach(model, {"*": PLAIN})
    tokens = torch.tensor([1, 2])
    model(tokens).sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.is_sparse
    assert torch.equal(outputs(model, tokens), run.encode()["weight"].decode()[tokens])


def test_parametrizations_work_before_and_are_refused_after() -> None:
    for wrap in (parametrizations.weight_norm, parametrizations.spectral_norm):
        model: nn.Module = nn.Sequential(nn.Linear(8, 8))
        wrap(model.get_submodule("0"))
        run = attach(model, {"*original*": UNBOUNDED})
        inputs = torch.randn(3, 8)
        train(run, inputs)
        run.finish()
        expected = outputs(model, inputs)
        assert same_bits(outputs(run.detach(), inputs), expected)
    model, inputs = build("linear")
    attach(model, {"*.weight": LEARNED})
    parametrize.register_parametrization(model.get_submodule("0"), "weight", nn.Identity())
    with pytest.raises(SpecError, match="no longer has the parameter"):
        model(inputs)


def test_encoder_stacks_with_masks_keep_torchs_fused_path() -> None:
    torch.manual_seed(0)
    model = Text(2)
    tokens = torch.randint(1, 20, (3, 6))
    tokens[1:, 4:] = 0
    run = attach(model, dict.fromkeys(weights_of(model), LSQ(3)))
    layer = model.encoder.layers[0]
    called: list[int] = []
    layer.self_attn.register_forward_hook(lambda *_: called.append(1))
    outputs(model, tokens)
    assert called, "hooks keep torch off its fused path"
    layer.self_attn._forward_hooks.clear()
    called.clear()
    shadows = layer.linear1.get_submodule(SHADOWS)
    assert shadows is not None
    fused = outputs(model, tokens)
    run.finish()
    plain = copy.deepcopy(model)
    for mode in (model, plain):
        mode.eval()
    decoded = Text(2)
    decoded.load_state_dict({n: e.decode() for n, e in run.encode().items()})
    assert same_bits(outputs(decoded, tokens), fused)
    with torch.enable_grad():
        slow = model(tokens)
        assert same_bits(decoded(tokens), slow)
    torch.testing.assert_close(slow.detach(), fused)


def test_finish_takes_data_and_refuses_what_gives_no_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    run = attach(model, {"0.weight": Affine(4)})
    samples = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    data = Data([{"x": 3 * samples}], forward=lambda model, batch: model(batch["x"]))
    run.finish(data)
    means = model[0].eval()(3 * samples).mean(0)
    torch.testing.assert_close(model[1].running_mean, means.detach())
    loader = iter([samples])
    run.finish(loader)
    with pytest.raises(SpecError, match="no batch"):
        run.finish(loader)
