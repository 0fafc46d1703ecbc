"""Learned points: differentiable quantization and quantized distillation's quantizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dither.core import Encoded, SpecError, Stats, code_width
from dither.formats import Codebook
from dither.train.method import Method
from dither.train.surrogate import Surrogate, straight_through

INITS = ("quantiles", "uniform")

_FLOAT_BITS = 32


@dataclass(frozen=True)
class LearnedCodebook(Method):
    """Differentiable quantization (Polino et al. 2018, arXiv 1802.05668, algorithm 2).

    Buckets of consecutive weights are scaled to 0 to 1 by their least value and their range; each
    weight is then the nearest of a few points, which the tensor shares. The gradient of a point is
    the sum of ``range * gradient`` over its weights. Points are sorted wherever they are read.

    With ``train_weights=True`` weights learn too, straight through; with ``learn=False`` and
    ``init="uniform"`` as well, this is the uniform quantizer of quantized distillation
    (algorithm 1).

    Where weights are frozen their gradient is None. Optimizers skip them; DDP must not wait for
    them: call ``requires_grad_(False)`` on them before wrapping the model.

    Attributes:
        points: 2 to 65,536 for each tensor; powers of two are not needed.
        bucket: weights that share a scale and an offset.
        init: ``"quantiles"`` of the scaled weights, or ``"uniform"`` from 0 to 1.
        learn: whether points are learned.
        train_weights: whether weights are.
        dtype: type of the points in files.
        scale_dtype: type of scales and offsets in files; the paper counts 32 bits.
        lr: learning rate of the points, for Adam, in units of a bucket's range.

    >>> weight = torch.tensor([[-0.8, -0.31, 0.02, 0.7]])
    >>> LearnedCodebook(2, bucket=4).begin(weight).encode(weight).decode()
    tensor([[-0.3100, -0.3100, -0.3100,  0.7000]])
    """

    name: ClassVar[str] = "learned_codebook"

    points: int = 16
    bucket: int = 256
    init: str = "quantiles"
    learn: bool = True
    train_weights: bool = False
    dtype: torch.dtype = torch.float16
    scale_dtype: torch.dtype = torch.float32
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise SpecError(f"LearnedCodebook begins with {' or '.join(INITS)}, not {self.init!r}")
        self.format  # noqa: B018 - refuses what the format refuses

    @property
    def format(self) -> Codebook:
        """What the file holds."""
        return Codebook(
            self.points, self.bucket, shift=True, dtype=self.dtype, scale_dtype=self.scale_dtype
        )

    def begin(self, weight: Tensor) -> LearnedPoints:
        return LearnedPoints(self, weight)


class LearnedPoints(Surrogate):
    """One weight whose values are a few learned points.

    Attributes:
        points: ``(points,)`` in units of a bucket's range, in any order.
    """

    def __init__(self, spec: LearnedCodebook, weight: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.lr = spec.lr
        if spec.init == "uniform":
            points = torch.linspace(0, 1, spec.points, device=weight.device)
        else:
            points = spec.format.fit(weight)["points"].float()
        self.points = nn.Parameter(points, requires_grad=spec.learn)

    def noisy(self, weight: Tensor) -> Tensor:
        encoded = self.encode(weight.detach())
        values = encoded.decode()
        if self.spec.train_weights:
            values = straight_through(values, weight)
        if not self.points.requires_grad:
            return values
        moved: Tensor = _Moved.apply(  # type: ignore[no-untyped-call]
            values,
            self.points.sort().values,
            encoded.codes["indices"].values,
            encoded.params["scale"].float(),
            self.spec.bucket,
        )
        return moved

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        fmt = self.spec.format
        return fmt.assign(weight, {"points": self.points.detach(), **fmt.fit_scales(weight)})

    def soft_bits(self, weight: Tensor) -> Tensor:
        """A constant: the bits at fixed width, as the paper counts, with the points."""
        spec = self.spec
        buckets = spec.format.grouping(tuple(weight.shape)).count
        bits = weight.numel() * code_width(len(self.points))
        bits += 2 * buckets * 8 * spec.scale_dtype.itemsize
        bits += len(self.points) * 8 * spec.dtype.itemsize
        return torch.tensor(float(bits), device=weight.device)

    def draw(self, weight: Tensor, generator: torch.Generator, step: int) -> None:
        """Sort the points again; the optimizer's averages stay where they are."""
        points = self.points.detach()
        if bool((points[1:] < points[:-1]).any()):
            with torch.no_grad():
                self.points.copy_(points.sort().values)


class _Moved(torch.autograd.Function):
    """The identity in values; gradients reach the points that they are made of."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, points: Tensor, indices: Tensor, scale: Tensor, bucket: int
    ) -> Tensor:
        ctx.save_for_backward(indices, scale)
        ctx.count, ctx.bucket = len(points), bucket
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        indices, scale = ctx.saved_tensors
        flat = gradient.reshape(-1).double()
        wide = scale.double().repeat_interleave(ctx.bucket)[: flat.numel()]
        to_points = torch.zeros(ctx.count, dtype=torch.float64, device=gradient.device)
        to_points.index_add_(0, indices.reshape(-1).int(), flat * wide)
        return gradient, to_points.to(gradient.dtype), None, None, None


def polino_bits(numel: int, bits: int, bucket: int = 256) -> float:
    """Size by the paper's formula: codes, and two float32 numbers for each bucket.

    >>> [round(32 * 2**20 / polino_bits(2**20, bits), 2) for bits in (2, 4, 8)]
    [14.22, 7.53, 3.88]
    """
    return bits * numel + 2 * _FLOAT_BITS * numel / bucket


def gradient_norms(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    names: Iterable[str],
) -> dict[str, float]:
    """Norm of each weight's gradient, averaged over a few mini-batches (the paper takes five).

    Gradients that are there are neither read nor changed.

    Args:
        model: in the mode in which its gradients are wanted.
        loss: ``(model, batch) -> scalar``.
        batches: a few mini-batches.
        names: parameters to look at.

    Raises:
        SpecError: there was no mini-batch.
    """
    weights = {name: model.get_parameter(name) for name in names}
    totals = dict.fromkeys(weights, 0.0)
    count = 0
    for batch in batches:
        count += 1
        gradients = torch.autograd.grad(
            loss(model, batch), list(weights.values()), allow_unused=True
        )
        for name, gradient in zip(weights, gradients, strict=True):
            totals[name] += _length(gradient)
    if not count:
        raise SpecError("gradient_norms needs at least one mini-batch; five are usual")
    return {name: total / count for name, total in totals.items()}


def _length(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float(gradient.double().norm())


def redistribute(points: int, norms: Mapping[str, float]) -> dict[str, int]:
    """Points for each tensor, of ``points`` each on average, by gradient norm (Polino et al. 2018).

    Half of the points stay where they are; the others are given out in proportion to the norms,
    rounded. What rounding gave too much is taken from the largest, what it gave too little goes to
    the smallest.

    Raises:
        SpecError: fewer than 4 points, no tensor, or a norm that is negative or not finite.

    >>> redistribute(16, {"first": 3.0, "middle": 1.0, "last": 0.0})
    {'first': 26, 'middle': 14, 'last': 8}
    """
    if points < 4 or not norms:
        raise SpecError(f"redistribute needs 4 points or more and a tensor, not {points}, {norms}")
    total = sum(norms.values())
    if not all(0 <= norm < float("inf") for norm in norms.values()):
        raise SpecError(f"norms are positive and finite, not {dict(norms)}")
    base, spare = points // 2, (points - points // 2) * len(norms)
    shares = {name: norm / total if total else 1 / len(norms) for name, norm in norms.items()}
    counts = {name: base + round(spare * share) for name, share in shares.items()}
    wanted = points * len(norms)
    while (excess := sum(counts.values()) - wanted) != 0:
        if excess > 0:
            counts[max(counts, key=lambda name: counts[name])] -= 1
        else:
            counts[min(counts, key=lambda name: counts[name])] += 1
    return counts
