"""A model as a graph of ONNX, in which quantized activations are nodes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dither.activations import Quantizer
from dither.activations.functions import Traced
from dither.core import DitherError
from dither.data import arguments
from dither.model import SITES, evaluating
from dither.run.quiet import quiet

ROUNDED = "dither::Rounded"
"""A node that stands for activations on a grid, until it is written in ONNX's own operators."""

OPSET = 21
"""The first with 4-bit integers and scales of blocks."""

_HOW: dict[str, Any] = {"dynamo": True, "opset_version": OPSET, "optimize": False, "verbose": False}
"""What torch calls optimizing would turn integers back into numbers."""

Shapes = dict[str, Any] | tuple[Any, ...] | None


class _Rounded(nn.Module):
    """A quantizer as one node, where one range holds for all of the tensor; else as its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner: nn.Module | None = inner
        self.grid: dict[str, Any] = {}
        if isinstance(inner, Quantizer) and inner.ready and not inner.spec.is_dynamic:
            scale, zero = inner.grid()
            if len(scale) == 1:
                self.grid = {"scale": float(scale), "zero": int(zero), "bits": inner.spec.bits}
                self.inner = None

    def forward(self, values: Tensor) -> Tensor:
        if self.inner is not None:
            made: Tensor = self.inner(values)
            return made
        return torch.onnx.ops.symbolic(
            ROUNDED, (values,), self.grid, dtype=torch.float32, shape=values.shape, version=1
        )


class _Sites(nn.Module):
    """In the place of a module's quantizers.

    Their own names, such as `in`, are words of Python that the exporter cannot have in a program.
    """

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.ends = {end: f"at_{end.replace('.', '_')}" for end, _ in held.items()}
        for end, quantizer in held.items():
            self.add_module(self.ends[end], _Rounded(quantizer))

    def __getitem__(self, end: str) -> nn.Module:
        return self.get_submodule(self.ends[end])

    def forward(self, values: Any) -> Any:
        """No change: a Sequential calls it among its children."""
        return values

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        for end in self.ends:
            yield end, self[end]


def replace_sites(model: nn.Module) -> dict[str, bool]:
    """Let quantizers of a model trace as nodes.

    Returns:
        Of each site whether it does; the others trace as the sums and products that they are.
    """
    found = {}
    for path, module in list(model.named_modules()):
        held = module._modules.get(SITES)  # noqa: SLF001 - a reserved child, that no attribute names
        if held is None or SITES in path.split("."):
            continue
        made = _Sites(held)
        module._modules[SITES] = made  # noqa: SLF001
        for end, node in made.items():
            found[f"{path}@{end}"] = bool(getattr(node, "grid", None))
    if "forward" in vars(model):
        _make_plain(model)
    return found


def _make_plain(model: nn.Module) -> None:
    """Move a `forward` of the instance, as models with sites of functions have, to a class.

    The exporter wants a function.
    """
    own, kind = vars(model).pop("forward"), type(model)
    if isinstance(own, Traced) and own.inner is None:
        own.inner = kind.forward.__get__(model)  # not that of the class it finds from here on

    @wraps(kind.forward)
    def forward(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    model.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def trace(model: nn.Module, sample: Any, shapes: Shapes, names: list[str]) -> Any:
    """The graph of a model, an ``onnx_ir.Model`` whose initializers have the model's names.

    Args:
        model: in evaluation mode.
        sample: a batch.
        shapes: which axes may vary, as ``torch.onnx.export`` takes them; None for the first axis
            of every tensor.
        names: of the outputs.

    Raises:
        DitherError: the exporter refuses the model.
    """
    sample = twofold(sample) if shapes is None else sample
    args, kwargs = arguments(model, sample)
    if shapes is None:
        shapes = tree_map_only(Tensor, _first_axis, kwargs or args)
    with quiet("torch.onnx"), evaluating(model), torch.no_grad():
        try:
            how = {"dynamic_shapes": shapes, "output_names": names or None, **_HOW}
            made: Any = torch.onnx.export(model, args, kwargs=kwargs, **how)
        except Exception as error:
            raise DitherError(
                f"torch.onnx.export refuses this {type(model).__name__}: {_cause(error)}"
            ) from error
    return made.model


def twofold(sample: Any) -> Any:
    """A batch of at least two: the exporter takes a length of 1 for one that never varies."""

    def doubled(value: Tensor) -> Tensor:
        return torch.cat([value, value]) if value.ndim and value.shape[0] == 1 else value

    return tree_map_only(Tensor, doubled, sample)


def _first_axis(value: Tensor) -> dict[int, Any]:
    return {0: torch.export.Dim.DYNAMIC} if value.ndim else {}


def _cause(error: BaseException) -> str:
    """The first line of what went wrong first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
