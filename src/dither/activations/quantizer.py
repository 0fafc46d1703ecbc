"""Fake quantization of one site: the numbers of an integer grid, in floating point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dither.activations.integer_grid import cover, ends, integers, rounded
from dither.activations.site_spec import Activation
from dither.core import SpecError
from dither.model import Added

_STATE = ("scale", "zero", "low", "high", "seen_low", "seen_high", "order")


class Quantizer(Added):
    """Puts activations on the grid of a spec; keeps and moves its ranges.

    Before it has ranges, by :meth:`step` or :meth:`set`, training uses each tensor's own, and
    evaluation leaves values as they are. Ranges move in :meth:`step` only, never in `forward`,
    which notes what it saw: so a forward pass that is computed again (activation checkpointing)
    sees the same grid, and gradient accumulation counts as one step. In ``eval()`` nothing is
    noted, so threads may share it.

    Everything is computed in float32, outside autocast, and returned in the type that came in.

    Attributes:
        spec: the settings.
        ready: whether there are static ranges.
        low: least value of each group's range, ``(groups,)``, as averaged; the grid that covers it
            is ``scale`` and ``zero``. ``seen_low`` and ``seen_high`` are the extremes of this step.
        order: dimensions in the order of their ranges, ``(dimensions,)``, or empty: the first
            ``dimensions / groups`` of them share a grid, and so on.
        log_scale: what is learned, ``(groups,)``: the logarithm of a factor of ``scale``; and
            ``shift``, which moves ``zero`` by as many times the largest code. None where nothing
            is learned.
    """

    scale: Tensor
    zero: Tensor
    low: Tensor
    high: Tensor
    seen_low: Tensor
    seen_high: Tensor
    order: Tensor

    def __init__(self, spec: Activation) -> None:
        super().__init__()
        self.spec = spec
        self.ready = False
        for name in _STATE[:4]:
            self.register_buffer(name, torch.zeros(spec.groups))
        self.register_buffer("order", torch.zeros(0, dtype=torch.int64))
        self._forget()
        scales = spec.training in {"learned", "clip"}
        zeros = spec.training == "learned" and not spec.symmetric
        self.log_scale = nn.Parameter(torch.zeros(spec.groups)) if scales else None
        self.shift = nn.Parameter(torch.zeros(spec.groups)) if zeros else None
        self.lr = spec.lr

    # --- values ----------------------------------------------------------------------------------

    def forward(self, values: Tensor) -> Tensor:
        """Values of the grid, of the shape and type of ``values``; integers pass unchanged."""
        if not values.is_floating_point() or not values.numel():
            return values
        if not self.training and not self.has_range:
            return values
        with torch.autocast(values.device.type, enabled=False):
            single = values.float()
            scale, zero = self._grid(single)
            kind = self.spec.training if self.log_scale is not None and self.ready else ""
            return rounded(single, scale, zero, self.spec.bits, kind).to(values.dtype)

    def codes(self, values: Tensor) -> Tensor:
        """The integers that :meth:`forward` computes with, int32, of the shape of ``values``."""
        with torch.no_grad():
            return integers(values, *self._grid(values.float(), is_noted=False), self.spec.bits)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points, ``(groups,)``, float32; no graph.

        Raises:
            SpecError: there are none yet, or the range is dynamic.
        """
        if self.spec.is_dynamic or not self.ready:
            raise SpecError(
                "this site has no range: it is dynamic, or has seen no data yet; observe a few "
                "batches, or train a step"
            )
        scale, zero = self._static()
        return scale.detach().clone(), zero.detach().round()

    @property
    def has_range(self) -> bool:
        """Whether evaluation knows its range, or needs none."""
        return self.ready or self.spec.is_dynamic

    def _grid(self, values: Tensor, *, is_noted: bool = True) -> tuple[Tensor, Tensor]:
        """Scale and zero as they broadcast to the values."""
        spec = self.spec
        moves = spec.training in {"hindsight", "running"} and not spec.is_dynamic
        is_training = self.training and is_noted
        if self.ready and not spec.is_dynamic and not (moves and is_training):
            return self._spread(*self._static(), values)
        low, high = self.extremes(values.detach())
        if spec.is_dynamic:
            pair = cover(low, high, spec.bits, symmetric=spec.symmetric)
            return self._spread(*pair, values)
        if is_training:
            self._note(low, high)
        if self.ready and spec.training == "hindsight":
            return self._spread(*self._static(), values)
        if self.ready:  # running: this step counts, too
            low, high = self._averaged(low, high)
        return self._spread(*cover(low, high, spec.bits, symmetric=spec.symmetric), values)

    def _static(self) -> tuple[Tensor, Tensor]:
        scale, zero = self.scale, self.zero
        if self.log_scale is not None:
            scale = scale * self.log_scale.exp()
        if self.shift is not None:
            top = (1 << self.spec.bits) - 1
            zero = (zero + self.shift * top).clamp(0, top)
        return scale, zero

    # --- ranges ----------------------------------------------------------------------------------

    def extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest value of each range.

        Returns:
            Each ``(groups,)``; per token ``(..., groups)``, the axis of embeddings last.
        """
        spec = self.spec
        if spec.per == "tensor" and spec.groups == 1:
            return values.min().reshape(1), values.max().reshape(1)
        rows = values.movedim(spec.axis, -1)
        if spec.groups > 1:
            self._require(rows.shape[-1])
            rows = rows if not self.order.numel() else rows.index_select(-1, self.order)
        boxes = rows.unflatten(-1, (spec.groups, -1))
        low, high = boxes.amin(-1), boxes.amax(-1)
        if spec.per == "token":
            return low, high
        return low.reshape(-1, spec.groups).amin(0), high.reshape(-1, spec.groups).amax(0)

    @torch.no_grad()
    def set(self, low: Tensor, high: Tensor) -> None:
        """Take ranges, ``(groups,)``: they become the grid, and where moving averages begin."""
        self._place(*cover(low, high, self.spec.bits, symmetric=self.spec.symmetric))
        self.low.copy_(low)
        self.high.copy_(high)

    @torch.no_grad()
    def set_grid(self, scale: Tensor, zero: Tensor) -> None:
        """Take a grid, ``(groups,)``; moving averages begin at its ends."""
        self._place(scale, zero)
        low, high = ends(self.scale, self.zero, self.spec.bits)
        self.low.copy_(low)
        self.high.copy_(high)

    def set_order(self, order: Tensor) -> None:
        """Take a permutation of the dimensions, ``(dimensions,)``."""
        _split(len(order), self.spec.groups)
        self.order = order.to(self.scale.device, torch.int64)

    @torch.no_grad()
    def step(self) -> None:
        """An optimizer step is done: ranges move to what was seen since the step before."""
        seen = bool((self.seen_low <= self.seen_high).all())
        if seen and self.ready:
            self.set(*self._averaged(self.seen_low, self.seen_high))
        elif seen:
            self.set(self.seen_low, self.seen_high)
        self._forget()

    def _averaged(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The moving average with new extremes (Fournarakis and Nagel 2021, eqs. 3 and 4)."""
        old = self.spec.momentum
        return low * (1 - old) + self.low * old, high * (1 - old) + self.high * old

    def _note(self, low: Tensor, high: Tensor) -> None:
        with torch.no_grad():
            # New tensors, because a graph may hold the old ones.
            self.seen_low = torch.minimum(self.seen_low, low)
            self.seen_high = torch.maximum(self.seen_high, high)

    def _forget(self) -> None:
        empty = torch.full_like(self.low, torch.inf)
        self.register_buffer("seen_low", empty)
        self.register_buffer("seen_high", -empty)

    def _place(self, scale: Tensor, zero: Tensor) -> None:
        if not bool(scale.isfinite().all()):
            raise SpecError("a range is not finite: the activations hold infinities or NaN")
        self.scale.copy_(scale)
        self.zero.copy_(zero)
        for learned in (self.log_scale, self.shift):
            if learned is not None:
                learned.zero_()
        self.ready = True

    def _spread(self, scale: Tensor, zero: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of each group, to each dimension."""
        spec = self.spec
        if scale.numel() == 1:
            return scale.reshape(1), zero.reshape(1)
        if spec.groups > 1:
            count = values.shape[spec.axis]
            self._require(count)
            group_of = torch.arange(count, device=values.device) // (count // spec.groups)
            if self.order.numel():
                group_of = torch.empty_like(group_of).scatter_(0, self.order, group_of)
            scale, zero = scale[..., group_of], zero[..., group_of]
        if spec.per == "token":
            return scale.movedim(-1, spec.axis), zero.movedim(-1, spec.axis)
        shape = [1] * values.ndim
        shape[spec.axis] = -1
        return scale.reshape(shape), zero.reshape(shape)

    def _require(self, dimensions: int) -> None:
        _split(dimensions, self.spec.groups)
        if self.spec.is_sorted and self.order.numel() != dimensions:
            raise SpecError(
                f"groups sorted by range need a permutation of all {dimensions} dimensions, not of "
                f"{self.order.numel()}: observe calibration data first, or give permute=False"
            )

    # --- as a module -----------------------------------------------------------------------------

    def extra_repr(self) -> str:
        return repr(self.spec)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        order = state_dict.get(f"{prefix}order")
        if order is not None:
            self.order = torch.empty_like(order, device=self.order.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if f"{prefix}scale" in state_dict:
            self.ready = bool((self.scale > 0).all())


def _split(dimensions: int, groups: int) -> None:
    if dimensions % groups:
        raise SpecError(
            f"{dimensions} dimensions cannot be split into {groups} groups of equal size; choose a "
            "divisor"
        )
