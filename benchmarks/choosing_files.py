"""Forty compressed ResNet-20 and what each says of the 10,000 test images of CIFAR-10.

Files of several ways, sizes and seeds, all made without data: the matrix that
``python -m benchmarks.choosing`` chooses from. It is made once, in about five minutes of one core,
and kept in a folder outside the repository; interrupted, it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import dither
from benchmarks.tasks import resnet20_cifar10
from dither import Affine, Codebook, KMeans, Product, Ranges
from dither.archive import Archive
from dither.core import Encoder

SIZES = (45, 48, 50, 55, 60, 65, 70, 80, 90, 105, 120, 130)
"""Of the files that the search makes, in kB."""


@dataclass(frozen=True)
class Matrix:
    """What is known of the files.

    Attributes:
        names: of the files.
        nbytes: of the files.
        probabilities: of each class, float32 ``(files, images, classes)``.
        reference: logits of the float32 network, ``(images, classes)``.
        labels: ``(images,)``.
    """

    names: tuple[str, ...]
    nbytes: np.ndarray
    probabilities: np.ndarray
    reference: np.ndarray
    labels: np.ndarray

    @property
    def classes(self) -> np.ndarray:
        """What each file says, ``(files, images)``."""
        found: np.ndarray = self.probabilities.argmax(-1)
        return found

    @property
    def right(self) -> np.ndarray:
        """Whether it is right, float64 ``(files, images)``."""
        found: np.ndarray = (self.classes == self.labels).astype(np.float64)
        return found


def encoders() -> Iterator[tuple[str, Encoder]]:
    """Ways to store every weight but biases and batch norm, with their names."""
    for bits in (4, 5, 6, 8):
        yield f"affine {bits} rows", Affine(bits, axis=0)
        yield f"affine {bits}", Affine(bits)
    for bits in (3, 4, 5, 6):
        yield f"ranges {bits} rows", Ranges(Affine(bits, axis=0))
    for points in (6, 8, 16, 32):
        yield f"k-means {points}", KMeans(Codebook(points))
    for seed in range(3):
        for points in (8, 16):
            name = f"k-means++ {points} seed {seed}"
            yield name, KMeans(Codebook(points), start="kmeans++", seed=seed)
        for block in (2, 4):
            product = Product(block, points=128)
            name = f"product {block} seed {seed}"
            yield name, KMeans(product, start="kmeans++", seed=seed, backend="torch")


def makers() -> Iterator[tuple[str, Callable[[], Archive]]]:
    """The forty files, by name, each made when it is wanted."""
    for size in SIZES:
        yield f"search {size}", partial(dither.compress, resnet20_cifar10.load(), 1000 * size)
    for name, encoder in encoders():
        yield name, partial(stored, encoder)


def stored(encoder: Encoder) -> Archive:
    """The network with every weight in one way."""
    model = resnet20_cifar10.load()
    plan = {key: encoder for key, value in model.named_parameters() if value.ndim > 1}
    run = dither.attach(model, dither.Plan(plan))
    run.finish()
    return run.archive


@torch.inference_mode()
def logits(model: nn.Module, inputs: torch.Tensor) -> np.ndarray:
    """Of all images, float32 ``(images, classes)``."""
    found = [model(inputs[start : start + 100]) for start in range(0, len(inputs), 100)]
    return torch.cat(found).numpy()


def matrix(folder: Path) -> Matrix:
    """Make what is not in the folder yet, and read it."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / "matrix.npz"
    if not whole.exists():
        inputs, labels = resnet20_cifar10.some("test", 0, 10_000)
        parts, names, nbytes = [], [], []
        for number, (name, make) in enumerate(makers()):
            kept = folder / f"{number:02d}.npz"
            if not kept.exists():
                archive, model = make(), resnet20_cifar10.ResNet20()
                dither.load_into(model, archive)
                np.savez(kept, logits=logits(model.eval(), inputs), nbytes=archive.nbytes)
            with np.load(kept) as part:
                parts.append(torch.from_numpy(part["logits"]).softmax(-1).numpy())
                nbytes.append(int(part["nbytes"]))
            names.append(name)
            right = 100 * float((parts[-1].argmax(-1) == labels.numpy()).mean())
            print(f"{name}: {nbytes[-1]:,} bytes, {right:.2f} %", flush=True)
        np.savez(
            whole,
            names=np.array(names),
            nbytes=np.array(nbytes),
            probabilities=np.stack(parts).astype(np.float32),
            reference=logits(resnet20_cifar10.load(), inputs),
            labels=labels.numpy().astype(np.int64),
        )
    with np.load(whole) as kept_all:
        found = {key: kept_all[key] for key in kept_all.files}
    names_read = tuple(str(name) for name in found.pop("names"))
    return Matrix(names=names_read, **found)
