"""Sites of functions: found, observed, quantized, copied, saved and removed."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import dither
from dither import activations
from dither.activations import Activation, apply, begin, functions, observe, placed, remove
from dither.activations.functions import Traced
from dither.core import SpecError
from dither.data import Data


class Block(nn.Module):
    """Two sums, of which one is in place, and a child with sums of its own."""

    def __init__(self, child: nn.Module | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.child = nn.Identity() if child is None else child

    def forward(self, values: Tensor, *, is_left: bool = False) -> Tensor:
        first: Tensor = values + self.linear(values + 1.0)
        if is_left:
            return first
        first += self.child(first.relu())
        return first


class Attention(nn.Module):
    """As those of transformers: step by step, or in one function."""

    def __init__(self, *, is_fused: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.is_fused = is_fused

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(values).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.is_fused:
            mixed = functional.scaled_dot_product_attention(query, key, value, mask)
        else:
            scores = query @ key.transpose(2, 3) * 0.5
            scores = scores if mask is None else scores + mask
            mixed = torch.matmul(functional.softmax(scores, dim=-1), value)
        return values + mixed.transpose(1, 2).flatten(2)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(Block()), Attention(is_fused=True), nn.Linear(8, 3)).eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 5, 8, generator=generator) for _ in range(3)]


PLAN: dict[str, Any] = {
    "*@add*": Activation(3),
    "*@softmax": Activation(3),
    "*@scores": Activation(4, ranges="mse"),
    "*@in": Activation(8),
}
SITES = [
    *("0.child@add", "0.child@add.1", "0@add", "0@add.1"),
    *("1@scores", "1@softmax", "1@add"),
]


def quantized() -> nn.Sequential:
    model = network()
    apply(model, observe(model, PLAN, batches()))
    return model


def test_found_by_a_batch() -> None:
    model = network()
    found = functions(model, batches())
    assert sorted(found) == sorted([*SITES, "1@matmul", "1@matmul.1"])
    assert not any("forward" in module.__dict__ for module in model.modules())
    encodings = observe(model, PLAN, batches())
    assert sorted(s for s in encodings if "@in" not in s) == sorted(SITES)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_values_are_on_the_grids_of_their_sites() -> None:
    """By hand: every sum of the model goes through the site's own quantizer."""
    plain, model = network(), network()
    values = batches()[0]
    encodings = observe(model, {"0*@add*": Activation(3)}, batches())
    apply(model, encodings)
    grid = {site: encoding.quantizer().eval() for site, encoding in encodings.items()}
    outer: Any = plain[0]
    inner = outer.child

    def block(module: nn.Module, path: str, x: Tensor, child: Callable[..., Tensor]) -> Tensor:
        first = grid[f"{path}@add"](x + module.get_submodule("linear")(x + 1.0))
        result: Tensor = grid[f"{path}@add.1"](first + child(first.relu()))
        return result

    expected = block(outer, "0", values, lambda x: block(inner, "0.child", x, nn.Identity()))
    found = model[0](values)
    assert torch.equal(found, expected)
    assert found.unique().numel() <= 8
    assert torch.equal(model(values), plain[2](plain[1](expected)))
    assert not torch.equal(found, plain[0](values))


def test_names_without_wildcards_and_what_is_not_there() -> None:
    model = network()
    assert list(observe(model, {"0.child@add.1": Activation()}, batches())) == ["0.child@add.1"]
    with pytest.raises(SpecError, match="no such function"):
        observe(model, {"0.child@add.7": Activation()}, batches())
    with pytest.raises(SpecError, match="only once a batch ran"):
        observe(model, {"0*@softmax": Activation()}, batches())
    with pytest.raises(SpecError, match="only once a batch ran"):
        begin(model, {"*@add": Activation()})
    with pytest.raises(SpecError, match="sites end in"):
        observe(model, {"0@adder": Activation()}, batches())
    with pytest.raises(SpecError, match="no batch"):
        observe(model, {"0@add": Activation()}, [])
    with pytest.raises(SpecError, match="Gradient"):
        observe(model, {"0@add": activations.Gradient()}, batches())
    with pytest.raises(SpecError, match="no site"):
        apply(model, {"9@add": Activation().to_json() | {"scale": [1.0], "zero": [0]}})


def test_softmax_has_the_range_from_0_to_1() -> None:
    model = network()
    encodings = observe(model, {"1@softmax": Activation(8)}, batches())
    assert encodings["1@softmax"].zero == (0,)
    assert encodings["1@softmax"].scale[0] == pytest.approx(1 / 255)
    measured = observe(model, {"1@softmax": Activation(8, ranges="percentile")}, batches())
    assert measured["1@softmax"].scale[0] < 1 / 255
    begin(model, {"1@softmax": Activation(8)})
    assert activations.encodings_of(model)["1@softmax"] == encodings["1@softmax"]


def _with_mask(model: nn.Module, batch: tuple[Tensor, Tensor | None]) -> Tensor:
    result: Tensor = model(*batch)
    return result


@pytest.mark.parametrize("kind", ["none", "bool", "float", "least"])
def test_attention_in_one_function_equals_that_step_by_step(kind: str) -> None:
    torch.manual_seed(0)
    fused, eager = Attention(is_fused=True).eval(), Attention(is_fused=False).eval()
    eager.load_state_dict(fused.state_dict())
    seen = torch.rand(4, 1, 5, 5) < 0.7
    seen[..., 0] = True
    least = torch.finfo(torch.float32).min if kind == "least" else -torch.inf
    added = torch.where(seen, 0.0, least)
    given = {"none": None, "bool": seen}.get(kind, added)
    plan = {f"@{end}": Activation(5) for end in ("matmul", "scores", "softmax", "matmul.1")}
    data = batches()
    found = []
    for model, mask in ((fused, given), (eager, None if kind == "none" else added)):
        encodings = observe(model, plan, Data([(x, mask) for x in data], _with_mask))
        assert list(encodings) == list(plan)
        assert max(encodings["@scores"].scale) < 1  # what is hidden is not in the range
        apply(model, encodings)
        found.append((encodings, model(data[0], mask)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    remove(fused)
    assert not torch.equal(fused(data[0], given), found[0][1])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.randn(7, 7)},
        {"attn_mask": torch.ones(7, 7).triu(1).bool()},  # the last row sees nothing
        {"enable_gqa": True},
    ],
)
def test_attention_step_by_step_is_that_of_torch(settings: dict[str, Any]) -> None:
    class One(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(query, key, value, **settings)

    heads = 2 if "enable_gqa" in settings else 4
    parts = torch.randn(2, 4, 7, 8), torch.randn(2, heads, 7, 8), torch.randn(2, heads, 7, 8)
    model = One()
    expected = model(*parts)
    fine = Activation(16, dynamic=True)
    begin(model, dict.fromkeys(("@matmul", "@scores", "@softmax", "@matmul.1"), fine))
    assert torch.allclose(model(*parts), expected, atol=2e-3)
    assert not torch.equal(model(*parts), expected)


def test_multihead_attention_and_transformer_layers() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    data = [torch.randn(2, 5, 8)]
    assert set(functions(model, data)) == {
        *("@add", "@add.1"),
        *(f"self_attn@{end}" for end in ("matmul", "scores", "softmax", "matmul.1")),
    }
    plan = {"*@softmax": Activation(2), "*@add*": Activation(8)}
    with torch.no_grad():
        plain = model(data[0])
        apply(model, observe(model, plan, data))
        rounded = model(data[0])
    assert 0 < float((plain - rounded).abs().max()) < 1
    weights = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    begin(weights, {"@softmax": Activation(2)})
    _, shares = weights(data[0], data[0], data[0], average_attn_weights=False)
    assert set((shares * 3).round(decimals=4).unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}


def test_removed_without_a_trace() -> None:
    model, plain = quantized(), network()
    values = batches()[0]
    assert not torch.equal(model(values), plain(values))
    remove(model)
    assert torch.equal(model(values), plain(values))
    assert list(model.state_dict()) == list(plain.state_dict())
    for one, other in zip(model.modules(), plain.modules(), strict=True):
        assert set(one.__dict__) == set(other.__dict__)


def test_a_forward_of_the_instance_is_kept() -> None:
    model: Any = Block()
    plain = model.forward
    model.forward = given = lambda values: plain(values) * 2
    expected = model(batches()[0])
    apply(model, observe(model, {"@add": Activation(16)}, batches()))
    assert isinstance(model.forward, Traced)
    assert torch.allclose(model(batches()[0]), expected, atol=1e-3)
    remove(model)
    assert model.forward is given


def test_copies_and_pickles_have_their_own() -> None:
    model = quantized()
    values = batches()[0]
    expected = model(values)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(values), expected)
        site: Any = placed(other)["0@add.1"]
        site.set(torch.tensor([-0.1]), torch.tensor([0.1]))
        assert not torch.equal(other(values), expected)
        assert torch.equal(model(values), expected)
        remove(other)
        assert placed(model)
    assert inspect.signature(model[0].forward) == inspect.signature(network()[0].forward)


def test_called_by_itself_from_threads_and_after_errors() -> None:
    model = quantized()
    values = batches()[0]
    block: Any = model[0]
    assert block.child(values).unique().numel() <= 8
    with pytest.raises(TypeError):
        block("text")
    with torch.no_grad():
        expected = [model(x) for x in batches()]
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(torch.no_grad()(model), batches() * 4))
    assert all(torch.equal(x, expected[i % 3]) for i, x in enumerate(found))
    left = block(values, is_left=True)
    assert left.unique().numel() <= 8


def test_file_and_training(tmp_path: Path) -> None:
    """Learned ranges at functions reach the file, with the numbers of sums as they were."""
    model = network().train()
    rules: dict[str, Any] = {
        "*.weight": dither.LSQ(4),
        "*@add*": Activation(4, training="learned", lr=1e-2),
        "1@softmax": Activation(4),
    }
    apply(model, observe(model, {g: s for g, s in rules.items() if "@" in g}, batches()))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    run = dither.attach(model, rules)
    run.join(optimizer)
    before = activations.encodings_of(model)["0@add.1"]
    losses = []
    for values in batches() * 4:
        loss = (model(values) - values[..., :3]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    run.finish()
    model.eval()
    expected = model(batches()[0]).detach()
    assert activations.encodings_of(model)["0@add.1"] != before
    run.save(tmp_path / "model.dither")
    fresh = network()
    with dither.open(tmp_path / "model.dither") as archive:
        with pytest.raises(dither.CheckpointError, match=r"activations\.apply"):
            dither.load_into(fresh, archive)
        apply(fresh, archive.sites)
        dither.load_into(fresh, archive)
    assert torch.equal(fresh(batches()[0]), expected)


def test_checkpointed_modules_have_equal_gradients() -> None:
    gradients = []
    for is_checkpointed in (False, True):
        model = quantized().train()
        values = batches()[0].requires_grad_()
        block = model[0]
        out = checkpoint(block, values, use_reentrant=False) if is_checkpointed else block(values)
        model[2](model[1](out)).square().sum().backward()
        gradients.append([values.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be")
def test_compiled_with_breaks() -> None:
    model = quantized()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        values = batches()[0]
        assert torch.allclose(compiled(values), model(values), atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bert_of_transformers(attention: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        attn_implementation=attention,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    data = [{"input_ids": torch.randint(50, (3, 7)), "attention_mask": mask}]
    plan = {f"*@{end}*": Activation(4) for end in ("add", "matmul", "scores", "softmax")}
    encodings = observe(model, plan, data)
    own = "encoder.layer.0.attention.self"
    ends = {"matmul", "scores", "softmax", "matmul.1"}
    ends |= {"add"} if attention == "eager" else set()  # of the mask
    assert {site.rpartition("@")[2] for site in encodings if site.startswith(own)} == ends
    assert {"embeddings@add", "embeddings@add.1", "encoder.layer.1.output@add"} <= set(encodings)
    assert all(scale < 10 for encoding in encodings.values() for scale in encoding.scale)
    with torch.no_grad():
        plain = model(**data[0]).last_hidden_state
        apply(model, encodings)
        error = (model(**data[0]).last_hidden_state - plain)[mask.bool()].square().mean()
        assert 1e-4 < float(error) < 0.5
        remove(model)
        assert torch.equal(model(**data[0]).last_hidden_state, plain)
