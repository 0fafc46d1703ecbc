"""A small network for scikit-learn's digits: 1,797 grey images of 8x8 pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dither.core import DitherError

TRAINING_IMAGES = 1000
_BATCH = 50
_SEED = 0


class DigitNet(nn.Module):
    """Three convolutions with batch norm and two linear layers: 124,266 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(1, 32),
            nn.MaxPool2d(2),
            *_block(32, 64),
            *_block(64, 64),
            nn.MaxPool2d(2),
        )
        self.hidden = nn.Linear(256, 256)
        self.classes = nn.Linear(256, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, 10)`` of images ``(batch, 1, 8, 8)`` with values from 0 to 1."""
        features = self.features(images).flatten(1)
        logits: Tensor = self.classes(F.relu(self.hidden(features)))
        return logits


def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


def load_digits() -> tuple[Tensor, Tensor]:
    """Images ``(1797, 1, 8, 8)`` from 0 to 1 and labels, in a fixed random order.

    Raises:
        DitherError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DitherError(
            'the demo takes its data from scikit-learn; run: pip install "dither[demo]"'
        ) from error
    digits = datasets.load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(_SEED))
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    return images[order], torch.from_numpy(digits.target).long()[order]


def training_set() -> tuple[Tensor, Tensor]:
    """The first 1,000 images and labels."""
    images, labels = load_digits()
    return images[:TRAINING_IMAGES], labels[:TRAINING_IMAGES]


def test_set() -> tuple[Tensor, Tensor]:
    """The other 797 images and labels."""
    images, labels = load_digits()
    return images[TRAINING_IMAGES:], labels[TRAINING_IMAGES:]


def train(epochs: int) -> DigitNet:
    """Train from a fixed seed, with images shifted by up to one pixel; a few seconds.

    One thread: so small a network gains nothing from more, and gives the same everywhere.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(epochs)
    finally:
        torch.set_num_threads(threads)


def _train(epochs: int) -> DigitNet:
    images, labels = training_set()
    steps = epochs * (len(images) // _BATCH)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(_SEED)
        model = DigitNet()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(_BATCH):
                logits = model(_shifted(images[batch]))
                loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def _shifted(images: Tensor) -> Tensor:
    down, right = torch.randint(-1, 2, (2,)).tolist()
    return F.pad(images, (1, 1, 1, 1)).roll((down, right), (2, 3))[:, :, 1:-1, 1:-1]


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of all images in one batch."""
    logits: Tensor = model.eval()(images)
    return logits


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of images whose largest logit is that of their label."""
    return float((logits.argmax(1) == labels).double().mean())
