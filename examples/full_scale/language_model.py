"""A Transformer language model that shares its tables between input and output.

Baevski and Auli 2019, "Adaptive Input Representations": frequent words have long vectors and rare
ones short ones, which a projection makes as long. 16 layers of width 1,024 for WikiText-103 have
246.7 M parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the defaults are the published ones for WikiText-103."""

    words: int = 267_744
    cutoffs: tuple[int, ...] = (20_000, 60_000)
    layers: int = 16
    width: int = 1024
    inner: int = 4096
    heads: int = 8
    factor: int = 4
    dropout: float = 0.2


class Words(nn.Module):
    """Adaptive input and adaptive softmax over the same tables and projections.

    Both directions are one ``forward``, because a weight's stand-in is read where the module that
    holds it runs.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.ends = (0, *shape.cutoffs, shape.words)
        self.width = shape.width
        for number, (low, high) in enumerate(zip(self.ends, self.ends[1:], strict=False)):
            size = shape.width // shape.factor**number
            table = torch.empty(high - low, size)
            self.register_parameter(
                f"table{number}", nn.Parameter(nn.init.normal_(table, 0, size**-0.5))
            )
            projection = nn.init.xavier_uniform_(torch.empty(shape.width, size))
            self.register_parameter(f"proj{number}", nn.Parameter(projection))
        classes = torch.empty(len(shape.cutoffs), shape.width)
        self.classes = nn.Parameter(nn.init.normal_(classes, 0, shape.width**-0.5))

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Vectors of words; or with targets, given final states, the loss of each.

        Args:
            inputs: words, ``(batch, length)``; or states, ``(positions, width)``.
            targets: words, ``(positions,)``.
        """
        parts = [(getattr(self, f"table{n}"), getattr(self, f"proj{n}")) for n in range(self.count)]
        if targets is None:
            return self._embed(inputs, parts)
        return self._losses(inputs, targets, parts)

    @property
    def count(self) -> int:
        """Number of clusters."""
        return len(self.ends) - 1

    def _embed(self, words: Tensor, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        out = parts[0][1].new_zeros(*words.shape, self.width)
        for (table, projection), low, high in zip(parts, self.ends, self.ends[1:], strict=False):
            at = (words >= low) & (words < high)
            found = functional.linear(functional.embedding(words[at] - low, table), projection)
            out[at] = found.to(out.dtype)
        return out * math.sqrt(self.width)

    def _losses(
        self, states: Tensor, targets: Tensor, parts: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        table, projection = parts[0]
        head = torch.cat([states @ projection @ table.T, states @ self.classes.T], 1).float()
        first = self.ends[1]
        cluster = torch.bucketize(targets, torch.tensor(self.ends[1:-1]).to(targets), right=True)
        goal = torch.where(cluster == 0, targets, first + cluster - 1)
        losses = functional.cross_entropy(head, goal, reduction="none")
        for number in range(1, self.count):
            at = (cluster == number).nonzero().squeeze(1)
            table, projection = parts[number]
            tail = (states[at] @ projection @ table.T).float()
            own = functional.cross_entropy(tail, targets[at] - self.ends[number], reduction="none")
            losses = losses.index_add(0, at, own)
        return losses


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each behind a norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.dropout = shape.heads, shape.dropout
        self.attn_norm, self.norm = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.attn_qkv = nn.Linear(shape.width, 3 * shape.width)
        self.attn_out = nn.Linear(shape.width, shape.width)
        self.fc1 = nn.Linear(shape.width, shape.inner)
        self.fc2 = nn.Linear(shape.inner, shape.width)

    def forward(self, states: Tensor) -> Tensor:
        """Map ``(batch, length, width)``."""
        batch, length, width = states.shape
        qkv = self.attn_qkv(self.attn_norm(states))
        q, k, v = qkv.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout / 2 if self.training else 0.0
        seen = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        seen = self.attn_out(seen.transpose(1, 2).reshape(batch, length, width))
        states = states + functional.dropout(seen, self.dropout, self.training)
        inner = functional.relu(self.fc1(self.norm(states)))
        inner = functional.dropout(inner, self.dropout / 2, self.training)
        return states + functional.dropout(self.fc2(inner), self.dropout, self.training)


class LanguageModel(nn.Module):
    """Predicts each word from those before it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = Words(shape)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, words: Tensor, skip: int = 0) -> Tensor:
        """Loss of each word but the first ``skip + 1`` of a row, in nats, ``(words,)``.

        Args:
            words: ``(batch, length)``.
            skip: positions that only serve as context.
        """
        inputs, targets = words[:, :-1], words[:, 1:]
        states = self.embed(inputs)
        states = states + positions(inputs.shape[1], self.shape.width).to(states)
        states = functional.dropout(states, self.shape.dropout, self.training)
        for layer in self.layers:
            states = layer(states)
        states = self.norm(states)[:, skip:].flatten(0, 1)
        losses: Tensor = self.embed(states, targets[:, skip:].flatten())
        return losses


def positions(length: int, width: int) -> Tensor:
    """Sines and cosines of Vaswani et al. 2017, ``(length, width)``."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
    angles = torch.arange(length).unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], 1)
