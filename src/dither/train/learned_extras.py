"""Who trains what surrogates learn: the user's optimizer if it can, or else an Adam of our own."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Adam, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dither.activations import Quantizer
from dither.train.surrogate import Surrogate

_PATIENCE = 20


class Extras:
    """The learned parameters of all surrogates, and of quantizers of activations."""

    def __init__(self, surrogates: Mapping[str, Surrogate | Quantizer]) -> None:
        self._surrogates = dict(surrogates)
        self._own: Adam | None = None
        self._waited = 0
        self._versions: list[int] = []
        self.note()
        self._decay = Decay(self) if self.parameters() else None

    @property
    def _groups(self) -> dict[float, list[nn.Parameter]]:
        """By learning rate; looked up anew, because FSDP2 replaces parameters."""
        groups: dict[float, list[nn.Parameter]] = {}
        for surrogate in self._surrogates.values():
            own = [p for p in surrogate.parameters() if p.requires_grad]
            if own:
                groups.setdefault(surrogate.lr, []).extend(own)
        return groups

    def parameters(self) -> list[nn.Parameter]:
        """All of them, in a fixed order."""
        return [parameter for group in self._groups.values() for parameter in group]

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: their own learning rates, no weight decay."""
        return [
            {"params": parameters, "lr": lr, "weight_decay": 0.0}
            for lr, parameters in self._groups.items()
        ]

    def join(self, optimizer: Optimizer) -> None:
        """See :meth:`Run.join`."""
        own = {id(parameter) for parameter in self.parameters()}
        for group in optimizer.param_groups:  # it may have been made after attaching
            group["params"] = [p for p in group["params"] if id(p) not in own]
        if not own:
            return
        self.release()
        if "betas" in optimizer.defaults and not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
            for group in self.groups():
                optimizer.add_param_group(group)
            self._own = None
        else:
            self.train_alone()
        self._waited = -1

    def train_alone(self) -> Adam:
        """Let an Adam of our own, which is returned, train them, whatever trains the model."""
        self._own = Adam(self.groups(), lr=1e-3)
        self._waited = -1
        self.release()
        return self._own

    def step(self) -> None:
        """Train them, if nobody else does."""
        if self._own is not None:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            if all(bool(g.isfinite().all()) for g in gradients):  # as a gradient scaler would
                self._own.step()
            self._own.zero_grad()
        elif 0 <= self._waited < _PATIENCE:
            self._watch()

    def note(self) -> None:
        """Remember what they are now: the run itself moves some of them at times."""
        self._versions = [p._version for p in self.parameters()]

    def release(self) -> None:
        """Look at no optimizer any more: all is in order, or the run is over."""
        if self._decay is not None:
            self._decay.end()

    def _watch(self) -> None:
        """Warn if nobody trains them."""
        parameters = self.parameters()
        self._waited += 1
        if any(p._version != v for p, v in zip(parameters, self._versions, strict=True)):
            self._waited = _PATIENCE
        elif self._waited == _PATIENCE and any(p.grad is not None for p in parameters):
            warnings.warn(
                "what the surrogates learn (steps, bits) is in no optimizer: pass optimizer= to "
                "attach, or call run.join(optimizer)",
                stacklevel=4,
            )

    def state_dict(self) -> dict[str, Any] | None:
        """Our own optimizer's state, if it exists."""
        return None if self._own is None else self._own.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """The inverse of :meth:`state_dict`."""
        if state is None:
            return
        (self._own or self.train_alone()).load_state_dict(state)


class Decay:
    """Looks at optimizers that step, until one would decay what surrogates learn, and says so.

    An optimizer that is made of all of an attached model's parameters treats logarithms of steps as
    weights, and draws steps to 1.
    """

    def __init__(self, extras: Extras) -> None:
        self._extras = weakref.ref(extras)
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._hook = register_optimizer_step_pre_hook(self._look)
        weakref.finalize(extras, self._hook.remove)

    def end(self) -> None:
        """Look no more."""
        self._hook.remove()

    def _look(self, optimizer: Optimizer, *_: object) -> None:
        extras = self._extras()
        if extras is None or optimizer in self._seen:
            return
        self._seen.add(optimizer)
        own = {id(parameter) for parameter in extras.parameters()}
        for group in optimizer.param_groups:
            if group.get("weight_decay") and any(id(p) in own for p in group["params"]):
                self.end()
                warnings.warn(
                    f"{type(optimizer).__name__} decays what surrogates learn (steps, bits) as it "
                    "does weights; call run.join(optimizer), which moves them to a group of their "
                    "own without, or make the optimizer before attach(..., optimizer=optimizer)",
                    stacklevel=4,
                )
                return
