"""What must still hold of a model since it was attached; what does not is named at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dither.core import SpecError
from dither.train.ranks import STATISTICS
from dither.train.shadow import is_shadowed


@dataclass(frozen=True)
class Intact:
    """The weights that a run stands in for, as they were when it was attached.

    Attributes:
        shapes: by name.
        finite: every tensor that training changes, of those that were finite.
    """

    shapes: Mapping[str, tuple[int, ...]]
    finite: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, names: Iterable[str]) -> Intact:
        """Some parameters of a model, as they are now."""
        finite = {name for name, value in _changing(model).items() if _is_finite([value])}
        shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
        return cls(shapes, frozenset(finite))

    def check(self, model: nn.Module, step: int) -> None:
        """Both of the following."""
        self.refuse_changed(model)
        self.refuse_not_finite(model, step)

    def refuse_changed(self, model: nn.Module) -> None:
        """Refuse a model whose weights were replaced, resized or taken away.

        Raises:
            SpecError: it names the weight, and both shapes.
        """
        for name, shape in self.shapes.items():
            path, _, local = name.rpartition(".")
            try:
                owner = model.get_submodule(path)
                weight = owner._parameters.get(local)
            except AttributeError:
                weight = None
            if weight is None:
                raise SpecError(f"{name!r} is no parameter of the model any more; {_ANEW}")
            if tuple(weight.shape) != shape:
                raise SpecError(
                    f"the shape of {name!r} changed from {shape} to {tuple(weight.shape)}; {_ANEW}"
                )
            if not _is_read(model, path, name):
                raise SpecError(
                    f"{name!r} is in another {type(owner).__name__} than when the model was "
                    f"attached, which knows nothing of the run; {_ANEW}"
                )

    def refuse_not_finite(self, model: nn.Module, step: int) -> None:
        """Refuse NaN and infinities in what is trained: weights, and what is learned beside them.

        Raises:
            SpecError: it names the tensor, the step and the cause.
        """
        looked = {name: v for name, v in _changing(model).items() if name in self.finite}
        if not looked or _is_finite(list(looked.values())):
            return
        for name, value in looked.items():
            if bad := int((~value.isfinite()).sum()):
                raise SpecError(
                    f"after optimizer step {step}, {bad} of {value.numel()} values of {name} are "
                    "NaN or infinite: a batch, a loss or a gradient was not finite. Go back to the "
                    "last checkpoint; then lower the learning rate or clip gradients, and leave "
                    "out batches and steps whose loss is not finite"
                )


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that train, and statistics of norms; of those that are sharded, this rank's."""
    named: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    named |= {n: b for n, b in model.named_buffers() if n.rpartition(".")[2] in STATISTICS}
    local = {name: getattr(v, "to_local", lambda v=v: v)().detach() for name, v in named.items()}
    return {name: v for name, v in local.items() if v.numel() and not v.is_complex()}


def _is_finite(values: Sequence[Tensor]) -> bool:
    """Whether all values are finite, by their sums: one pass, and one wait for the device."""
    halves = (torch.float16, torch.bfloat16)  # whose sums overflow
    sums = [v.sum(dtype=torch.float32 if v.dtype in halves else v.dtype) for v in values]
    return bool(torch.stack([s.to(sums[0].device) for s in sums]).isfinite().all())


_ANEW = "call run.detach() before such a change, and dither.attach() after it"


def _is_read(model: nn.Module, path: str, name: str) -> bool:
    """Whether the module of a weight, or one around it, still reads a surrogate for it."""
    while True:
        around = model.get_submodule(path)
        inner = name.removeprefix(f"{path}.") if path else name
        if is_shadowed(around) and inner in around.__dict__["dither_paths"].values():
            return True
        if not path:
            return False
        path = path.rpartition(".")[0]
