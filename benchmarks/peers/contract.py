"""What every peer does: compress a task's model, write files, load them back, score that.

A peer is a module of this folder. It runs in an environment of its own, from the repository's root,
and neither it nor what it imports needs dither:

    PYTHON -m benchmarks.peers.NAME --task minilm_stsb --setting int8 --split test --folder out/peer

The last line that it prints is one JSON object: ``peer``, ``version``, ``setting``, ``task``,
``split``, ``nbytes`` (of the files as the peer writes them), ``nbytes_zstd`` (of the same files
after ``zstd -19``), ``score`` in percent (null if it is not a number), ``seconds`` of compressing
and writing, ``peak_mb`` (largest resident memory until the model is loaded back, in 10^6 bytes) and
``torch``; or, in place of figures, ``error``. ``--list`` prints the settings, one a line; with
``--task`` those to measure on this task.

Compressing and loading share nothing but the files: ``restore`` gets the folder, and no object of
``compress``; and a model that it fills begins with NaN everywhere, so that nothing of the original
can count for the peer.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import platform
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TASKS = ("resnet20_cifar10", "minilm_stsb")
ZSTD_LEVEL = 19
_IMAGES = 1024  # of the training part, for peers that calibrate
_SENTENCES = 512


@dataclass(frozen=True)
class Task:
    """One of the benchmark's tasks: ``resnet20_cifar10`` or ``minilm_stsb``."""

    name: str

    def load(self) -> nn.Module:
        """The trained model in fp32 and evaluation mode."""
        model: nn.Module = self._module().load()
        return model

    def blank(self) -> nn.Module:
        """The same model with NaN for every weight and floating-point statistic, to be filled."""
        model = self.load()
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.detach().fill_(math.nan)
        return model

    def evaluate(self, model: nn.Module, split: str) -> float:
        """The score in percent, more is better."""
        return float(self._module().evaluate(model, split))

    def calibration(self, size: int = 64) -> list[dict[str, Tensor]]:
        """Batches of training data, as keyword arguments of the model: nothing of dev or test."""
        return _images(size) if self.name == "resnet20_cifar10" else _sentences(size)

    def _module(self) -> Any:  # noqa: ANN401
        return importlib.import_module(f"benchmarks.tasks.{self.name}")


@dataclass(frozen=True)
class Peer:
    """A compressor.

    Attributes:
        name: of the module in this folder.
        version: of the distribution.
        settings: labels, and what ``compress`` makes of each.
        compress: ``(task, setting, folder)`` writes the compressed model's files into the folder.
        restore: ``(task, setting, folder)`` makes a model from these files alone, ready to score.
        tasks: the tasks that it takes.
        only: the labels to measure on a task, where these are not all settings.
    """

    name: str
    version: str
    settings: Mapping[str, Any]
    compress: Callable[[Task, str, Path], None]
    restore: Callable[[Task, str, Path], nn.Module]
    tasks: Sequence[str] = TASKS
    only: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def labels(self, task: str | None) -> list[str]:
        """The settings to measure on a task, or all of them."""
        return list(self.only.get(task or "", self.settings))


def _images(size: int) -> list[dict[str, Tensor]]:
    module = importlib.import_module("benchmarks.tasks.resnet20_cifar10")
    batches = module.Batches(size, seed=0)
    return [{"x": batches[i][0]} for i in range(_IMAGES // size)]


def _sentences(size: int) -> list[dict[str, Tensor]]:
    """The first sentences of the training pairs, in batches of like length."""
    tasks = importlib.import_module("benchmarks.tasks")
    module = importlib.import_module("benchmarks.tasks.minilm_stsb")
    tokenizers = importlib.import_module("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(module.model_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    lines = tasks.data_path("stsb/sts-train.csv").read_text(encoding="utf-8").splitlines()
    step = len(lines) // _SENTENCES
    texts = [line.split("\t")[5].strip() for line in lines[: step * _SENTENCES : step]]
    rows = sorted((e.ids for e in tokenizer.encode_batch(texts)), key=len)
    batches = []
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        ids = torch.zeros(len(some), max(map(len, some)), dtype=torch.long)
        for place, row in zip(ids, some, strict=True):
            place[: len(row)] = torch.tensor(row)
        batches.append({"input_ids": ids, "attention_mask": (ids != 0).long()})
    return batches


def halved(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same state with plain fp32 tensors in fp16; a peer's own kinds of tensor are kept."""
    return {k: v.detach().half() if _plain(v, torch.float32) else v for k, v in state.items()}


def widened(state: Mapping[str, Any]) -> dict[str, Any]:
    """What ``halved`` made fp16 in fp32 again."""
    return {k: v.float() if _plain(v, torch.float16) else v for k, v in state.items()}


def _plain(value: object, dtype: torch.dtype) -> bool:
    return type(value) in {Tensor, nn.Parameter} and getattr(value, "dtype", None) is dtype


def files_in(folder: Path) -> list[Path]:
    """All files below a folder, in order of their names."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of all files as they are, and each after zstd at level 19."""
    zstandard = importlib.import_module("zstandard")
    coder = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    paths = files_in(folder)
    return {
        "nbytes": sum(path.stat().st_size for path in paths),
        "nbytes_zstd": sum(len(coder.compress(path.read_bytes())) for path in paths),
    }


def peak_mb() -> float:
    """Largest resident memory of this process so far, in 10^6 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def version_of(distribution: str) -> str:
    """The installed version, or ``"missing"``."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "missing"


def measure(peer: Peer, setting: str, task: Task, split: str, folder: Path) -> dict[str, Any]:
    """Run one setting and return its row; what the peer raises becomes the row's ``error``."""
    row: dict[str, Any] = {"peer": peer.name, "version": peer.version, "setting": setting}
    row |= {"task": task.name, "split": split}
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        torch.manual_seed(0)
        start = time.perf_counter()
        peer.compress(task, setting, folder)
        seconds = time.perf_counter() - start
        row |= sizes(folder)
        model = peer.restore(task, setting, folder).eval()
        peak = peak_mb()
        score = task.evaluate(model, split)
    except Exception as error:  # noqa: BLE001  # a peer may fail in any way, and that is a result
        traceback.print_exc()
        for key in ("nbytes", "nbytes_zstd"):
            row.pop(key, None)
        return row | {"error": f"{type(error).__name__}: {error}", "torch": torch.__version__}
    row["score"] = None if math.isnan(score) else score
    return row | {"seconds": round(seconds, 2), "peak_mb": peak, "torch": torch.__version__}


def environment() -> dict[str, Any]:
    """Versions of everything installed beside this interpreter, for the head of a results file."""
    found = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "packages": {name: found[name] for name in sorted(found, key=str.lower)},
    }


def run(peer: Peer) -> None:
    """The command line of a peer; ``--environment`` prints versions, ``--list`` the settings."""
    parser = argparse.ArgumentParser(
        description=f"{peer.name} {peer.version}, as a peer of dither."
    )
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--setting", choices=list(peer.settings))
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--folder", type=Path, help="for the files; what it held is removed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--environment", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.list:
        print("\n".join(peer.labels(options.task)))
        return
    if options.environment:
        print(json.dumps(environment()))
        return
    if not (options.task and options.setting and options.folder):
        parser.error("--task, --setting and --folder are needed")
    if options.task not in peer.tasks:
        row = {"peer": peer.name, "version": peer.version, "setting": options.setting}
        row |= {"task": options.task, "split": options.split, "torch": torch.__version__}
        print(json.dumps(row | {"error": f"takes {', '.join(peer.tasks)} only"}))
        return
    # A folder of its own below the given one, so that nothing else can be counted or removed.
    folder = options.folder / f"{peer.name}-{options.task}-{options.setting}"
    row = measure(peer, options.setting, Task(options.task), options.split, folder)
    print(json.dumps(row), flush=True)
