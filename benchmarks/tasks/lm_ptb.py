"""A small language model on Penn Treebank: words, a vocabulary of 10,000, tied embeddings.

Three Transformer layers of width 128 (1.87 M parameters, of which the embedding has 1.28 M), read
in windows of 64 tokens. The score is the perplexity of a split, less is better; each token is
predicted once, from what stands before it in its window.
"""

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from . import data_path

__all__ = ["LanguageModel", "evaluate", "load", "loss_of", "vocabulary", "windows"]

WINDOW = 64
ROWS, STEPS, RATE = 8, 250, 3e-3
"""Of training that goes on from the trained model: windows in a batch, steps, Adam's rate."""
_BATCH = 64
_FILES = {"dev": "valid", "test": "test"}


class _Layer(nn.Module):
    """Attention and a feed-forward network, each after a layer norm."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        shape = (rows, length, 3, self.heads, width // self.heads)
        q, k, v = self.qkv_proj(self.attention_norm(x)).view(shape).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out_proj(mixed.transpose(1, 2).reshape(x.shape)))
        hidden = nn.functional.relu(self.fc1(self.norm(x)))
        out: Tensor = x + self.dropout(self.fc2(hidden))
        return out


class LanguageModel(nn.Module):
    """Tokens ``(rows, length)`` to logits ``(rows, length, vocabulary)``."""

    def __init__(
        self, width: int = 128, layers: int = 3, heads: int = 4, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(vocabulary()), width)
        self.layers = nn.ModuleList(_Layer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, len(vocabulary()), bias=False)
        self.output.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("places", _sinusoids(WINDOW, width), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        x = self.dropout(x + self.get_buffer("places")[: tokens.shape[1]])
        for layer in self.layers:
            x = layer(x)
        return self.logits(self.norm(x))

    def logits(self, x: Tensor) -> Tensor:
        """The output layer."""
        found: Tensor = self.output(x)
        return found


class _OneTable(LanguageModel):
    """The same without a module for the output layer: there is one table, so one to compress."""

    def __init__(self) -> None:
        super().__init__()
        del self.output

    def logits(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.embedding.weight)


def load(weights: Path) -> nn.Module:
    """The model of trained weights in evaluation mode, for compressors that do not know ties.

    Args:
        weights: what ``torch.save`` wrote of the state of a :class:`LanguageModel`.
    """
    state = torch.load(weights, weights_only=True)
    del state["output.weight"]
    model = _OneTable()
    model.load_state_dict(state)
    return model.eval()


def _sinusoids(length: int, width: int) -> Tensor:
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(length).unsqueeze(1) * rates
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)


def _words(split: str) -> list[str]:
    text = data_path(f"ptb/ptb.{split}.txt").read_text(encoding="utf-8")
    return text.replace("\n", " <eos> ").split()


@cache
def vocabulary() -> dict[str, int]:
    """Numbers of the words of the training text, the most frequent first."""
    counts: dict[str, int] = {}
    for word in _words("train"):
        counts[word] = counts.get(word, 0) + 1
    return {word: i for i, word in enumerate(sorted(counts, key=lambda w: (-counts[w], w)))}


@cache
def _tokens(split: str) -> Tensor:
    numbers = vocabulary()
    return torch.tensor([numbers[word] for word in _words(split)])


def windows(rows: int, seed: int) -> Iterator[Tensor]:
    """Batches ``(rows, 65)`` of training text for ever; each epoch begins at another offset."""
    tokens, generator = _tokens("train"), torch.Generator().manual_seed(seed)
    while True:
        start = int(torch.randint(WINDOW, (1,), generator=generator))
        count = (len(tokens) - start - 1) // WINDOW
        at = start + WINDOW * torch.randperm(count, generator=generator)
        for some in at.split(rows):
            if len(some) == rows:
                yield tokens[some.unsqueeze(1) + torch.arange(WINDOW + 1)]


batches = windows  # the name that other tasks have


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats of a batch ``(rows, length + 1)``."""
    logits = model(batch[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, split: str) -> float:
    """Perplexity of ``"dev"`` (Mikolov's ``valid``) or ``"test"``; call ``model.eval()`` first."""
    tokens = _tokens(_FILES[split])
    count = (len(tokens) - 1) // WINDOW
    at = WINDOW * torch.arange(count).unsqueeze(1) + torch.arange(WINDOW + 1)
    batches = tokens[at].split(_BATCH)
    total = sum(float(loss_of(model, batch)) * len(batch) for batch in batches)
    return math.exp(total / count)
