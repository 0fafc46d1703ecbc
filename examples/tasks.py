"""What the examples share: real data with a trained network, and the report at the end."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import dither
from benchmarks.tasks import resnet20_cifar10
from dither.demo import network as digits
from dither.train import Run

__all__ = ["Options", "Task", "arguments", "load", "report", "report_archive"]


@dataclass(frozen=True)
class Task:
    """A trained network and its data.

    Attributes:
        name: of the data.
        model: float32, trained.
        batch: inputs and labels of a training step, by its number.
        evaluate: accuracy on test data in percent.
        empty: the same network without its weights.
    """

    name: str
    model: nn.Module
    batch: Callable[[int], tuple[Tensor, Tensor]]
    evaluate: Callable[[nn.Module], float]
    empty: Callable[[], nn.Module]

    @property
    def nbytes(self) -> int:
        """Bytes of the network's own tensors."""
        return sum(t.numel() * t.element_size() for t in self.model.state_dict().values())

    def inputs(self, count: int) -> list[Tensor]:
        """Training inputs for batch norm's statistics."""
        return [self.batch(number)[0] for number in range(count)]


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    data: str
    steps: int
    epochs: int
    out: Path


def arguments(document: str | None, steps: int, name: str, what: str = "training steps") -> Options:
    """Read the command line.

    Args:
        document: the script's docstring.
        steps: training steps by default.
        name: of the file that is written by default.
        what: steps are.
    """
    parser = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        choices=("digits", "cifar10"),
        default="cifar10" if os.environ.get("DITHER_DATA") else "digits",
        help="cifar10 with a trained ResNet-20, from the folder DITHER_DATA; or scikit-learn's "
        "digits with a small network, which is trained first",
    )
    parser.add_argument("--steps", type=int, default=steps, help=f"{what} (%(default)s)")
    parser.add_argument("--epochs", type=int, default=12, help="of the digits' network, before")
    parser.add_argument("--out", type=Path, default=Path(f"{name}.dither"), help="the file")
    given = parser.parse_args()
    return Options(given.data, given.steps, given.epochs, given.out)


def load(options: Options) -> Task:
    """The data and network that were asked for."""
    torch.manual_seed(0)
    return _cifar10() if options.data == "cifar10" else _digits(options.epochs)


def _digits(epochs: int) -> Task:
    images, labels = digits.training_set()
    test_images, test_labels = digits.test_set()

    def batch(number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(number)
        chosen = torch.randint(len(images), (100,), generator=generator)
        return images[chosen], labels[chosen]

    def evaluate(model: nn.Module) -> float:
        return 100 * digits.accuracy(digits.predict(model, test_images), test_labels)

    return Task("digits", digits.train(epochs), batch, evaluate, digits.DigitNet)


def _cifar10() -> Task:
    batches = resnet20_cifar10.Batches(128, 0)

    def evaluate(model: nn.Module) -> float:
        return resnet20_cifar10.evaluate(model.eval(), "test")

    return Task(
        "cifar10",
        resnet20_cifar10.load(),
        batches.__getitem__,
        evaluate,
        resnet20_cifar10.ResNet20,
    )


def report(run: Run, task: Task, out: Path) -> None:
    """Save the file, load it into an empty network, and print bytes and accuracy."""
    run.save(out, {"data": task.name})
    _report(run.model, task, out)


def report_archive(archive: dither.Archive, task: Task, out: Path) -> None:
    """The same of a file that was found."""
    archive.save(out)
    model = task.empty()
    dither.load_into(model, archive)
    _report(model, task, out)


def _report(model: nn.Module, task: Task, out: Path) -> None:
    nbytes = out.stat().st_size
    loaded = task.empty()
    dither.load_into(loaded, out)
    inputs = task.batch(0)[0]
    with torch.no_grad():
        shipped, trained = loaded.eval()(inputs), model.eval()(inputs)
    assert torch.equal(shipped, trained), "the file computes something else"
    print(f"{task.name:12}{'bytes':>12}{'accuracy %':>12}")
    print(f"{'float32':12}{task.nbytes:12,}{task.evaluate(task.model):12.2f}")
    print(f"{'file':12}{nbytes:12,}{task.evaluate(loaded):12.2f}")
    print(f"{task.nbytes / nbytes:.1f} times smaller: {out}")
