"""Quantization-aware training for any format, by the straight-through estimator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dither.core import Encoded, Format, SpecError, Stats
from dither.formats import Affine
from dither.formats.settings import check_choice, check_count, check_kind
from dither.train.method import Method
from dither.train.oscillations import Watch, hold
from dither.train.refreshed_format import Fitted, default_refresh, uniform
from dither.train.surrogate import Surrogate, plain


class Replaced(torch.autograd.Function):
    """Given values forward; backward the identity, but nothing where weights were clipped."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, clipped: Tensor | None) -> Tensor:
        del weight  # named for its gradient
        ctx.clipped = clipped
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.clipped is not None:
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            gradient.view(-1)[ctx.clipped] = 0
        return gradient, None, None


@dataclass(frozen=True)
class StraightThrough(Method):
    """Quantization-aware training (Jacob et al. 2018; Bengio et al. 2013) for any format.

    Training reads what the file would hold; gradients pass straight through, except to weights
    that the grid clips. Parameters are chosen from the weight every ``refresh`` steps.

    Attributes:
        format: any format.
        stochastic: for a bounded Affine: round up or down at random, without bias, while training
            (Gupta et al. 2015). Evaluation and file have the nearest codes.
        refresh: steps; by default 1, and 500 where k-means or a search is run.
        ranges: ``"minmax"``, or for a bounded Affine ``"mse"``: clip for the least squared error.

    >>> from dither.formats import Affine
    >>> surrogate = StraightThrough(Affine(4)).begin(torch.ones(2))
    >>> surrogate(torch.tensor([-0.8, -0.31, 0.0, 0.7]))
    tensor([-0.8000, -0.3000,  0.0000,  0.7000])
    """

    name: ClassVar[str] = "straight_through"

    format: Format
    stochastic: bool = False
    refresh: int | None = None
    ranges: str = "minmax"

    def __post_init__(self) -> None:
        check_quantizer("StraightThrough", self.format, self.refresh, self.ranges)
        if self.stochastic and not (isinstance(self.format, Affine) and self.format.bits):
            raise SpecError(
                f"StraightThrough(stochastic=True) rounds on a bounded Affine, not {self.format!r}"
            )

    def begin(self, weight: Tensor) -> Surrogate:
        return Quantized(self, weight)


def check_quantizer(name: str, fmt: object, refresh: int | None, ranges: str) -> None:
    """Refuse settings of a quantizer that make no sense."""
    check_kind(name, fmt, (Format,))
    check_choice(name, "ranges", ranges, ("minmax", "mse"))
    if refresh is not None:
        check_count(name, "refresh", refresh, 1, 1 << 31)
    if ranges == "mse" and not (isinstance(fmt, Affine) and fmt.bits):
        raise SpecError(f"{name}(ranges='mse') needs a bounded Affine, not {fmt!r}")


class Replacing(Surrogate):
    """A surrogate whose values are computed once for each step, in memory that is used again.

    Subclasses give :meth:`fill`. What depends on the step alone is found again when a forward pass
    is repeated: gradient accumulation and activation checkpointing cost nothing more.
    """

    def __init__(self, fitted: Fitted, refresh: int) -> None:
        super().__init__()
        self.fitted = fitted
        self.refresh = refresh
        self._drawn = 0
        self._bits: float | None = None
        self._kept: tuple[object, Tensor, Tensor | None] | None = None

    def fill(self, weight: Tensor, out: Tensor) -> Tensor | None:
        """Fill ``out`` with what `forward` reads; return flat positions of clipped weights."""
        raise NotImplementedError

    def draw(self, weight: Tensor, generator: torch.Generator, step: int) -> None:
        self._drawn += 1
        due = self.fitted.params is None or step % self.refresh == 0
        if due and self.fitted.step != step:
            self.fitted.refresh(weight, step)

    def noisy(self, weight: Tensor) -> Tensor:
        values, clipped = self.replacement(weight)
        replaced: Tensor = Replaced.apply(weight, values, clipped)  # type: ignore[no-untyped-call]
        return replaced

    def replacement(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """What :meth:`fill` gives, computed at most once for a step."""
        is_parameter = isinstance(weight, nn.Parameter)
        weight = weight.detach()
        if torch.compiler.is_compiling():
            out = torch.empty_like(weight, memory_format=torch.contiguous_format)
            return out, self.fill(weight.contiguous(), out)
        key = (self._drawn, weight.data_ptr(), weight._version) if is_parameter else None
        if self._kept is not None and self._kept[0] == key:
            return self._kept[1], self._kept[2]
        out = self._kept[1] if is_parameter and self._kept is not None else weight
        if out is weight or out.shape != weight.shape or out.device != weight.device:
            out = torch.empty_like(weight, memory_format=torch.contiguous_format)
        clipped = self.fill(weight.contiguous(), out)
        if is_parameter:  # a copy in float32 might come to lie where another was
            self._kept = (key, out, clipped)
        return out, clipped

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        return self.fitted.encode(weight)

    def soft_bits(self, weight: Tensor) -> Tensor:
        """A constant: the exact bits at fixed width when first asked."""
        if self._bits is None:
            self._bits = float(self.encode(plain(weight)).bits)
        return torch.tensor(self._bits, device=weight.device)

    def aside(self) -> dict[str, Any]:
        return self.fitted.state()

    def load_aside(self, state: Mapping[str, Any]) -> None:
        self.fitted.load_state(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.fitted.params = None  # other weights were loaded

    def __getstate__(self) -> dict[str, Any]:
        """What is kept for the step is computed again."""
        return super().__getstate__() | {"_kept": None}


class Quantized(Replacing):
    """One weight as the file would hold it, at every step.

    Attributes:
        watch: on symmetric bounded grids without groups only: of codes that go back and forth, see
            :mod:`dither.train.oscillations`.
    """

    watch: Watch | None

    def __init__(self, spec: StraightThrough, weight: Tensor) -> None:
        every = spec.refresh or default_refresh(spec.format, spec.ranges)
        super().__init__(Fitted(spec.format, spec.ranges), every)
        self.spec = spec
        self._shape = tuple(weight.shape)
        self._noise: Tensor | None = None
        fmt = spec.format
        is_plain = isinstance(fmt, Affine) and fmt.grid == "symmetric" and fmt.group is None
        if is_plain and (self.bits or 0) > 1:
            self.watch = None

    def draw(self, weight: Tensor, generator: torch.Generator, step: int) -> None:
        super().draw(weight, generator, step)
        if self.spec.stochastic:
            self._noise = uniform(weight.numel(), generator, weight.device).view(weight.shape)

    def fill(self, weight: Tensor, out: Tensor) -> Tensor | None:
        return self.fitted.values(weight, out, self._noise)

    def noisy(self, weight: Tensor) -> Tensor:
        values = super().noisy(weight)
        watch = self._watching()
        return values if watch is None else hold(watch, values, self._steps(self.fitted.params))

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        encoded, watch = super().encode(weight), self._watching()
        if watch is None:
            return encoded
        held = hold(watch, weight.float(), self._steps(encoded.params)).to(weight.dtype)
        return encoded.format.assign(held, encoded.format.params_of(encoded))

    @property
    def bits(self) -> int | None:
        """Bits of a weight, or None where they are not those of a uniform grid."""
        fmt = self.spec.format
        return fmt.bits if isinstance(fmt, Affine) else None

    def integers(self, weight: Tensor) -> Tensor:
        """The codes of a weight now, from 0 in both directions; float32, without a graph."""
        codes = self.fitted.assign(weight.detach()).codes["levels"].values
        return codes.float() - (1 << (self.bits or 1) - 1)

    def ends(self) -> tuple[Tensor, Tensor]:
        """Least and greatest value, broadcastable to the weight; no graph."""
        half, steps = 1 << (self.bits or 1) - 1, self._steps(self.fitted.params)
        return steps * -half, steps * (half - 1)

    def aside(self) -> dict[str, Any]:
        watch = self._watching()
        return {**super().aside(), "watch": None if watch is None else watch.state_dict()}

    def load_aside(self, state: Mapping[str, Any]) -> None:
        super().load_aside(state)
        if state["watch"] is not None:
            self.watch = Watch.from_state(state["watch"])

    def _watching(self) -> Watch | None:
        return getattr(self, "watch", None)

    def _steps(self, params: Mapping[str, Tensor] | None) -> Tensor:
        """Steps as they broadcast to the weight."""
        steps = (params or {})["scale"].float()
        axis = self.fitted.format.axis if isinstance(self.fitted.format, Affine) else None
        if axis is None:
            return steps.reshape([1] * max(len(self._shape), 1))
        place = axis % len(self._shape)
        return steps.reshape([-1 if a == place else 1 for a in range(len(self._shape))])

    def reads_rows(self) -> bool:
        is_plain = not self.spec.stochastic and self._watching() is None
        return is_plain and self.fitted.knows_rows

    def noisy_rows(self, rows: Tensor, index: Tensor) -> Tensor:
        values, clipped = self.fitted.rows(rows.detach(), index, self._shape)
        replaced: Tensor = Replaced.apply(rows, values, clipped)  # type: ignore[no-untyped-call]
        return replaced
