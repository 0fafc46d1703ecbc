"""The stand-in for one weight while training: what `forward` reads, and its encoding at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from dither.core import Encoded, SpecError, Stats
from dither.data import moved
from dither.model import Added


def straight_through(decoded: Tensor, weight: Tensor) -> Tensor:
    """``decoded`` in the forward pass, exactly; the identity's gradient to ``weight``.

    Bengio et al. 2013. ``weight - weight.detach()`` is zero, so that no rounding error enters.
    """
    return decoded.detach() + (weight - weight.detach())


def plain(weight: Tensor) -> Tensor:
    """A weight as an ordinary tensor without a graph: gathered from all ranks if it is sharded."""
    return gathered(weight.detach())


def gathered(weight: Tensor) -> Tensor:
    """A tensor from all ranks if it is sharded, differentiable; every rank must call this."""
    gather = getattr(weight, "full_tensor", None)  # a DTensor, once FSDP2 has sharded the model
    whole: Tensor = weight if gather is None else gather()
    return whole


@contextmanager
def whole(surrogate: nn.Module, device: torch.device) -> Iterator[None]:
    """What a surrogate learns, gathered from all ranks while this lasts, and no autocast.

    In a model's `forward` FSDP2 does this itself; outside, parameters are sharded. A loop may be
    within autocast as a whole.
    """
    placed: list[tuple[nn.Module, str]] = []
    try:
        for module in surrogate.modules():
            for name, value in module._parameters.items():
                if value is not None and hasattr(value, "full_tensor"):
                    module.__dict__[name] = gathered(value)
                    placed.append((module, name))
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for module, name in placed:
            module.__dict__.pop(name, None)


def estimated_bits(surrogate: Surrogate, weight: Tensor) -> Tensor:
    """:meth:`Surrogate.soft_bits` outside the model's `forward`: gathered, and in float32."""
    with whole(surrogate, weight.device):
        return surrogate.soft_bits(gathered(weight))


def encode_now(surrogate: Surrogate, weight: Tensor) -> Encoded:
    """:meth:`Surrogate.encode` outside the model's `forward`: gathered, and without a graph."""
    with whole(surrogate, weight.device), torch.no_grad():
        return surrogate.encode(weight)


Function = TypeVar("Function", bound=Callable[..., Any])


def _eagerly(function: Function) -> Function:
    """Keep compilers out of a function: there the graph breaks."""
    kept: Function = torch.compiler.disable(function)
    return kept


class Surrogate(Added):
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
        progress: share of the steps of training that is done, 0 to 1.
        can_trim: whether ``trim`` has an effect.
        nudges: whether :meth:`nudge` has one, in both directions.
        is_still: whether weights always train as they are, without noise.
        lr: learning rate that suits the learned parameters (Adam).
        weight_name: of the weight in the model that was attached.
        weight_shape: its shape then; None outside a model.
    """

    can_trim: bool = False
    nudges: bool = False
    is_still: bool = False
    lr: float = 1e-3

    def __init__(self) -> None:
        super().__init__()
        self.active = True
        self.trim = 0.0
        self.progress = 1.0
        self.weight_name = ""
        self.weight_shape: tuple[int, ...] | None = None
        self._committed: Encoded | None = None
        self._shown: tuple[object, Tensor] | None = None

    def noisy(self, weight: Tensor) -> Tensor:
        """What `forward` of the model reads while training; float32, of the weight's shape."""
        raise NotImplementedError

    def reads_rows(self) -> bool:
        """Whether :meth:`noisy_rows` gives what the rows of :meth:`noisy` would be."""
        return False

    def noisy_rows(self, rows: Tensor, index: Tensor) -> Tensor:
        """Some rows of :meth:`noisy`: what an embedding looks up, without noise for all others.

        Args:
            rows: ``weight[index]``, float32, ``(..., columns)``.
            index: integers, ``(...)``.
        """
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

    def renew(self) -> None:
        """Forget what :meth:`soft_bits` keeps between steps; by default nothing."""

    def nudge(self, octaves: float) -> None:
        """Make what is learned coarser at once, by octaves of the step; by default nothing."""

    def start(self, encoded: Encoded) -> None:
        """Begin from what was found for the budget without data; by default nothing is taken."""

    def aside(self) -> dict[str, Any]:
        """What is neither learned nor drawn anew at each step, for resuming."""
        return {}

    def load_aside(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`aside` gave."""

    def forward(self, weight: Tensor) -> Tensor:
        """What the model's own `forward` is to read in place of the weight.

        Raises:
            SpecError: the weight has another shape than when it was attached.
        """
        self.expect(weight)
        if not self.training:
            return self._preview(weight)
        if self._committed is not None and torch.is_grad_enabled():
            self._committed = self._shown = None  # training again
        if not self.active or self.is_still:
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            values = self.noisy(weight.float()).to(weight.dtype)
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # As when it is computed again with gradients: torch chooses kernels by this.
            values = values.detach().requires_grad_(weight.requires_grad)
        return values

    def expect(self, weight: Tensor) -> None:
        """Refuse a weight that was resized since the model was attached."""
        if self.weight_shape is not None and weight.shape != self.weight_shape:
            raise SpecError(
                f"the shape of {self.weight_name!r} changed from {self.weight_shape} to "
                f"{tuple(weight.shape)}; call run.detach() before such a change, and "
                "dither.attach() after it"
            )

    def look_up(self, rows: Tensor, index: Tensor) -> Tensor | None:
        """What :meth:`forward` would give for rows of an embedding, or None: ask that instead."""
        if not self.training or self.is_still or not self.active or not self.reads_rows():
            return None
        if self._committed is not None and torch.is_grad_enabled():
            self._committed = self._shown = None
        with torch.autocast(rows.device.type, enabled=False):
            return self.noisy_rows(rows.float(), index).to(rows.dtype)

    @property
    def committed(self) -> Encoded | None:
        """The encoding fixed by ``finish``, which evaluation and the file share."""
        return self._committed

    def commit(self, weight: Tensor, encoded: Encoded | None) -> None:
        """Fix what evaluation and the file hold; ``None`` goes back to previews."""
        self._committed, self._shown = encoded, None
        if encoded is not None:
            self._keep(weight, None, encoded.decode())

    def reset(self) -> None:
        """Forget previews and commits: something changed that the surrogate cannot see."""
        self._committed = self._shown = None

    def _preview(self, weight: Tensor) -> Tensor:
        shown, state = self._shown, None
        if self._committed is None:
            state = self._state_of(weight)
        if shown is None or shown[0] != state:
            shown = self._show(weight, state)
        values = shown[1]
        if torch.is_grad_enabled() and weight.requires_grad:
            return straight_through(values.to(weight.device, weight.dtype), weight)
        is_alike = values.dtype == weight.dtype and values.device == weight.device
        if not is_alike or values.requires_grad != weight.requires_grad:
            values = self._show(weight, state)[1]
        return values

    @_eagerly
    def _show(self, weight: Tensor, state: object) -> tuple[object, Tensor]:
        kind = weight.device.type
        with torch.inference_mode(mode=False), torch.no_grad(), torch.autocast(kind, enabled=False):
            encoded = self._committed or self.encode(plain(weight))
            return self._keep(weight, state, encoded.decode())

    def _keep(self, weight: Tensor, state: object, values: Tensor) -> tuple[object, Tensor]:
        # It must also serve outside inference mode. Whether it asks for a gradient must be as for
        # the weight: even under no_grad, torch chooses kernels by that, and they round differently.
        with torch.inference_mode(mode=False):
            # And its layout must be the weight's (channels last, transposed), for the same reason.
            is_sharded = hasattr(weight, "full_tensor")
            alike = torch.empty_like(values if is_sharded else weight, requires_grad=False)
            alike = alike.to(weight.device, weight.dtype).copy_(values.detach())
            shown = (state, alike.requires_grad_(weight.requires_grad))
        self._shown = shown
        return shown

    @_eagerly
    def _state_of(self, weight: Tensor) -> object:
        """Changes when the weight or anything learned does."""
        tensors = (weight, *self.parameters(), *self.buffers())
        if any(tensor.is_inference() for tensor in tensors):
            return object()  # such tensors count no changes
        versions = tuple(tensor._version for tensor in tensors)
        return (weight.data_ptr(), self.trim, versions)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.reset()

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 - torch's own signature
        """As for any module; previews are made anew, for what no version counter shows."""
        if mode != self.training and self._committed is None:
            self._shown = None  # `parameter.data` and FSDP2 change weights unseen
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        made = super()._apply(fn, recurse)
        device = fn(torch.zeros(1)).device
        for name, value in self.__dict__.items():
            if isinstance(value, Tensor):
                self.__dict__[name] = value.to(device)
        if aside := self.aside():
            placed: Any = moved(aside, device)
            self.load_aside(placed)
        if self._shown is not None:
            self._shown = (self._shown[0], self._shown[1].to(device))
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Previews are made again; a commit is kept."""
        state = dict(self.__dict__)
        if self._committed is None:
            state["_shown"] = None
        return state


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one type and shape are equal, also where values do not compare."""
    return torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    # A copy, because a single value may have a stride of 0, of which there is no view as bytes.
    return tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
