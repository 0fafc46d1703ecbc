"""Parts of random models: each takes and gives hidden states, (batch, `STEPS`, width)."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 16
"""Positions of a sequence, or pixels of an image."""
GRIDS = {1: (16,), 2: (4, 4), 3: (4, 2, 2)}
"""The same as lines, images and volumes."""
EXPERTS = 3

Part = tuple[nn.Module, int]
"""A module, and the width that it gives."""
Builder = Callable[[Random, int], Part]

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_BACK = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_BATCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


class OnGrid(nn.Module):
    """Convolutions, which see the positions as a line, an image or a volume."""

    def __init__(self, inner: nn.Module, axes: int) -> None:
        super().__init__()
        self.inner, self.grid = inner, GRIDS[axes]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x.transpose(1, 2).reshape(len(x), x.shape[-1], *self.grid))
        return y.flatten(2).transpose(1, 2)


class First(nn.Module):
    """The first output of a module that gives several, such as a GRU."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)[0]
        return y


class Attention(nn.Module):
    """`nn.MultiheadAttention`, of the states to themselves or to a constant, learned query."""

    def __init__(self, width: int, *, learned: bool, bias: bool) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(width, 2, bias=bias, batch_first=True)
        self.query = nn.Parameter(torch.randn(STEPS, width)) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        query = x if self.query is None else self.query.expand(len(x), -1, -1)
        y: Tensor = self.attend(query, x, x, need_weights=False)[0]
        return y


class Fused(nn.Module):
    """Attention whose three projections are one matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return y


class Cells(nn.Module):
    """A recurrent cell, step by step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        outputs = []
        for step in x.unbind(1):
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)


class Encoded(nn.Module):
    """A GRU that begins from a state that depends on the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.begin, self.gru = nn.Linear(width, width), nn.GRU(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.gru(x, self.begin(x.mean(1))[None].contiguous())[0]
        return y


class Experts(nn.Module):
    """Each position goes to one of some experts; the last may be idle."""

    def __init__(self, width: int, *, idle: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(width, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(EXPERTS))
        if idle:
            with torch.no_grad():
                self.gate.weight[-1], self.gate.bias[-1] = 0.0, -100.0

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            here = chosen == number
            if bool(here.any()):
                y[here] = expert(x[here]).to(y.dtype)
        return x + y


class FusedExperts(nn.Module):
    """Experts whose weights are one parameter of three dimensions."""

    def __init__(self, width: int, *, idle: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(width, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, width, 2 * width) / math.sqrt(width))
        self.down = nn.Parameter(torch.randn(EXPERTS, 2 * width, width) / math.sqrt(2 * width))
        self.register_buffer("penalty", torch.tensor([0.0] * (EXPERTS - 1) + [-1e4 * idle]))
        self.penalty: Tensor

    def forward(self, x: Tensor) -> Tensor:
        shares = (self.gate(x) + self.penalty).softmax(-1)
        hidden = torch.einsum("btw,ewh->ebth", x, self.up).relu()
        return x + torch.einsum("ebth,ehw,bte->btw", hidden, self.down, shares)


class Gain(nn.Module):
    """Parameters of no dimension, of one value, and in lists and dicts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(1.25)), nn.Parameter(torch.zeros(1))
        self.many = nn.ParameterList([torch.randn(width), torch.randn(1, width)])
        self.named = nn.ParameterDict({"a": torch.randn(width), "b": torch.ones(1, 1, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale + self.shift + self.many[0] * self.named["b"]
        y: Tensor = x + self.many[1] + self.named["a"]
        return y


class Fourier(nn.Module):
    """Complex weights, on frequencies."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(STEPS // 2 + 1, width, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.rfft(x.float(), dim=1) * self.weight
        back: Tensor = torch.fft.irfft(y, n=STEPS, dim=1)
        return back.to(x.dtype)


class Halting(nn.Module):
    """One layer as many times as the values say."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1 + int((x.float().abs().mean() * 997) % 3)):
            x = x + F.tanh(self.layer(x))
        return x


class Residual(nn.Module):
    """The sum of what goes in and what comes out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.inner(x)
        return y


class Twice(nn.Module):
    """A weight that one module owns, and the model reads once more by a function."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x).relu(), self.layer.weight.t())


class Detour(nn.Module):
    """A layer whose result passes outside of torch, and takes no gradient."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return x + torch.from_numpy(y.detach().float().numpy().copy()).to(y)


class Frozen(nn.Module):
    """A part that runs without gradients."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


class Pairs(nn.Module):
    """`nn.Bilinear` of the states with themselves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.both = nn.Bilinear(width, width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.both(x, x.flip(1))
        return y


class Decoder(nn.Module):
    """`nn.TransformerDecoderLayer` over its own input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, x)
        return y


class Unused(nn.Module):
    """Holds layers that no forward calls, and none at all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spare = nn.ModuleDict({"a": nn.Linear(width, 7), "none": nn.ModuleList()})
        self.empty = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.empty(x)
        return y


def linear(chance: Random, width: int) -> Part:
    to = chance.choice([4, 6, 24, 48])
    act = chance.choice([nn.ReLU(), nn.GELU(), nn.Tanh(), nn.PReLU(), nn.Hardswish()])
    return nn.Sequential(nn.Linear(width, to, bias=chance.random() < 0.7), act), to


def convolution(chance: Random, width: int) -> Part:
    axes = chance.choice([1, 2, 2, 3])
    to = chance.choice([4, 12, 32])
    kind = chance.choice(["plain", "depthwise", "grouped", "transposed", "strided"])
    layers: list[nn.Module] = []
    bias = chance.random() < 0.5
    if kind == "plain":
        layers = [_CONV[axes](width, to, 3, padding=1, bias=bias)]
    elif kind == "depthwise":
        layers = [_CONV[axes](width, width, 3, padding=1, groups=width, bias=bias)]
        layers += [_CONV[axes](width, to, 1)]
    elif kind == "grouped":
        layers = [_CONV[axes](width, to, 3, padding=1, groups=2, bias=bias)]
    elif kind == "transposed":
        layers = [_BACK[axes](width, to, 3, padding=1, groups=chance.choice([1, 2]), bias=bias)]
    else:
        layers = [_CONV[axes](width, to, 2, stride=2, bias=bias), nn.ReLU()]
        layers += [_BACK[axes](to, to, 2, stride=2)]
    norms = [_BATCH[axes](to), nn.GroupNorm(2, to), _INSTANCE[axes](to, affine=True), nn.Identity()]
    layers += [chance.choice(norms), chance.choice([nn.ReLU(), nn.SiLU(), nn.Identity()])]
    return OnGrid(nn.Sequential(*layers), axes), to


def norm(chance: Random, width: int) -> Part:
    batch = OnGrid(nn.BatchNorm1d(width, affine=chance.random() < 0.7), 1)
    return chance.choice([nn.LayerNorm(width), nn.RMSNorm(width), batch]), width


def attention(chance: Random, width: int) -> Part:
    kind = chance.randrange(4)
    if kind == 0:
        learned = chance.random() < 0.5
        return Residual(Attention(width, learned=learned, bias=chance.random() < 0.5)), width
    if kind == 1:
        first = chance.random() < 0.5
        layer = nn.TransformerEncoderLayer(
            width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=first
        )
        return layer, width
    return Residual(Fused(width)) if kind == 2 else Decoder(width), width


def recurrent(chance: Random, width: int) -> Part:
    to = chance.choice([4, 6, 24])
    kind = chance.randrange(6)
    if kind < 3:
        both = chance.random() < 0.4
        layers = chance.choice([1, 2])
        make = [nn.RNN, nn.GRU, nn.LSTM][kind]
        net = make(width, to, num_layers=layers, bidirectional=both, batch_first=True)
        return First(net), to * (1 + both)
    if kind == 3:
        return First(nn.LSTM(width, to, proj_size=to // 2, batch_first=True)), to // 2
    if kind == 4:
        cell = chance.choice([nn.RNNCell, nn.GRUCell, nn.LSTMCell])
        return Cells(cell(width, to)), to
    return Encoded(width), width


def experts(chance: Random, width: int) -> Part:
    idle = chance.random() < 0.5
    return chance.choice([Experts, FusedExperts])(width, idle=idle), width


def unusual(chance: Random, width: int) -> Part:
    simple: list[Callable[[int], nn.Module]] = [Gain, Fourier, Halting, Twice, Detour]
    simple += [Pairs, Unused]
    if chance.random() < 0.15:
        return Frozen(nn.Linear(width, width)), width
    return chance.choice(simple)(width), width


BUILDERS: tuple[Builder, ...] = (
    linear,
    convolution,
    convolution,
    norm,
    attention,
    recurrent,
    experts,
    unusual,
)
