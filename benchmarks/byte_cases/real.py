"""MiniLM and ResNet-20: without data, and with 512 samples."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import dither
from benchmarks.byte_cases.case import Case, saved
from benchmarks.calibrated import samples_of
from benchmarks.tasks import minilm_stsb, resnet20_cifar10

_TASKS: dict[str, Any] = {"resnet20_cifar10": resnet20_cifar10, "minilm_stsb": minilm_stsb}
_SIZES = {
    "resnet20_cifar10": (127_949, 62_913, 20_000),
    "minilm_stsb": (6_941_013, 3_248_904),
}


def cases() -> Iterator[Case]:
    """All of them."""
    for task, sizes in _SIZES.items():
        is_large = task == "minilm_stsb"
        for size in sizes:
            name = f"{task}/{size}"
            yield Case(
                name,
                partial(_compressed, task, size),
                is_slow=is_large,
                needs_data=not is_large,
            )
        yield Case(
            f"{task}/{sizes[1]}/512 samples",
            partial(_with_data, task, sizes[1]),
            is_slow=True,
            needs_data=True,
        )


def _compressed(task: str, size: int) -> bytes:
    return saved(dither.compress(_TASKS[task].load(), size))


def _with_data(task: str, size: int) -> bytes:
    data = samples_of(task)
    return saved(dither.compress(_TASKS[task].load(), size, data=data))
