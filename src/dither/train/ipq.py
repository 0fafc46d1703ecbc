"""Iterative product quantization: group by group, layers get codebooks that training moves."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from dither.core import Codes, Encoded, SpecError, Stats, code_width
from dither.data import Data
from dither.encoders import KMeans
from dither.formats import Product
from dither.formats.settings import check_count, check_kind, check_number
from dither.train.attached import Attached
from dither.train.input_moments import input_metrics
from dither.train.method import Method
from dither.train.refreshed_format import decoded_table
from dither.train.surrogate import Surrogate, plain

_ATTENTION = r"attn|attention|query|key|value|qkv|[qkvo]_proj|out_proj|in_proj"
_EMBEDDING = r"emb|wte|wpe|lm_head|tok"
_FEED_FORWARD = r"ffn|mlp|fc_?\d|fc\b|feed_?forward|intermediate|output|linear\d|dense|w[123]\b"

TRANSFORMER = (_FEED_FORWARD, _EMBEDDING, _ATTENTION)
"""The published order, as patterns: feed-forward, embeddings, attention."""


@dataclass(frozen=True)
class ProductCodes(Method):
    """Product quantization whose centroids training moves (Stock et al. 2020, arXiv 1907.05686).

    Until it is placed, by :class:`IterativePQ` or ``surrogate.place(weight)``, a weight trains as
    it is, or through ``noise``. Then its blocks keep their centroids, and the centroids learn: the
    gradient of each is the mean over its blocks. What has not been placed at the end is quantized
    by k-means as it is. The loss is the user's: Stock et al. distil, with no labels, see
    :class:`Teacher`.

    The centroids wait from the start as extras without a gradient, so that optimizers, state dicts
    and DDP know them; an optimizer's moments begin when they are placed. Among several processes
    the gradient is 0 until then, since DDP waits for one.

    Attributes:
        format: a Product; ``Product(8, dtype=torch.int8)`` for centroids on an int8 grid.
        noise: how to train before, such as ``QuantNoise(Product(8), kind="proxy")``.
        iterations: of k-means.
        lr: learning rate of the centroids, for Adam.

    >>> weight = torch.tensor([[1.0, 2.0, 0.0, 0.5], [0.0, 0.5, 1.0, 2.0]])
    >>> surrogate = ProductCodes(Product(2, points=2)).begin(weight)
    >>> surrogate.place(weight)
    >>> bool((surrogate(weight) == weight).all())  # two centroids hold both blocks
    True
    """

    name: ClassVar[str] = "product_codes"

    format: Product
    noise: Method | None = None
    iterations: int = 15
    lr: float = 1e-3

    def __post_init__(self) -> None:
        check_kind("ProductCodes", self.format, (Product,))
        check_count("ProductCodes", "iterations", self.iterations, 0, 1 << 20)
        check_number("ProductCodes", "lr", self.lr, 1e6)
        if self.noise is not None:
            check_kind("ProductCodes", self.noise, (Method,))

    def begin(self, weight: Tensor) -> Surrogate:
        return LearnedCentroids(self, weight)


class LearnedCentroids(Surrogate):
    """One weight that becomes a codebook with learned centroids.

    Attributes:
        centroids: ``(points * block,)``, of which those in use come first.
        indices: the centroid of each block, int64 ``(blocks,)``, or None before it is placed.
        noise: what trains until then, or None.
    """

    def __init__(self, spec: ProductCodes, weight: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.lr = spec.lr
        fmt = spec.format
        self.centroids = nn.Parameter(torch.zeros(fmt.points * fmt.block, device=weight.device))
        self.indices: Tensor | None = None
        self.noise = None if spec.noise is None else spec.noise.begin(weight)
        self._members: Tensor | None = None
        self._shape = tuple(weight.shape)

    @property
    def is_placed(self) -> bool:
        """Whether centroids have taken the weight's place."""
        return self.indices is not None

    def place(self, weight: Tensor, metric: Tensor | None = None) -> None:
        """Quantize: from here on, the centroids learn and the blocks keep theirs.

        Args:
            weight: any shape.
            metric: second moments of what the blocks are multiplied with, ``(block, block)``: the
                error of the outputs is minimised, and without it that of the weights.
        """
        encoded = quantize(self.spec, plain(weight).float(), metric)
        self._set(encoded.codes["indices"].values.reshape(-1).to(torch.int64))
        table = self.spec.format.params_of(encoded)["centroids"]
        with torch.no_grad():
            self.centroids.zero_()
            self.centroids[: table.numel()] = table.reshape(-1)
        self.centroids.grad = None
        self.reset()

    def noisy(self, weight: Tensor) -> Tensor:
        if self.indices is None or self._members is None:
            trained = weight if self.noise is None else self.noise.noisy(weight)
            return trained + _nothing(self.centroids)
        table = self._table()
        stored = decoded_table(self.spec.format, {"centroids": table.detach()})
        fmt = self.spec.format
        values: Tensor = _Placed.apply(  # type: ignore[no-untyped-call]
            stored + (table - table.detach()), self.indices, self._members, self._shape, fmt
        )
        return values + _nothing(weight)

    def draw(self, weight: Tensor, generator: torch.Generator, step: int) -> None:
        if self.noise is not None and self.indices is None:
            self.noise.progress = self.progress
            self.noise.draw(weight, generator, step)

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        if self.indices is None:
            return quantize(self.spec, weight)
        fmt = self.spec.format
        held = {"centroids": self._table().detach()}
        parts = fmt.assign(held["centroids"].new_empty(0, fmt.block), held)
        indices = Codes(self.indices.view(fmt.grid(self._shape)), len(held["centroids"]))
        codes = {**parts.codes, "indices": indices}
        return Encoded(fmt, self._shape, weight.dtype, codes, parts.params)

    def soft_bits(self, weight: Tensor) -> Tensor:
        """A constant: the exact bits at fixed width, with all centroids."""
        fmt = self.spec.format
        rows, across = fmt.grid(self._shape)
        table = fmt.points * fmt.block * fmt.dtype.itemsize * 8
        bits = rows * across * code_width(fmt.points) + table
        return torch.tensor(float(bits), device=weight.device)

    def aside(self) -> dict[str, Any]:
        inner = {} if self.noise is None else self.noise.aside()
        return {"indices": self.indices, "noise": inner}

    def load_aside(self, state: Mapping[str, Any]) -> None:
        self.indices = None
        if state["indices"] is not None:
            self._set(state["indices"])
        if self.noise is not None:
            self.noise.load_aside(state["noise"])

    def _set(self, indices: Tensor) -> None:
        self.indices = indices
        self._members = indices.bincount()

    def _table(self) -> Tensor:
        """The centroids in use, differentiable."""
        block = self.spec.format.block
        count = 0 if self._members is None else len(self._members)
        return self.centroids[: count * block].view(count, block)


def _nothing(value: Tensor) -> Tensor | float:
    """Zero; among several processes, one that gives every parameter its gradient, as DDP asks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return value.reshape(-1)[:1].sum() * 0
    return 0.0


class _Placed(torch.autograd.Function):
    """Look centroids up; the gradient of each is the mean over its blocks."""

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, indices: Tensor, members: Tensor, shape: Any, fmt: Product
    ) -> Tensor:
        ctx.save_for_backward(indices, members)
        ctx.format = fmt
        rows, across = fmt.grid(shape)
        found = table[indices].view(rows, across * fmt.block)
        return found[:, : math.prod(shape) // max(rows, 1)].reshape(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        indices, members = ctx.saved_tensors
        blocks = ctx.format.blocks(gradient)
        sums = blocks.new_zeros(len(members), blocks.shape[1]).index_add_(0, indices, blocks)
        return sums / members.clamp(min=1).unsqueeze(1), None, None, None, None


def quantize(spec: ProductCodes, weight: Tensor, metric: Tensor | None = None) -> Encoded:
    """k-means, or with a metric the EM of Stock et al. 2020, section 3.2.

    With ``metric = L L^T``, the error ``(c - v)^T metric (c - v)`` is the plain squared error of
    ``L^T v``, so that both steps of EM are those of k-means on transformed blocks.
    """
    fmt = spec.format
    if metric is None:
        return KMeans(fmt, spec.iterations).lloyd(weight)
    blocks = fmt.blocks(weight.float())
    metric = metric.to(blocks).double()
    scale = metric.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    ridge = torch.eye(fmt.block, dtype=torch.float64, device=metric.device) * 1e-4
    root = torch.linalg.cholesky(metric / scale + ridge).float()
    wide = Product(fmt.block, fmt.points, torch.float32)
    found = KMeans(wide, spec.iterations).lloyd(blocks @ root)
    indices = found.codes["indices"].values.reshape(-1).to(torch.int64)
    members = indices.bincount().clamp(min=1).unsqueeze(1)
    means = blocks.new_zeros(len(members), fmt.block).index_add_(0, indices, blocks) / members
    parts = fmt.assign(means.new_empty(0, fmt.block), {"centroids": means})
    codes = Codes(indices.view(fmt.grid(tuple(weight.shape))), len(means))
    shape = tuple(weight.shape)
    return Encoded(fmt, shape, weight.dtype, {**parts.codes, "indices": codes}, parts.params)


@dataclass(frozen=True, eq=False)
class IterativePQ:
    """Place groups of layers one after another (Stock et al. 2020; Fan, Stock et al. 2021).

    A schedule for weights with :class:`ProductCodes`. Stage ``k`` is placed after step
    ``start + k * every``; in between, what is not yet placed and all centroids train.

    Attributes:
        every: optimizer steps of one stage.
        stages: ordered groups, each of one or several globs against names of weights; weights that
            no glob matches make a last group. ``"transformer"``: feed-forward, embeddings,
            attention, by common names. ``"layers"``: each weight by itself, in the model's order.
        start: optimizer steps before the first.
        data: a loader, or :class:`~dither.Data`: k-means then minimises the error of the layers'
            outputs, on inputs that come from the network as it is quantized so far. No labels are
            used.
        batches: how many of them at most.
    """

    every: int
    stages: str | Sequence[str | Sequence[str]] = "transformer"
    start: int = 0
    data: Data | Iterable[Any] | None = None
    batches: int = 8

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        check_count("IterativePQ", "every", self.every, 1, 1 << 31)
        check_count("IterativePQ", "start", self.start, 0, 1 << 31)
        check_count("IterativePQ", "batches", self.batches, 1, 1 << 31)
        if isinstance(self.stages, str) and self.stages not in {"transformer", "layers"}:
            raise SpecError(
                "stages are 'transformer', 'layers' or an ordered list of globs such as "
                f"['*.mlp.*', '*.attn.*'], not {self.stages!r}"
            )

    def __call__(self, run: Attached, step: int) -> None:
        """Place what is due after ``step`` steps."""
        if step < self.start:
            return
        names = [n for n, s in run.surrogates.items() if isinstance(s, LearnedCentroids)]
        for group in self.groups(names)[: 1 + (step - self.start) // self.every]:
            due = {n: s for n in group if not (s := _surrogate(run, n)).is_placed}
            metrics = self._metrics(run, due) if due and self.data is not None else {}
            for name, surrogate in due.items():
                surrogate.place(run.parameter(name), metrics.get(name))

    def groups(self, names: Sequence[str]) -> list[list[str]]:
        """Names of weights, stage by stage.

        Args:
            names: of all weights with ProductCodes.

        Raises:
            SpecError: there is none.
        """
        if not names:
            raise SpecError(
                "IterativePQ places weights with ProductCodes, and the plan has none; give for "
                'example {"*.weight": ProductCodes(Product(8))}'
            )
        if self.stages == "layers":
            return [[name] for name in names]
        if isinstance(self.stages, str):
            stage_of = {name: _transformer_stage(name) for name in names}
        else:
            stage_of = {name: _first_match(name, self.stages) for name in names}
        numbers = sorted(set(stage_of.values()))
        return [[name for name in names if stage_of[name] == number] for number in numbers]

    def last(self, names: Sequence[str]) -> int:
        """The step after which the last group is placed and had its own steps.

        Args:
            names: of all weights with ProductCodes.
        """
        return self.start + len(self.groups(names)) * self.every

    def _metrics(self, run: Attached, due: Mapping[str, LearnedCentroids]) -> dict[str, Tensor]:
        data = Data.of(self.data or ()).first(self.batches)
        blocks = {name: surrogate.spec.format.block for name, surrogate in due.items()}
        return input_metrics(run.model, run.surrogates, blocks, data)


@dataclass(frozen=True)
class StillNorms:
    """A schedule: batch norms stand still until a step, as while Stock et al. place layers.

    They normalise as in evaluation until then, and as their model does afterwards. If
    ``model.train()`` is called in between, they move for one step.

    Attributes:
        until: optimizer steps.
    """

    until: int

    def __call__(self, run: Attached, step: int) -> None:
        for module in run.model.modules():
            if isinstance(module, _BatchNorm):
                module.training = run.model.training and step >= self.until


def _surrogate(run: Attached, name: str) -> LearnedCentroids:
    return cast(LearnedCentroids, run.surrogates[name])


def _transformer_stage(name: str) -> int:
    """0 feed-forward, 1 embeddings, 2 attention; what bears no known name is feed-forward."""
    kinds = [bool(re.search(pattern, name.lower())) for pattern in TRANSFORMER]
    return 2 if kinds[2] else 1 if kinds[1] else 0


def _first_match(name: str, stages: Sequence[str | Sequence[str]]) -> int:
    for number, globs in enumerate(stages):
        some = [globs] if isinstance(globs, str) else globs
        if any(fnmatchcase(name, glob) for glob in some):
            return number
    return len(stages)


def published_nbytes(weights: Iterable[tuple[int, int, int]], rest: int = 0) -> float:
    """Bytes as the papers count them: ideal indices, fp16 centroids, the rest in fp32.

    Args:
        weights: for each quantized tensor its number of weights, block and centroids.
        rest: numbers that are not quantized.

    >>> published_nbytes([(4096 * 1024, 8, 256)]) / 2**20
    0.50390625
    """
    total = 4.0 * rest
    for numel, block, points in weights:
        total += math.log2(points) / block * numel / 8 + points * block * 2
    return total


def usable_points(numel: int, block: int, points: int) -> int:
    """At most a quarter as many centroids as blocks, rounded down to a power of two (Stock).

    >>> usable_points(64 * 64 * 9, 9, 2048)
    1024
    """
    return min(points, 1 << max(int(math.log2(max(numel // block // 4, 1))), 0))
