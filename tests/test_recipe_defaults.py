"""The recipes' settings are those of their papers, on the architectures of the papers."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional

from dither.formats import Affine, Product
from dither.recipes import ipq, oscillations, quant_noise, quantized_distillation
from dither.train import LSQ, CountOscillations, Dampening, FreezeOscillations, Ramp
from dither.train.ipq import IterativePQ, ProductCodes, StillNorms
from dither.train.learned_codebook import LearnedCodebook
from dither.train.quant_noise import QuantNoise

OUTPUTS, INPUTS = 0, 1


class Block(nn.Module):
    """Of a ResNet, with two 3x3 kernels, or for ``widen=4`` a 3x3 kernel between two 1x1."""

    def __init__(self, wide: int, width: int, widen: int) -> None:
        super().__init__()
        out = widen * width
        sizes = [(wide, width, 3), (width, width, 3)]
        if widen > 1:
            sizes = [(wide, width, 1), (width, width, 3), (width, out, 1)]
        for n, (a, b, k) in enumerate(sizes, 1):
            self.add_module(f"conv{n}", nn.Conv2d(a, b, k, bias=False))
            self.add_module(f"bn{n}", nn.BatchNorm2d(b))
        if wide != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)
            )


def resnet(counts: Sequence[int], widen: int) -> nn.Module:
    """Parameters of a ResNet for ImageNet, without their values."""
    with torch.device("meta"):
        model = nn.Module()
        model.conv1, model.bn1 = nn.Conv2d(3, 64, 7, bias=False), nn.BatchNorm2d(64)
        wide = 64
        for stage, count in enumerate(counts):
            width, blocks = 64 << stage, []
            for _ in range(count):
                blocks.append(Block(wide, width, widen))
                wide = widen * width
            model.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        model.fc = nn.Linear(wide, 1000)
    return model


RESNET_18, RESNET_50 = ((2, 2, 2, 2), 1), ((3, 4, 6, 3), 4)


@pytest.mark.parametrize(
    ("depth", "blocks", "mib"),
    [
        (RESNET_18, "small", 1.54),
        (RESNET_18, "large", 1.03),
        (RESNET_50, "small", 5.09),
        (RESNET_50, "large", 3.19),
    ],
)
def test_stock_et_als_sizes_come_out_of_the_plans(
    depth: tuple[Sequence[int], int], blocks: str, mib: float
) -> None:
    model = resnet(*depth)
    assert sum(p.numel() for p in model.parameters()) == {1: 11_689_512, 4: 25_557_032}[depth[1]]
    assert round(ipq.size_mib(model, ipq.plan(model, blocks=blocks)), 2) == mib


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)),
        *(nn.Flatten(), nn.Linear(256, 16)),
    )


def test_norms_stand_still_while_layers_are_placed_and_train_afterwards() -> None:
    model = small()
    run = ipq.recipe(model, steps=8, stages="layers").attach(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    kinds = [type(s) for s in run.schedules]
    assert kinds == [IterativePQ, StillNorms]
    seen = []
    for _ in range(8):
        before = norms[1].running_mean.clone()  # type: ignore[union-attr]
        model(torch.randn(4, 3, 8, 8))
        seen.append(not torch.equal(before, norms[1].running_mean))  # type: ignore[arg-type]
        run.step()
    assert seen == [False] * 4 + [True] * 4
    assert all(s.is_placed for s in run.surrogates.values())
    model.eval()
    run.step()
    assert not any(norm.training for norm in norms)


def test_centroids_may_be_int8() -> None:
    model = small()
    rules = ipq.plan(model, dtype=torch.int8)
    run = ipq.recipe(model, steps=3, blocks=rules).attach(model)
    for _ in range(3):
        run.step()
    run.finish()
    archive = run.archive
    formats = {type(spec.format) for _, spec in rules if isinstance(spec, ProductCodes)}
    assert formats == {Product}
    stored = [archive.encoded(name) for name in run.surrogates]
    assert all("centroids" in encoded.codes for encoded in stored)


def test_oscillations_as_in_the_published_command_line() -> None:
    for bits, end in ((3, 0.011), (4, 0.01)):
        (freeze,) = oscillations.recipe(small(), bits, "freeze", steps=9).schedules
        assert isinstance(freeze, FreezeOscillations)
        assert freeze.threshold == Ramp(0.1, end, begin=0.25, shape="cosine")
        assert freeze.momentum == 0.001
        assert freeze.max_bits == bits
        # Known well from two or three times the momentum on: the rule of the published code.
        assert end >= 3 * freeze.momentum
    dampened = oscillations.recipe(small(), 4, "dampen", steps=9)
    assert dampened.penalties == (Dampening(Ramp(0.0, 0.1, begin=0.25, shape="cosine")),)
    assert dampened.schedules == (CountOscillations(0.001),)
    rules = oscillations.recipe(small(), 3, steps=9).plan
    assert [spec.bits for _, spec in rules if isinstance(spec, LSQ)] == [8, 3, 8]


def test_the_distillation_loss_is_the_published_codes() -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(6, 10), torch.randn(6, 10), torch.arange(6)
    # torch's `KLDivLoss()` of then, a mean over elements.
    distance = functional.kl_div(
        functional.log_softmax(student / 2, 1), functional.softmax(teacher / 2, 1), reduction="none"
    ).mean()
    wanted = 0.7 * 4 * distance + 0.3 * functional.cross_entropy(student, labels)
    torch.testing.assert_close(quantized_distillation.loss(student, teacher, labels), wanted)
    _, spec = next(iter(quantized_distillation.recipe(small()).plan))
    assert isinstance(spec, LearnedCodebook)
    assert (spec.points, spec.bucket, spec.init) == (16, 256, "uniform")


@pytest.mark.parametrize("axis", [OUTPUTS, INPUTS])
def test_quant_noise_ranges_by_either_axis_and_as_seldom_as_published(axis: int) -> None:
    rules = quant_noise.recipe(small(), "int8", axis=axis, refresh=1000).plan
    specs = [spec for _, spec in rules if isinstance(spec, QuantNoise)]
    assert {spec.format for spec in specs} == {Affine(8, axis=axis)}
    assert {(spec.p, spec.refresh, spec.ranges) for spec in specs} == {(0.5, 1000, "minmax")}
    model = nn.Linear(8, 4)
    run = quant_noise.recipe(model, "int8", axis=axis).attach(model)
    model(torch.randn(2, 8)).sum().backward()
    run.step()
    run.finish()
    encoded = run.archive.encoded("weight")
    assert encoded.params["scale"].numel() == (4, 8)[axis]
