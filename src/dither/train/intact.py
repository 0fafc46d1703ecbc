"""What must still hold of a model since it was attached; what does not is named at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from dither.core import SpecError
from dither.train.shadow import is_shadowed
from dither.train.surrogate import Surrogate


@dataclass(frozen=True)
class Intact:
    """The weights that a run stands in for, as they were when it was attached.

    Attributes:
        shapes: by name.
    """

    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: nn.Module, names: Iterable[str]) -> Intact:
        """Some parameters of a model, as they are now."""
        return cls({name: tuple(model.get_parameter(name).shape) for name in names})

    def check(self, model: nn.Module, surrogates: Mapping[str, Surrogate], step: int) -> None:
        """Both of the following."""
        self.refuse_changed(model)
        self.refuse_not_finite(model, surrogates, step)

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

    def refuse_not_finite(
        self, model: nn.Module, surrogates: Mapping[str, Surrogate], step: int
    ) -> None:
        """Refuse weights, or what is learned beside them, that are NaN or infinite.

        Raises:
            SpecError: it names the tensor, the step and the cause.
        """
        tensors = {name: model.get_parameter(name) for name in self.shapes}
        for name, surrogate in surrogates.items():
            tensors |= {f"{name} ({key})": p for key, p in surrogate.named_parameters()}
        looked = {n: v for n, v in tensors.items() if v.numel() and not hasattr(v, "full_tensor")}
        if not looked:
            return
        with torch.no_grad():
            sums = [value.sum(dtype=torch.float32) for value in looked.values()]
            if bool(torch.stack([s.to(sums[0].device) for s in sums]).isfinite().all()):
                return
        for name, value in looked.items():
            if bad := int((~value.detach().isfinite()).sum()):
                raise SpecError(
                    f"after optimizer step {step}, {bad} of {value.numel()} values of {name} are "
                    "NaN or infinite: a loss or a gradient was not finite. Go back to the last "
                    "checkpoint; then lower the learning rate or clip gradients, and leave out "
                    "steps whose loss is not finite"
                )


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
