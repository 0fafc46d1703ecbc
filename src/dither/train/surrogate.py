"""The stand-in for one weight while training: what `forward` reads, and its encoding at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dither.core import Encoded, Stats


def straight_through(decoded: Tensor, weight: Tensor) -> Tensor:
    """``decoded`` in the forward pass, exactly; the identity's gradient to ``weight``.

    Bengio et al. 2013. ``weight - weight.detach()`` is zero, so that no rounding error enters.
    """
    return decoded.detach() + (weight - weight.detach())


def plain(weight: Tensor) -> Tensor:
    """A weight as an ordinary tensor without a graph: gathered from all ranks if it is sharded."""
    weight = weight.detach()
    gather = getattr(weight, "full_tensor", None)  # a DTensor, once FSDP2 has sharded the model
    whole: Tensor = weight if gather is None else gather()
    return whole


Function = TypeVar("Function", bound=Callable[..., Any])


def _eagerly(function: Function) -> Function:
    """Keep compilers out of a function: there the graph breaks."""
    kept: Function = torch.compiler.disable(function)
    return kept


class Surrogate(nn.Module):
    """Stands in for one weight.

    In ``train()`` :meth:`forward` returns :meth:`noisy`; in ``eval()`` exactly what the file would
    hold now: ``encode(weight).decode()``, kept until the weight or a learned parameter changes, or
    once the run is finished the values of the file itself. Values are computed in float32, outside
    autocast, and returned in the weight's type. Gradients reach the weight straight through.

    Learned parameters are 1-D (FSDP2 refuses scalars), and may be absent from a state dict that is
    loaded. Everything random is drawn by :meth:`draw` once for each step and kept, so that a
    forward pass recomputed by activation checkpointing sees the same noise.

    Attributes:
        active: whether there is noise at all; without, ``train()`` returns the weight itself.
        trim: octaves by which :meth:`encode` is coarser than what was learned, to meet a budget.
        can_trim: whether ``trim`` has an effect.
        lr: learning rate that suits the learned parameters (Adam).
    """

    can_trim: bool = False
    lr: float = 1e-3

    def __init__(self) -> None:
        super().__init__()
        self.active = True
        self.trim = 0.0
        self._committed: Encoded | None = None
        self._shown: tuple[object, Tensor] | None = None

    def noisy(self, weight: Tensor) -> Tensor:
        """What `forward` of the model reads while training; float32, of the weight's shape."""
        raise NotImplementedError

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        """The weight as the file would hold it now."""
        raise NotImplementedError

    def soft_bits(self, weight: Tensor) -> Tensor:
        """Differentiable estimate of the *coded* size in bits, a scalar.

        Without an estimate of its own, a constant: the exact bits at fixed width.
        """
        return torch.tensor(float(self.encode(plain(weight)).bits), device=weight.device)

    def draw(self, weight: Tensor, generator: torch.Generator, step: int) -> None:
        """Draw what is random for a step, and refresh what is refreshed on a schedule."""

    def start(self, encoded: Encoded) -> None:
        """Begin from what was found for the budget without data; by default nothing is taken."""

    def aside(self) -> dict[str, Any]:
        """What is neither learned nor drawn anew at each step, for resuming."""
        return {}

    def load_aside(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`aside` gave."""

    def forward(self, weight: Tensor) -> Tensor:
        """What the model's own `forward` is to read in place of the weight."""
        if not self.training:
            return self._preview(weight)
        if self._committed is not None and torch.is_grad_enabled():
            self._committed = None  # training again
        if not self.active:
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            return self.noisy(weight.float()).to(weight.dtype)

    @property
    def committed(self) -> Encoded | None:
        """The encoding fixed by ``finish``, which evaluation and the file share."""
        return self._committed

    def commit(self, weight: Tensor, encoded: Encoded | None) -> None:
        """Fix what evaluation and the file hold; ``None`` goes back to previews."""
        self._committed, self._shown = encoded, None
        if encoded is not None:
            self._shown = (None, encoded.decode().to(weight.device))

    def reset(self) -> None:
        """Forget previews and commits: something changed that the surrogate cannot see."""
        self._committed = self._shown = None

    @_eagerly
    def _show(self, weight: Tensor, state: object) -> Tensor:
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            values = self.encode(plain(weight)).decode()
        self._shown = (state, values)
        return values

    def _preview(self, weight: Tensor) -> Tensor:
        shown = self._shown
        if self._committed is not None and shown is not None:
            values = shown[1]
        else:
            state = self._state_of(weight)
            values = shown[1] if shown and shown[0] == state else self._show(weight, state)
        values = values.to(weight.device, weight.dtype)
        if torch.is_grad_enabled() and weight.requires_grad:
            return straight_through(values, weight)
        return values

    @_eagerly
    def _state_of(self, weight: Tensor) -> object:
        """Changes when the weight or anything learned does."""
        tensors = (weight, *self.parameters(), *self.buffers())
        if any(tensor.is_inference() for tensor in tensors):
            return object()  # such tensors count no changes
        versions = tuple(tensor._version for tensor in tensors)
        return (weight.data_ptr(), self.trim, versions)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Learned parameters may be absent: a plain checkpoint loads strictly."""
        metadata, strict, _, unexpected, errors = rest
        absent: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, absent, unexpected, errors
        )
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        """Previews are made again; a commit is kept."""
        state = dict(self.__dict__)
        if self._committed is None:
            state["_shown"] = None
        return state
