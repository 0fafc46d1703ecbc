"""ResNet-20 on CIFAR-10: 271,098 weights; fp32 scores 91.73 % top-1 on test.

Of these, 269,722 were trained and 1,376 are running statistics of batch norm. The network is from
He et al. 2016, "Deep Residual Learning for Image Recognition" (section 4.2), with shortcuts of type
A, which hold no parameters.
"""

from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from . import Split, data_path

__all__ = ["Batches", "ResNet20", "evaluate", "load", "some", "state_dict_path"]

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_TEST_STRIPS = 2
_DEV_STRIP = 9
_PAD = 4
_BATCH = 100  # faster on a CPU than larger batches: the activations stay in its caches


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.padding = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.padding:
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, self.padding // 2, self.padding // 2))
        return functional.relu(x + y)


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        _Block(inputs, outputs, stride), _Block(outputs, outputs, 1), _Block(outputs, outputs, 1)
    )


class ResNet20(nn.Module):
    """ResNet-20 for 32x32 colour images; maps [n, 3, 32, 32] to [n, 10] logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1)
        self.layer2 = _stage(16, 32, 2)
        self.layer3 = _stage(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify normalised images."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def state_dict_path() -> Path:
    """Find the trained weights, a safetensors file of 1,092,520 bytes.

    Raises:
        FileNotFoundError: if the data are missing.
    """
    return data_path("resnet20-cifar10.safetensors")


def load() -> nn.Module:
    """Load the trained network in fp32 and evaluation mode.

    Raises:
        FileNotFoundError: if the data are missing.
    """
    model = ResNet20()
    weights = load_file(state_dict_path())
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith(".num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(
            f"{state_dict_path().name} does not fit ResNet20: missing {missing}, "
            f"unexpected {unexpected}"
        )
    return model.eval()


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split) -> float:
    """Measure the top-1 accuracy.

    Args:
        model: maps normalised images [n, 3, 32, 32] to logits [n, 10]. Its mode is left as it is:
            call ``model.eval()`` first.
        split: ``"test"`` (10,000 images), or ``"dev"``: CIFAR-10 has no development part, so these
            are 5,000 fixed images of the training part (the last ones). The network was trained
            on them: they tell two compressed models apart, but the level flatters.

    Returns:
        The share of images classified rightly, in percent.

    Raises:
        FileNotFoundError: if the data are missing.
    """
    images, labels = _images(split)
    device = next(iter(model.parameters())).device
    scale, shift = _normalization(device)
    right = 0
    for start in range(0, len(images), _BATCH):
        x = images[start : start + _BATCH].to(device).float() * scale + shift
        guess = model(x).argmax(1).cpu()
        right += int((guess == labels[start : start + _BATCH]).sum())
    return 100.0 * right / len(images)


def some(split: Split | Literal["train"], first: int, last: int) -> tuple[Tensor, Tensor]:
    """Normalised images [n, 3, 32, 32] and labels [n]: a range of a split in a fixed random order.

    In the order of the files, images of one class follow one another. ``"train"`` are the 45,000
    images that :class:`Batches` has.

    Raises:
        FileNotFoundError: if the data are missing.
    """
    images, labels = _images(split)
    scale, shift = _normalization(torch.device("cpu"))
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[first:last]
    return images[chosen].float() * scale + shift, labels[chosen].long()


class Batches:
    """Training batches for ever: normalised images [n, 3, 32, 32] and their labels [n].

    The first 45,000 training images, those that ``evaluate(model, "dev")`` does not use, in random
    order; cropped out of 4 pixels of padding and flipped at random, as is usual. A batch depends on
    nothing but the seed and its number, so that training resumes where it was.

    Args:
        size: images of a batch; an epoch drops what does not fill one.
        seed: of order, crops and flips.

    Raises:
        FileNotFoundError: if the data are missing.
    """

    def __init__(self, size: int, seed: int) -> None:
        images, labels = _images("train")
        self._images, self._labels = functional.pad(images, (_PAD,) * 4), labels.long()
        self._size, self._seed = size, seed
        self.per_epoch = len(images) // size

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """The batch of a step, counted from 0 over all epochs."""
        epoch, place = divmod(number, self.per_epoch)
        order = self._order(epoch)[place * self._size : (place + 1) * self._size]
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        corners = torch.randint(0, 2 * _PAD + 1, (len(order), 2), generator=generator)
        flips = torch.rand(len(order), generator=generator) < 0.5
        images = torch.stack(
            [
                self._images[i, :, y : y + 32, x : x + 32]
                for i, (y, x) in zip(order.tolist(), corners.tolist(), strict=True)
            ]
        )
        images = torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)
        scale, shift = _normalization(torch.device("cpu"))
        return images.float() * scale + shift, self._labels[order]

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed * 7_919 + epoch)
        return torch.randperm(len(self._labels), generator=generator)


def _normalization(device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and offset of channels that are 0 to 255."""
    scale = 1 / (255 * torch.tensor(_STD, device=device).view(3, 1, 1))
    shift = -(torch.tensor(_MEAN, device=device) / torch.tensor(_STD, device=device)).view(3, 1, 1)
    return scale, shift


@cache
def _images(split: Split | Literal["train"]) -> tuple[Tensor, Tensor]:
    """Decode a split once. Returns images [n, 3, 32, 32] and labels [n], both uint8."""
    if split == "test":
        parts, first = [_strip(f"cifar10/test_{i:02d}.png") for i in range(_TEST_STRIPS)], 0
        labels = np.load(data_path("cifar10/test_labels.npy"))
    elif split == "train":
        parts, first = [_strip(f"cifar10/train_{i:02d}.png") for i in range(_DEV_STRIP)], 0
        labels = np.load(data_path("cifar10/train_labels.npy"))
    elif split == "dev":
        parts, first = [_strip(f"cifar10/train_{_DEV_STRIP:02d}.png")], 5000 * _DEV_STRIP
        labels = np.load(data_path("cifar10/train_labels.npy"))
    else:
        raise ValueError(f"split is {split!r}; expected 'dev' or 'test'")
    images = torch.from_numpy(np.concatenate(parts))
    return images, torch.from_numpy(labels[first : first + len(images)])


def _strip(relative: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Cut a mosaic of 50 x 100 images, row by row, into an array [5000, 3, 32, 32]."""
    with Image.open(data_path(relative)) as picture:
        mosaic = np.asarray(picture.convert("RGB"))
    tiles = mosaic.reshape(50, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(tiles.reshape(5000, 3, 32, 32))
