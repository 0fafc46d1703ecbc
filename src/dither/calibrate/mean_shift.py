"""Mean outputs of a layer, and who can make up for a change of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dither.calibrate.collect import Watch
from dither.calibrate.inputs import has_vectors, outputs_axis
from dither.core import Stats
from dither.data import Forward
from dither.model import evaluating

_ROUNDING = 2.0**-18
"""Share of second moments below which what is left about the mean is the rounding of sums."""

_CANCELLED = 2.0**-6
"""Share of them below which it may have lost enough digits for negative eigenvalues."""

_SUMS = 2.0**-22
"""Share of them, for each input, that a sum in float32 may be off by."""


@dataclass(frozen=True)
class Receiver:
    """A vector that mean outputs are added to.

    Attributes:
        name: in the state dict.
        sign: of the shift that it takes: -1 for a bias, 1 for a running mean.
    """

    name: str
    sign: int


def find_receivers(model: nn.Module, batch: object, forward: Forward) -> dict[str, Receiver]:
    """By the name of the weight: its own bias, or the batch norm that its output goes straight to.

    Layers that are called several times have none, and so have transposed ones.
    """
    paths = {module: path for path, module in model.named_modules()}
    outputs: dict[int, tuple[ref[Tensor], str]] = {}
    found: dict[str, Receiver] = {}
    calls: dict[str, int] = {}

    def after(module: nn.Module, _: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        name = f"{paths[module]}.weight".lstrip(".")
        calls[name] = calls.get(name, 0) + 1
        if isinstance(getattr(module, "bias", None), Tensor):
            found[name] = Receiver(f"{paths[module]}.bias".lstrip("."), -1)
        elif isinstance(output, Tensor):
            outputs[id(output)] = (ref(output), name)

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        first = args[0] if args else None
        made, name = outputs.get(id(first), (None, ""))
        is_same = made is not None and made() is first  # and none that got its id since
        if is_same and getattr(module, "running_mean", None) is not None:
            found[name] = Receiver(f"{paths[module]}.running_mean".lstrip("."), 1)

    handles = []
    try:
        for module in model.modules():
            if has_vectors(module) and outputs_axis(module) == 0:
                handles.append(module.register_forward_hook(after))
            elif isinstance(module, _BatchNorm):
                handles.append(module.register_forward_pre_hook(before))
        with evaluating(model), torch.no_grad():
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    named = set(Watch(model).names())
    receivers = [receiver.name for receiver in found.values()]
    return {
        name: receiver
        for name, receiver in found.items()
        if calls[name] == 1 and name in named and receivers.count(receiver.name) == 1
    }


def centered(stats: Stats, aim: Tensor) -> Stats:
    """Moments about the means, for weights behind which a bias makes up for mean outputs.

    Args:
        stats: with ``gram``, ``cross`` and ``mean``.
        aim: mean of the original inputs, as ``mean``.

    Returns:
        The same with moments about the means; 0 in groups of inputs that are constant but for the
        rounding of their sums.
    """
    if stats.gram is None or stats.cross is None or stats.mean is None:
        return stats
    gram = stats.gram - _products(stats.mean, stats.mean, stats.gram)
    cross = stats.cross - _products(aim, stats.mean, stats.cross)
    energy, spread = (m.diagonal(dim1=-2, dim2=-1).mean(-1) for m in (stats.gram, gram))
    is_constant = spread <= _ROUNDING * energy
    if bool(is_constant.any()):
        gram, cross = (m.masked_fill(is_constant[..., None, None], 0.0) for m in (gram, cross))
    if bool((spread < _CANCELLED * energy).any()):
        raised = _missing(gram, energy)[..., None, None] * torch.eye(gram.shape[-1]).to(gram)
        gram, cross = gram + raised, cross + raised
    return replace(stats, gram=gram, cross=cross)


def _missing(gram: Tensor, energy: Tensor) -> Tensor:
    """What the rounding of sums left out of each diagonal: by how much eigenvalues are below 0.

    Means that are far from 0 take most of the digits of what is left about them. Long sums of few
    inputs, as of depthwise kernels, are off by up to a thousandth.
    """
    size = gram.shape[-1]
    spread = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    wide = gram.double()
    least = _SUMS * size * spread
    tried = wide + least[..., None, None] * torch.eye(size, dtype=torch.float64)
    has_none = (torch.linalg.cholesky_ex(tried).info > 0) & (spread > 0) & (energy > 0)
    missing = torch.zeros_like(spread)
    if bool(has_none.any()):
        lowest = torch.linalg.eigvalsh(wide[has_none]).amin(-1)
        missing[has_none] = (least[has_none] - lowest.clamp(max=0)).to(missing)
    return missing


def _products(first: Tensor, second: Tensor, like: Tensor) -> Tensor:
    size = like.shape[-1]
    rows = []
    for mean in (first, second):
        missing = -mean.shape[-1] % size
        rows.append(nn.functional.pad(mean, (0, missing)).reshape(-1, size))
    found = rows[0].unsqueeze(2) * rows[1].unsqueeze(1)
    return found.reshape(like.shape)


def mean_outputs(weight: Tensor, mean: Tensor) -> Tensor:
    """Mean outputs, ``(outputs,)``, of mean inputs ``(inputs,)`` or ``(groups, inputs)``."""
    matrix = weight.reshape(len(weight), -1).double()
    if mean.ndim == 1:
        return matrix @ mean.double()
    grouped = matrix.reshape(len(mean), -1, matrix.shape[1])
    return (grouped @ mean.double().unsqueeze(2)).reshape(-1)
