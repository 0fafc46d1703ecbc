"""DiffQ (Défossez, Adi, Synnaeve, TMLR 2022, arXiv 2104.09987).

Pseudo quantization noise gives every group of weights a learned number of bits; the size in MiB is
part of the loss. WikiText-103: perplexity 18.0 with penalty 1 and 18.5 in 113 MiB with penalty 10,
against 29.9 in 118 MiB for QAT at 4 bits; DeiT-B: 82.0 % in 45.7 MiB.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from dither.core import SpecError
from dither.recipes.recipe import Recipe
from dither.train.diffq import DiffQ
from dither.train.diffq_size import DiffQSize
from dither.train.plan import Plan, literal

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "default": {"group": 8, "min_size": 0.01},
        "cifar": {"group": 8, "min_size": 0.01},
        "resnet20": {"group": 16, "min_bits": 1, "max_bits": 10, "lr": 2e-4},
        "vit": {"group": 16, "min_size": 0.01},
        "deit": {"group": 8, "min_bits": 3, "min_size": 0.01, "lr": 5e-4},
        "wikitext": {"group": 16, "min_size": 0.01},
    }
)
"""Settings of the published presets."""

PENALTIES = {"cifar": 5.0, "resnet20": 10.0, "vit": 5.0, "deit": 0.1, "wikitext": 10.0}
"""Lambda for the size in MiB; wikitext also 1, deit also 0.01."""


def recipe(
    model: nn.Module, preset: str = "default", *, penalty: float | None = None, **settings: Any
) -> Recipe:
    """DiffQ for every floating-point parameter above ``min_size`` MiB (ResNet-20: no biases).

    The logits have an Adam of their own learning rate without weight decay, as in the paper: where
    the optimizer of the weights is no Adam, the run trains them itself.

    Args:
        model: any module.
        preset: of :data:`PRESETS`.
        penalty: lambda, the loss for a MiB; by default the preset's, or 5.
        settings: of :class:`~dither.train.DiffQ`, instead of the preset's.

    Raises:
        SpecError: an unknown preset.
    """
    if preset not in PRESETS:
        raise SpecError(f"presets are {', '.join(PRESETS)}, not {preset!r}")
    spec = DiffQ(**{**PRESETS[preset], **settings})
    names = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.is_floating_point() and not (preset == "resnet20" and name.endswith("bias"))
    ]
    factor = PENALTIES.get(preset, 5.0) if penalty is None else penalty
    return Recipe(Plan({literal(name): spec for name in names}), (DiffQSize(factor),))
