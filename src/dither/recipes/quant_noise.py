"""Training with Quantization Noise (Fan, Stock et al., ICLR 2021, arXiv 2004.07320).

At each step a random part of the weights is quantized, so that the others train with exact
gradients. Table 1, WikiText-103 perplexity: int4 39.4 after training, 34.1 by QAT, 21.8 with
noise; product quantization in 38 MiB 25.2 without, 20.7 with.
"""

from __future__ import annotations

from torch import nn

from dither.core import Format, SpecError
from dither.formats import Affine, Product
from dither.recipes.model_layers import Layer, plan_of
from dither.recipes.recipe import Recipe
from dither.train.quant_noise import QuantNoise
from dither.train.ramp import Ramp

SCHEMES = ("pq", "int8", "int4")
RANGES = ("tensor", "channel", "histogram")

SHARES = {"language model": 0.05, "roberta": 0.2, "vision": 0.1, "int8": 0.5, "int4": 0.5}
"""The paper's share of noised blocks by task, for product quantization, and for integers."""


def recipe(
    model: nn.Module,
    scheme: str = "pq",
    *,
    p: float | Ramp | None = None,
    ranges: str = "channel",
    kind: str = "proxy",
    axis: int = 0,
    refresh: int | None = None,
) -> Recipe:
    """All matrices and kernels; biases and norms stay as they are, as in the paper.

    Evaluation and file have everything quantized.

    Args:
        model: any module.
        scheme: ``"pq"``: 256 centroids, see :func:`block`; ``"int8"`` or ``"int4"``.
        p: share of noised blocks; 0.1 for ``"pq"`` (see :data:`SHARES`), 0.5 for integers.
        ranges: of integers: ``"tensor"`` (least to greatest), ``"channel"`` (one symmetric range
            for each output), ``"histogram"`` (per tensor, clipped for the least squared error).
        kind: of ``"pq"``: ``"proxy"`` drops blocks, which Table 5 finds as good as the exact
            ``"quantizer"``.
        axis: of ranges by channel: outputs, or 1 for inputs, as in the published code.
        refresh: steps after which ranges or centroids are chosen anew; the published code reads
            ranges every 1,000 steps, here by default every step. Weights that are not noised are
            not clamped to the last ranges, as they are there.

    Raises:
        SpecError: an unknown scheme or range.
    """
    if scheme not in SCHEMES or ranges not in RANGES:
        raise SpecError(
            f"schemes are {', '.join(SCHEMES)}, ranges {', '.join(RANGES)}, not {scheme!r} and "
            f"{ranges!r}"
        )
    share = p if p is not None else SHARES.get(scheme, 0.1)

    def choose(layer: Layer) -> QuantNoise | None:
        if scheme != "pq":
            return _integers(int(scheme[3:]), share, ranges, axis, refresh)
        fmt = product(layer)
        return None if fmt is None else QuantNoise(fmt, share, kind=kind, refresh=refresh)

    return Recipe(plan_of(model, choose))


def block(layer: Layer) -> int:
    """The paper's block: a k x k kernel; 4 for 1x1, attention, embeddings' projections; or 8."""
    if layer.kernel > 1:
        return layer.kernel
    name = layer.name.lower()
    is_projection = layer.is_attention or ("emb" in name and "proj" in name)
    return 4 if layer.weight.ndim > 2 or (is_projection and not layer.is_embedding) else 8


def product(layer: Layer, size: int | None = None, points: int = 256) -> Product | None:
    """A product quantizer for a layer: no more than a centroid for four blocks (Stock et al. 2020).

    Returns:
        The format, or None where a layer has fewer than eight blocks.
    """
    fmt = Product(size or block(layer))
    rows, across = fmt.grid(tuple(layer.weight.shape))
    most = 1 << max(rows * across // 4, 1).bit_length() - 1
    return None if most < 2 else Product(fmt.block, min(points, most))


def _integers(
    bits: int, p: float | Ramp, ranges: str, axis: int, refresh: int | None
) -> QuantNoise:
    fmt: Format = Affine(bits, grid="asymmetric")
    if ranges == "channel":
        fmt = Affine(bits, axis=axis)
    kind = "mse" if ranges == "histogram" else "minmax"
    return QuantNoise(fmt, p, ranges=kind, refresh=refresh)
