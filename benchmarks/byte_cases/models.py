"""Small models with a few samples: `compress` with data, `collect` and `in_sequence`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import dither
from benchmarks.byte_cases.case import Case, drawn, saved, short, stored, written
from dither.calibrate import Loss, collect, in_sequence
from dither.core import Encoder, Stats
from dither.data import divergence, squared
from dither.encoders import GPTQ, AdaRound, Viterbi
from dither.formats import Affine


class Images(nn.Module):
    """Kernels plain, grouped and depth-wise, with batch norm, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 32, 3, stride=2, padding=1, padding_mode="reflect", groups=2)
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, 3, h, w)`` to logits ``(n, 10)``."""
        x = functional.silu(self.stem(x))
        x = functional.silu(self.depthwise(x)) + x
        x = functional.silu(self.norm(self.grouped(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Words(nn.Module):
    """A transformer of two layers whose output is tied to its table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 60, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(n, tokens)`` to logits ``(n, tokens, 60)``."""
        logits: Tensor = self.head(self.encoder(self.embed(tokens)))
        return logits


class Sounds(nn.Module):
    """A convolution over time, one transposed, a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 12, 5, padding="same", padding_mode="zeros")
        self.up = nn.ConvTranspose1d(12, 8, 4, stride=2)
        self.rnn = nn.LSTM(8, 12, batch_first=True)
        self.head = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, 4, time)`` to ``(n, 6)``."""
        x = torch.relu(self.up(torch.relu(self.conv(x))))
        out: Tensor = self.head(self.rnn(x.transpose(1, 2))[0][:, -1])
        return out


class Dense(nn.Module):
    """Linear layers with a norm between."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(20, 32, bias=bias)
        self.norm = nn.LayerNorm(32)
        self.second = nn.Linear(32, 24, bias=bias)
        self.third = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, 20)`` to ``(n, 5)``."""
        out: Tensor = self.third(torch.relu(self.second(torch.relu(self.norm(self.first(x))))))
        return out


def tokens(seed: int = 0, rows: int = 8) -> Tensor:
    """Ids of which small ones are frequent, ``(rows, 12)``."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, 12, generator=generator).square() * 60).long()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "images": (Images, lambda seed: drawn(8, 3, 12, 12, seed=seed)),
    "words": (Words, tokens),
    "sounds": (Sounds, lambda seed: drawn(8, 4, 10, seed=seed)),
    "dense": (Dense, lambda seed: drawn(16, 20, seed=seed)),
}
"""How a model and a batch of its inputs are made."""


def made(name: str) -> tuple[nn.Module, list[Tensor]]:
    """A model with weights of one seed and statistics of its own, and four batches."""
    torch.manual_seed(0)
    kind, batch = MODELS[name]
    model, batches = kind(), [batch(seed) for seed in range(4)]
    with torch.no_grad():
        for inputs in batches:  # running statistics of batch norm
            model(inputs)
    return model.eval(), batches


def cases() -> Iterator[Case]:
    """All of them."""
    for name in MODELS:
        for size in ("50%", "6x"):
            yield Case(f"data/{name}/{size}", partial(_compressed, name, size))
        yield Case(f"data/{name}/int8", partial(_compressed, name, "5x", activations="int8"))
        yield Case(f"collect/{name}", partial(_statistics, name))
        yield Case(f"collect/{name}/loss", partial(_statistics, name, loss=_loss))
        for encoder in _IN_TURN:
            what = f"in_sequence/{name}/{short(encoder)}"
            yield Case(what, partial(_in_turn, name, encoder))
    yield Case(
        "in_sequence/dense/uncorrected", lambda: _in_turn("dense", GPTQ(0.1), corrected=False)
    )
    yield Case("data/images/divergence", lambda: _compressed("images", "6x", divergence))
    yield Case("data/images/evaluate", _evaluated)
    yield Case("data/dense/bf16", _in_bfloat16)
    yield Case("data/dense/forward", _of_dicts)


_IN_TURN: tuple[Encoder, ...] = (
    GPTQ(0.1, damping=0.01),
    Viterbi(0.05, damping=0.01),
    AdaRound(Affine(4, axis=0), iterations=40),
)


def _compressed(
    name: str,
    size: str,
    distance: Callable[[Any, Any], Tensor] = squared,
    activations: str | None = None,
) -> bytes:
    model, batches = made(name)
    data = dither.Data(batches, distance=distance)
    return saved(dither.compress(model, size, data=data, activations=activations))


def _evaluated() -> bytes:
    model, batches = made("images")
    wanted = [model(batch).argmax(1) for batch in batches]

    def agreement(changed: nn.Module) -> float:
        pairs = zip(batches, wanted, strict=True)
        return float(sum((changed(x).argmax(1) == y).double().mean() for x, y in pairs))

    return saved(dither.compress(model, "5x", data=batches, evaluate=agreement))


def _in_bfloat16() -> bytes:
    model, batches = made("dense")
    return saved(dither.compress(model.bfloat16(), "4x", data=[x.bfloat16() for x in batches]))


def _of_dicts() -> bytes:
    model, batches = made("dense")

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> object:
        return model(batch["x"]).softmax(1)

    data = dither.Data([{"x": x} for x in batches], forward=forward, batches=3)
    return saved(dither.compress(model, "4 bits", data=data))


def _loss(output: Tensor, batch: object) -> Tensor:
    del batch
    loss: Tensor = output.square().mean()
    return loss


def _statistics(name: str, loss: Loss | None = None) -> bytes:
    model, batches = made(name)
    found = collect(model, batches, loss=loss)
    return stored({f"{n}.{kind}": v for n, s in found.items() for kind, v in _tensors(s).items()})


def _tensors(stats: Stats) -> dict[str, Tensor]:
    numbers = {
        "low": stats.low,
        "high": stats.high,
        "samples": stats.samples,
        "outputs": stats.outputs,
    }
    parts = {
        "importance": stats.importance,
        "gram": stats.gram,
        "mean": stats.mean,
        "cross": stats.cross,
        "counts": stats.counts,
    }
    found = {n: torch.tensor(v, dtype=torch.float64) for n, v in numbers.items() if v is not None}
    return found | {n: v for n, v in parts.items() if v is not None}


def _in_turn(name: str, encoder: Encoder, *, corrected: bool = True) -> bytes:
    model, batches = made(name)

    def choose(name: str, weight: Tensor) -> Encoder | None:
        has_groups = weight.ndim > 2 or "in_proj" in name
        return None if has_groups and isinstance(encoder, Viterbi) else encoder

    return written(in_sequence(model, batches, choose, corrected=corrected))
