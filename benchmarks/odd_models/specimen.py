"""One random model, what it reads, and the budget: all follow from a seed and a number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from benchmarks.odd_models.oddities import ODDITIES, WRAPPERS
from benchmarks.odd_models.parts import BUILDERS, STEPS, Unused
from dither.data import call

WORDS = 40
DTYPES = (torch.float64, torch.bfloat16, torch.float16)
SIZES: tuple[int | str, ...] = (
    "3x",
    "5x",
    "8x",
    "12x",
    "20x",
    "40x",
    "4 bits",
    "2.5 bits",
    "1 bits",
    "15%",
)
SIZES += ("0.9 bits", "10KB", "2kB", "100%", "1000%", "1000x", "9B", 10**7)


@dataclass(frozen=True)
class Result:
    """An output that is no tensor, tuple or dict."""

    scores: Tensor
    nothing: None
    place: Tensor


class Whole(nn.Module):
    """Front, body and head of a random model."""

    def __init__(self, front: nn.Module, body: nn.Module, head: nn.Module, output: str) -> None:
        super().__init__()
        self.front, self.body, self.head, self.output = front, body, head, output

    def forward(self, x: Tensor, mask: Tensor | None = None) -> object:
        """What comes out, in one of many shapes."""
        hidden = self.body(self.front(x))
        if mask is not None:
            hidden = hidden * mask[..., None].to(hidden.dtype)
        scores: Tensor = self.head(hidden)
        return shaped(self.output, scores, hidden)


def shaped(output: str, scores: Tensor, hidden: Tensor) -> object:
    """Scores and hidden states, as models give them."""
    if output == "tuple":
        return scores, None, (hidden,)
    if output == "dict":
        return {"scores": scores, "none": None, "inner": {"place": scores.argmax(-1)}}
    if output == "dataclass":
        return Result(scores, None, scores.argmax(-1))
    if output == "masked":
        masked = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(masked, -torch.inf)
    if output == "list":
        return [scores[0], scores.mean(1)]
    if output == "scalar":
        return scores.square().mean()
    return scores


class Rows(nn.Module):
    """An `nn.EmbeddingBag` for each position: of a word, and of its neighbour."""

    def __init__(self, width: int, mode: str) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(WORDS, width, mode=mode)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([x, x.roll(1, -1)], -1)
        y: Tensor = self.bag(both.flatten(0, -2))
        return y.view(*x.shape, -1)


class Positions(nn.Module):
    """Words and their places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, width), nn.Embedding(STEPS + 2, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.words(x) + self.places(torch.arange(x.shape[-1]) + 2)
        return y


@dataclass
class Specimen:
    """A model to compress.

    Attributes:
        model: in evaluation mode or not, in wrappers or not.
        batches: what it reads.
        size: the budget.
        kinds: what it is made of, for people.
        default_dtype: torch's while it is compressed.
        inference: whether all is done in inference mode.
    """

    model: nn.Module
    batches: list[Any]
    size: int | str
    kinds: tuple[str, ...]
    default_dtype: torch.dtype
    inference: bool

    def outputs(self, model: nn.Module) -> list[Any]:
        """Of a model like this one, for every batch, in evaluation mode."""
        model.eval()
        with torch.no_grad():
            return [call(model, batch) for batch in self.batches]


def specimen(seed: int, number: int) -> Specimen:
    """The model of a number; the same in every process."""
    chance = Random(f"{seed}/{number}")  # noqa: S311 - repeatable, not secret
    torch.manual_seed(chance.randrange(1 << 30))
    kinds: list[str] = []
    model, is_text = _network(chance, kinds)
    _make_odd(chance, model, kinds)
    batches = _batches(chance, kinds, is_text=is_text)
    model, batches = _in_type(chance, model, batches, kinds)
    model.train(chance.random() < 0.3)
    inference = chance.random() < 0.05
    default = chance.choice(DTYPES) if chance.random() < 0.06 else torch.float32
    if chance.random() < 0.06:
        wrapper = chance.choice(WRAPPERS)
        model = wrapper(model)
        kinds.append(type(model).__name__)
    size = chance.randrange(200, 20_000) if chance.random() < 0.2 else chance.choice(SIZES)
    kinds += [f"default {default}"] * (default != torch.float32) + ["inference"] * inference
    return Specimen(model, batches, size, tuple(kinds), default, inference)


def _network(chance: Random, kinds: list[str]) -> tuple[nn.Module, bool]:
    width = chance.choice([4, 8, 16, 32])
    is_text = chance.random() < 0.4
    front = _front(chance, width, is_text=is_text)
    first, parts = width, list[nn.Module]()
    for _ in range(chance.choice([0, 1, 1, 2, 2, 3, 4])):
        build = chance.choice(BUILDERS)
        part, width = build(chance, width)
        kinds.append(build.__name__)
        parts.append(part)
    body: nn.Module = nn.Sequential(*parts)
    head: nn.Module = nn.Linear(width, WORDS if is_text else 6, bias=chance.random() < 0.5)
    words = getattr(front, "words", front)
    if is_text and first == width and isinstance(words, nn.Embedding) and chance.random() < 0.5:
        head.weight = words.weight
        kinds.append("tied head")
    if chance.random() < 0.03:
        front, body, head = nn.Identity(), Unused(width), nn.Identity()
        is_text = False
    outputs = ["tensor", "tensor", "tuple", "dict", "dataclass", "masked", "list", "scalar"]
    output = chance.choice(outputs)
    kinds += [type(front).__name__, f"gives {output}"]
    return Whole(front, body, head, output), is_text


def _front(chance: Random, width: int, *, is_text: bool) -> nn.Module:
    if not is_text:
        return nn.Linear(5, width)
    padding = chance.choice([None, 0])
    rows = Rows(width, chance.choice(["sum", "mean", "max"]))
    table = nn.Embedding(WORDS, width, padding_idx=padding)
    return chance.choice([table, table, Positions(width), rows])


def _make_odd(chance: Random, model: nn.Module, kinds: list[str]) -> None:
    for oddity in chance.sample(ODDITIES, chance.choice([0, 1, 1, 2, 2, 3])):
        with torch.no_grad():
            oddity(chance, model)
        kinds.append(oddity.__name__)


def _batches(chance: Random, kinds: list[str], *, is_text: bool) -> list[Any]:
    count, rows = chance.choice([1, 1, 2, 4]), chance.choice([1, 2, 8])
    kind = chance.choice(["plain", "plain", "plain", "constant", "tiny", "offset", "zero"])
    batches: list[Any] = []
    for _ in range(count):
        if is_text:
            x = torch.randint(0, 1 if kind == "constant" else WORDS, (rows, STEPS))
        else:
            x = torch.randn(rows, STEPS, 5)
            x = {"constant": torch.ones_like(x), "tiny": x * 1e-6, "zero": x * 0}.get(kind, x)
            x = 1e4 + 0.1 * x if kind == "offset" else x
        batches.append(x)
    form = chance.choice(["tensor", "tensor", "tuple", "dict"])
    kinds.append(f"{count} x {rows} {kind} as {form}")
    if form == "tuple":
        return [(x, torch.zeros(rows)) for x in batches]
    if form == "dict":
        mask = torch.ones(rows, STEPS)
        mask[:, STEPS // 2 :] = 0
        return [{"x": x, "mask": mask} for x in batches]
    return batches


def _in_type(
    chance: Random, model: nn.Module, batches: list[Any], kinds: list[str]
) -> tuple[nn.Module, list[Any]]:
    """The model in another type, where it runs in it."""
    if chance.random() > 0.2:
        return model, batches
    dtype = chance.choice(DTYPES)
    placed = tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, batches)
    _cast(model, torch.float32, dtype)
    try:
        with torch.no_grad():
            call(model.eval(), placed[0])
    except RuntimeError:  # torch has no such kernel
        return _cast(model, dtype, torch.float32), batches
    kinds.append(str(dtype))
    return model, placed


def _cast(model: nn.Module, before: torch.dtype, after: torch.dtype) -> nn.Module:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(after) if tensor.dtype == before else tensor

    make: Callable[..., nn.Module] = model._apply  # noqa: SLF001 - `to` would cast float8 as well
    return make(cast)
