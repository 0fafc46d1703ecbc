"""Random small modules of every kind that people have, dead and odd parts included, by seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, prune

BATCHES, ROWS = 3, 4
WIDTH, TOKENS, LENGTH, CLASSES = 16, 24, 6, 5
DTYPES = (torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """A model, its batches and what is asked of its file.

    Attributes:
        model: in evaluation mode.
        batches: of inputs.
        size: for ``compress`` and ``attach``.
        said: what is in the model.
    """

    model: nn.Module
    batches: list[Any]
    size: str
    said: str


@dataclass
class Output:
    """What some models return."""

    logits: Tensor
    aside: object = None


def build(seed: int) -> Case:
    """The case of a seed: the same in every process."""
    chance = random.Random(seed)  # noqa: S311 - nothing secret
    torch.manual_seed(seed)
    kind = chance.choice(list(BODIES))
    body, said = BODIES[kind](chance)
    model: nn.Module = Model(body, chance.choice(RETURNS), kind)
    words = [kind, said, str(model.returns)]
    inputs = [_inputs(kind) for _ in range(BATCHES)]
    model.eval()
    for name in chance.sample(list(ODDITIES), chance.choice([0, 1, 1, 2, 3])):
        ODDITIES[name](chance, model)
        words.append(name)
    if chance.random() < 0.2:
        dtype = chance.choice(DTYPES)
        model, words = model.to(dtype), [*words, str(dtype)]
        inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    size = chance.choice(SIZES)
    return Case(model.eval(), inputs, size, ", ".join(filter(None, words)))


def _inputs(kind: str) -> Tensor:
    if kind == "image":
        return torch.randn(ROWS, 3, 12, 12)
    if kind == "signal":
        return torch.randn(ROWS, 3, 40)
    if kind == "volume":
        return torch.randn(ROWS, 2, 6, 6, 6)
    if kind in {"tokens", "language"}:
        return torch.randint(0, TOKENS, (ROWS, LENGTH))
    return torch.randn(ROWS, LENGTH, WIDTH) if kind == "sequence" else torch.randn(ROWS, WIDTH)


SIZES = ("2x", "3x", "4x", "5x", "8x", "12x", "20x", "3 bits", "4 bits", "6 bits", "30%", "50%")
RETURNS = ("tensor", "tuple", "dict", "dataclass", "nested", "with None")


class Model(nn.Module):
    """A body, and a way to return what it gives."""

    def __init__(self, body: nn.Module, returns: str, kind: str) -> None:
        super().__init__()
        self.body, self.returns, self.kind = body, returns, kind

    def forward(self, x: Tensor) -> object:
        out = self.body(x)
        made: dict[str, Callable[[], object]] = {
            "tensor": lambda: out,
            "tuple": lambda: (out, out.mean()),
            "dict": lambda: {"logits": out, "n": 3},
            "dataclass": lambda: Output(out),
            "nested": lambda: {"a": [out, {"b": out * 2}]},
            "with None": lambda: (None, out),
        }
        return made[self.returns]()


class Last(nn.Module):
    """The last step, or the mean over places."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(-1) if x.ndim > 3 else x.mean(1)


class First(nn.Module):
    """The first of what a layer returns."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)[0]
        return out


class Attention(nn.Module):
    """Self-attention, around which the input goes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.attention(x, x, x, need_weights=False)[0]
        return out


class LearnedQuery(nn.Module):
    """A constant input reads the others."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query.expand(len(x), -1, -1)
        out: Tensor = self.attention(query, x, x)[0]
        return out


class Cells(nn.Module):
    """A recurrent cell, step by step."""

    def __init__(self, kind: type[nn.GRUCell | nn.LSTMCell]) -> None:
        super().__init__()
        self.cell = kind(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        state, found = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            found.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(found, 1)


class TwoStage(nn.Module):
    """An encoder's state begins a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.decoder = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(x, self.encoder(x)[1])[0]
        return out


class Experts(nn.Module):
    """Each position goes to one of three experts; a fourth sees nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = chosen == number
            if mask.any():
                out[mask] = expert(x[mask])
        return x + out


class FusedExperts(nn.Module):
    """The experts' weights in one tensor of three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.up_proj = nn.Parameter(torch.randn(4, WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        out: Tensor = x + torch.einsum("bte,eio,bti->bto", weights, self.up_proj, x)
        return out


class Adaptive(nn.Module):
    """The number of steps depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = x + self.step(x).tanh()
            if float(x.float().std()) > 1.3:
                break
        return x


class Language(nn.Module):
    """Tokens to logits by one table, read as a module or by its weight."""

    def __init__(self, body: nn.Module, *, functional_head: bool) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(TOKENS, WIDTH), body
        if not functional_head:
            self.head = nn.Linear(WIDTH, TOKENS, bias=False)
            self.head.weight = self.embedding.weight
        self.functional_head = functional_head

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.body(self.embedding(tokens))
        if self.functional_head:
            return functional.linear(x, self.embedding.weight)
        out: Tensor = self.head(x)
        return out


def _sequence(chance: random.Random) -> tuple[nn.Sequential, str]:
    """Layers from and to (rows, steps, width)."""
    made: dict[str, Callable[[], nn.Module]] = {
        "attention": Attention,
        "encoder layer": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 24, batch_first=True),
        "pre-norm encoder layer": lambda: nn.TransformerEncoderLayer(
            WIDTH, 2, 24, batch_first=True, norm_first=True, activation="gelu"
        ),
        "learned query": LearnedQuery,
        "rnn": lambda: First(nn.RNN(WIDTH, WIDTH, batch_first=True)),
        "gru": lambda: First(nn.GRU(WIDTH, WIDTH // 2, 2, batch_first=True, bidirectional=True)),
        "lstm": lambda: First(nn.LSTM(WIDTH, WIDTH, batch_first=True)),
        "gru cell": lambda: Cells(nn.GRUCell),
        "lstm cell": lambda: Cells(nn.LSTMCell),
        "two stages": TwoStage,
        "experts": Experts,
        "fused experts": FusedExperts,
        "adaptive": Adaptive,
        "feed-forward": lambda: nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH)
        ),
    }
    names = chance.sample(list(made), chance.choice([1, 2, 3]))
    return nn.Sequential(*(made[name]() for name in names)), " + ".join(names)


def _spatial(chance: random.Random, dims: int, channels: int) -> tuple[nn.Module, str]:
    """Convolutions, norms, a pool and a head."""
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    up: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    made: dict[str, Callable[[], list[nn.Module]]] = {
        "conv": lambda: [conv(12, 12, 3, padding=1), norm(12)],
        "depthwise": lambda: [conv(12, 12, 3, padding=1, groups=12, bias=False), norm(12)],
        "grouped": lambda: [conv(12, 12, 3, padding=1, groups=3), nn.GroupNorm(3, 12)],
        "transposed": lambda: [up(12, 12, 3, padding=1), nn.GroupNorm(1, 12)],
        "grouped transposed": lambda: [up(12, 12, 3, padding=1, groups=4)],
        "dilated": lambda: [conv(12, 12, 2, dilation=2), norm(12, affine=False)],
        "pointwise": lambda: [conv(12, 12, 1)],
    }
    names = chance.sample(list(made), chance.choice([1, 2, 3]))
    layers: list[nn.Module] = [conv(channels, 12, 3, padding=1)]
    for name in names:
        layers += [*made[name](), chance.choice([nn.ReLU(), nn.SiLU(), nn.Tanh(), nn.Identity()])]
    pool: Any = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1]
    head = [pool(1), nn.Flatten(), nn.Linear(12, CLASSES)]
    return nn.Sequential(*layers, *head), " + ".join(names)


def _plain(chance: random.Random) -> tuple[nn.Module, str]:
    layers: list[nn.Module] = []
    deep = chance.choice([1, 2, 4, 12])
    for _ in range(deep):
        layers += [nn.Linear(WIDTH, WIDTH, bias=chance.random() < 0.7)]
        layers += [chance.choice([nn.ReLU(), nn.Tanh(), nn.BatchNorm1d(WIDTH), nn.Identity()])]
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES)), f"{deep} linear"


def _tokens(chance: random.Random) -> tuple[nn.Module, str]:
    if chance.random() < 0.3:
        bag = nn.EmbeddingBag(TOKENS, WIDTH, mode=chance.choice(["mean", "sum"]))
        return nn.Sequential(bag, nn.Linear(WIDTH, CLASSES)), "embedding bag"
    body, said = _sequence(chance)
    table = nn.Embedding(TOKENS, WIDTH, padding_idx=chance.choice([None, 0]))
    return nn.Sequential(table, *body, Last(), nn.Linear(WIDTH, CLASSES)), said


def _language(chance: random.Random) -> tuple[nn.Module, str]:
    body, said = _sequence(chance)
    is_functional = chance.random() < 0.5
    return Language(body, functional_head=is_functional), f"{said}, tied"


BODIES: dict[str, Callable[[random.Random], tuple[nn.Module, str]]] = {
    "image": lambda chance: _spatial(chance, 2, 3),
    "signal": lambda chance: _spatial(chance, 1, 3),
    "volume": lambda chance: _spatial(chance, 3, 2),
    "sequence": _sequence,
    "features": _plain,
    "tokens": _tokens,
    "language": _language,
}


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim > 1 and p.is_floating_point()]


def _any_layer(chance: random.Random, model: nn.Module) -> nn.Module:
    """A plain layer with a weight; the first if there is none."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = [m for m in model.modules() if isinstance(m, kinds) and "weight" in m._parameters]
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    attended = [m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    usual = [m for m in found if id(m.weight) not in tied and all(m is not a for a in attended)]
    return chance.choice(usual) if usual else nn.Linear(2, 2)


@torch.no_grad()
def _scale(chance: random.Random, model: nn.Module) -> None:
    for parameter in _matrices(model):
        parameter.mul_(10 ** chance.uniform(-6, 3))


@torch.no_grad()
def _fill(chance: random.Random, model: nn.Module, value: float) -> None:
    found = _matrices(model)
    if found:
        chance.choice(found).fill_(value)


@torch.no_grad()
def _kill_channel(_chance: random.Random, model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_var is not None:
            module.running_var[::3] = 5.6e-45
            if module.affine:
                module.weight[::3], module.bias[::3] = 0.0, 0.0


@torch.no_grad()
def _dead_layer(chance: random.Random, model: nn.Module) -> None:
    layer: Any = _any_layer(chance, model)
    if layer.bias is not None:
        layer.bias.fill_(-100.0)


def _state(_chance: random.Random, model: nn.Module) -> None:
    class Stateful(nn.Module):
        def get_extra_state(self) -> object:
            return {"a": 1}

        def set_extra_state(self, _state: object) -> None:
            pass

    model.add_module("stateful", Stateful())


def _buffer(value: Tensor) -> Callable[[random.Random, nn.Module], None]:
    return lambda _chance, model: model.register_buffer("aside", value.clone())


def _parameter(value: Tensor) -> Callable[[random.Random, nn.Module], None]:
    def add(_chance: random.Random, model: nn.Module) -> None:
        model.extra = nn.Parameter(value.clone(), requires_grad=value.is_floating_point())

    return add


def _noncontiguous(chance: random.Random, model: nn.Module) -> None:
    layer: Any = _any_layer(chance, model)
    layer.weight = nn.Parameter(layer.weight.detach().transpose(0, 1).contiguous().transpose(0, 1))


def _shared(chance: random.Random, model: nn.Module) -> None:
    model.again = _any_layer(chance, model)


def _freeze(chance: random.Random, model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point() and chance.random() < 0.5)


ODDITIES: dict[str, Callable[[random.Random, nn.Module], Any]] = {
    "odd scales": _scale,
    "a zero matrix": lambda chance, model: _fill(chance, model, 0.0),
    "a constant matrix": lambda chance, model: _fill(chance, model, 0.01),
    "dead channels": _kill_channel,
    "a dead layer": _dead_layer,
    "extra state": _state,
    "a NaN buffer": _buffer(torch.tensor([1.0, torch.nan])),
    "an infinite buffer": _buffer(torch.tensor(torch.inf)),
    "an integer buffer": _buffer(torch.arange(300)),
    "a boolean buffer": _buffer(torch.ones(9, 9).tril() > 0),
    "a complex buffer": _buffer(torch.randn(3, 3, dtype=torch.complex64)),
    "a complex parameter": _parameter(torch.randn(2, 3, dtype=torch.complex64)),
    "an empty parameter": _parameter(torch.zeros(0, 4)),
    "a scalar parameter": _parameter(torch.tensor(0.7)),
    "one value": _parameter(torch.tensor([[2.5]])),
    "an unused matrix": _parameter(torch.randn(20, 20)),
    "not contiguous": _noncontiguous,
    "a shared module": _shared,
    "an unused module": lambda _chance, model: model.add_module("idle", nn.Linear(7, 9)),
    "an empty module": lambda _chance, model: model.add_module("empty", nn.ModuleDict()),
    "weight norm": lambda chance, model: parametrizations.weight_norm(_any_layer(chance, model)),
    "orthogonal": lambda chance, model: parametrizations.orthogonal(_any_layer(chance, model)),
    "pruned": lambda chance, model: prune.l1_unstructured(_any_layer(chance, model), "weight", 0.4),
    "frozen": _freeze,
}
