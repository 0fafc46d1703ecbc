"""EfficientNet-B3 and DeiT-B on ImageNet: DiffQ, or Quant-Noise with integers or codebooks.

Fan, Stock et al. 2021, Table 1, EfficientNet-B3: 81.5 % in 46.7 MiB; int4 45.3 % and with
Quant-Noise 67.8 % in 5.8 MiB; codebooks 79.0 % and with Quant-Noise 80.0 % in 3.3 MiB. Défossez et
al. 2022, DeiT-B: 81.8 %, and 82.0 % with DiffQ in 45.7 MiB.

torchrun --nproc-per-node 8 examples/full_scale/imagenet.py --data IMAGENET --model deit
torchrun --nproc-per-node 8 examples/full_scale/imagenet.py --data IMAGENET --method quant-noise
python examples/full_scale/imagenet.py --tiny

``--data`` names a folder with ``train`` and ``val``, each with a folder for each class. It needs
transformers and torchvision, and a network for the models. Where the papers train from nothing, for
300 epochs, this fine-tunes the public checkpoints.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # wherever it is run from

from dither.recipes import Recipe, diffq, ipq, quant_noise
from examples.full_scale.training import (
    Job,
    Order,
    World,
    join_world,
    leave_world,
    moved,
    optional,
    parser,
    shares,
    ship,
    train,
    warm_cosine,
)

_NAMES = {"efficientnet": "google/efficientnet-b3", "deit": "facebook/deit-base-patch16-224"}
_SIDES = {"efficientnet": 300, "deit": 224}
Images = Dataset[Any]
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Logits(nn.Module):
    """A model of transformers that returns nothing but its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalised images ``(batch, 3, side, side)``."""
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


def network(kind: str, *, tiny: bool) -> nn.Module:
    """A public checkpoint, or a small random model of the same architecture."""
    transformers = optional("transformers", "an image model")
    if not tiny:
        classes = transformers.AutoModelForImageClassification
        return Logits(classes.from_pretrained(_NAMES[kind]))
    if kind == "deit":
        config = transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            num_labels=4,
        )
        return Logits(transformers.ViTForImageClassification(config))
    config = transformers.EfficientNetConfig(
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.25,
        hidden_dim=320,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
        num_labels=4,
    )
    return Logits(transformers.EfficientNetForImageClassification(config))


def made_up(count: int, seed: int) -> TensorDataset:
    """Noise with a tint, which is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    tints = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])[labels]
    images = torch.randn(count, 3, 32, 32, generator=generator) + tints.view(-1, 3, 1, 1)
    return TensorDataset(images, labels)


def folder(path: Path | None, side: int, *, training: bool) -> Images:
    """ImageNet as folders of images."""
    if path is None:
        raise SystemExit("name ImageNet's folder with --data, or try --tiny")
    torchvision = optional("torchvision", "ImageNet")
    steps = torchvision.transforms
    cut = (
        [steps.RandomResizedCrop(side), steps.RandomHorizontalFlip()]
        if training
        else [steps.Resize(round(side / 0.9)), steps.CenterCrop(side)]
    )
    change = steps.Compose([*cut, steps.ToTensor(), steps.Normalize(_MEAN, _STD)])
    part = path / ("train" if training else "val")
    found: Images = torchvision.datasets.ImageFolder(str(part), change)
    return found


@torch.inference_mode()
def accuracy(model: nn.Module, data: Images, world: World) -> float:
    """Top-1 in percent, over all processes."""
    right = count = 0
    own = Subset(data, shares(len(data), world))  # type: ignore[arg-type] # len() is left open
    for batch in DataLoader(own, batch_size=64):
        images, labels = moved(batch, world.device)
        right += int((model(images).argmax(1) == labels).sum())
        count += len(labels)
    right_in_all, in_all = world.sums(right, count)
    return 100 * right_in_all / in_all


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Cross-entropy."""
    return functional.cross_entropy(model(batch[0]).float(), batch[1])


def arguments() -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__, "imagenet")
    made.add_argument("--model", choices=tuple(_NAMES), default="efficientnet")
    made.add_argument("--method", choices=("diffq", "quant-noise", "ipq"), default="diffq")
    made.add_argument("--scheme", choices=quant_noise.SCHEMES, default="int4")
    made.add_argument("--batch", type=int, default=64, help="images of one process")
    made.add_argument("--epochs", type=int, default=20)
    made.add_argument("--rate", type=float, default=5e-5)
    made.add_argument("--penalty", type=float, default=0.1, help="DiffQ's lambda for a MiB")
    made.add_argument("--p", type=float, default=None, help="share of noised blocks")
    return made.parse_args()


def recipe_of(model: nn.Module, options: argparse.Namespace, steps: int) -> Recipe:
    """The method that was asked for."""
    if options.method == "quant-noise":
        return quant_noise.recipe(model, options.scheme, p=options.p)
    if options.method == "ipq":
        share = quant_noise.SHARES["vision"] if options.p is None else options.p
        stages = "transformer" if options.model == "deit" else "layers"
        return ipq.recipe(model, steps=steps, start=steps // 2, p=share, stages=stages)
    preset = "deit" if options.model == "deit" else "default"
    settings = {"min_size": 0.0, "lr": 0.05} if options.tiny else {}
    return diffq.recipe(model, preset, penalty=options.penalty, **settings)


def main() -> None:
    """Train, ship, evaluate."""
    options, world = arguments(), join_world()
    torch.manual_seed(options.seed)
    side = _SIDES[options.model]
    data: Any = made_up(256, 0) if options.tiny else folder(options.data, side, training=True)
    test: Any = made_up(64, 1) if options.tiny else folder(options.data, side, training=False)
    order = Order(len(data), 16 if options.tiny else options.batch, world, options.seed)
    steps = options.steps or options.epochs * order.per_epoch

    model = network(options.model, tiny=options.tiny).to(world.device)
    rate = 3e-3 if options.tiny else options.rate
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-4)
    rates = warm_cosine(optimizer, max(1, steps // 20), steps)
    recipe = recipe_of(model, options, steps)
    run = recipe.attach(model, optimizer=optimizer, steps=steps, noise=options.seed)
    if train(Job(run, optimizer, rates, loss_of, steps), data, order, world, options):
        statistics = DataLoader(data, batch_size=16 if options.tiny else 64, shuffle=True)
        empty = network(options.model, tiny=options.tiny)
        ship(run, empty, lambda net: accuracy(net, test, world), world, options, statistics)
    leave_world()


if __name__ == "__main__":
    main()
