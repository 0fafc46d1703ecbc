"""The models of `benchmarks.running`: how each is fed, scored, and quantized to 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from benchmarks.tasks import minilm_stsb, resnet20_cifar10
from benchmarks.zoo_models import efficientnet_lite0
from dither import Activation
from dither.activations import inputs_of_layers

_EIGHT = Activation(8)


@dataclass(frozen=True)
class Task:
    """A model, and how it is fed and scored.

    Attributes:
        load: the model in float32.
        sites: where activations are quantized in ``w8a8``.
        samples: calibration batches.
        score: of a function from a batch to the output that counts.
        scored: of what.
        inputs: a batch for times, of so many samples.
        output: which entry of the model's output counts.
        axes: which may vary.
    """

    load: Callable[[], nn.Module]
    sites: Callable[[nn.Module], Mapping[str, Activation]]
    samples: Callable[[], list[Any]]
    score: Callable[[Callable[[Any], Tensor]], float]
    scored: str
    inputs: Callable[[int], Any]
    output: str | None = None
    axes: Any = None
    batches: tuple[int, ...] = (1, 16)


# --- the models ----------------------------------------------------------------------------------


def _minilm_batch(rows: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def _minilm_score(run: Callable[[Any], Tensor], count: int = 400) -> float:
    pairs = minilm_stsb._pairs("test")  # noqa: SLF001 - the same data as its own score
    first, second = pairs.first[:count], pairs.second[:count]
    vectors: dict[int, Tensor] = {}
    wanted = sorted({*first.tolist(), *second.tolist()}, key=lambda i: len(pairs.tokens[i]))
    for start in range(0, len(wanted), 16):
        numbers = wanted[start : start + 16]
        batch = _minilm_batch([pairs.tokens[i] for i in numbers])
        mask = batch["attention_mask"][..., None]
        means = (run(batch) * mask).sum(1) / mask.sum(1)
        vectors |= dict(zip(numbers, nn.functional.normalize(means), strict=True))
    cosine = [
        float(vectors[a] @ vectors[b]) for a, b in zip(first.tolist(), second.tolist(), strict=True)
    ]
    ranks = rankdata(np.array(cosine))
    labels = rankdata(pairs.label_ranks[:count])
    return 100 * float(np.corrcoef(ranks, labels)[0, 1])


def _minilm_samples() -> list[Any]:
    tokens = minilm_stsb._pairs("dev").tokens  # noqa: SLF001 - the same
    rows = sorted(tokens[:256], key=len)
    return [_minilm_batch(rows[i : i + 32]) for i in range(0, len(rows), 32)]


def _minilm_inputs(count: int) -> dict[str, Tensor]:
    ids = torch.randint(1000, 20000, (count, 32), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _minilm_sites(model: nn.Module) -> dict[str, Activation]:
    return dict.fromkeys(inputs_of_layers(model, _minilm_samples()[:1]), _EIGHT)


def _resnet_sites(model: nn.Module) -> dict[str, Activation]:
    """What goes into each convolution, what comes out of the last of a block, and their sum."""
    blocks = [name for name, part in model.named_modules() if hasattr(part, "conv2")]
    ends = [f"{b}{end}" for b in blocks for end in (".conv2@in", ".bn2@out", "@out")]
    return dict.fromkeys(["conv1@in", "layer1@in", *ends, "linear@in"], _EIGHT)


def _resnet_score(run: Callable[[Any], Tensor], count: int = 2000) -> float:
    right = 0
    for start in range(0, count, 100):
        images, labels = resnet20_cifar10.some("test", start, start + 100)
        right += int((run(images).argmax(1) == labels).sum())
    return 100 * right / count


def _resnet_samples() -> list[Any]:
    return [resnet20_cifar10.some("dev", i, i + 64)[0] for i in range(0, 512, 64)]


def _efficientnet_sites(model: nn.Module) -> dict[str, Activation]:
    """The same, of inverted bottlenecks."""
    blocks: Any = model.get_submodule("_blocks")
    sites = ["_conv_stem@in", "_blocks.0@in", "_avg_pooling@in", "_fc@in"]
    for number in range(len(blocks)):
        ends = ("._depthwise_conv@in", "._project_conv@in", "._bn2@out", "@out")
        sites += [f"_blocks.{number}{end}" for end in ends]
    return dict.fromkeys(sites, _EIGHT)


def _efficientnet_score(run: Callable[[Any], Tensor], count: int = 400) -> float:
    numbers = [i for i in range(1000) if i % 4][:count]
    right = 0
    for start in range(0, count, 20):
        some = tuple(numbers[start : start + 20])
        found = run(efficientnet_lite0._images(some)).argmax(1)  # noqa: SLF001 - its own images
        right += int((found == torch.tensor(some)).sum())
    return 100 * right / count


def _efficientnet_samples() -> list[Any]:
    return [efficientnet_lite0._images(tuple(range(i, i + 64, 4))) for i in range(0, 256, 64)]  # noqa: SLF001


TASKS = {
    "minilm": Task(
        minilm_stsb.load,
        _minilm_sites,
        _minilm_samples,
        _minilm_score,
        "100 x Spearman's correlation, the first 400 pairs of STS-B's test part",
        _minilm_inputs,
        "last_hidden_state",
        {
            n: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
            for n in ("input_ids", "attention_mask")
        },
    ),
    "resnet20": Task(
        resnet20_cifar10.load,
        _resnet_sites,
        _resnet_samples,
        _resnet_score,
        "top-1 accuracy in percent, the first 2,000 test images of CIFAR-10",
        lambda count: resnet20_cifar10.some("test", 0, count)[0],
    ),
    "efficientnet_lite0": Task(
        efficientnet_lite0.load,
        _efficientnet_sites,
        _efficientnet_samples,
        _efficientnet_score,
        "top-1 accuracy in percent, 400 images of ImageNet that are no samples",
        lambda count: efficientnet_lite0._images(tuple(range(count))),  # noqa: SLF001
    ),
}
