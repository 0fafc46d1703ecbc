"""What every peer does: compress a task's model, write files, load them back, score that.

A peer is a module of this folder. It runs in an environment of its own, from the repository's root,
and neither it nor what it imports needs dither:

    PYTHON -m benchmarks.peers.NAME --task minilm_stsb --setting int8 --split test --folder out/peer

The last line that it prints is one JSON object: ``peer``, ``version``, ``setting``, ``task``,
``split``, ``nbytes`` (of the files as the peer writes them), ``nbytes_zstd`` (of the same files
after ``zstd -19``), ``score`` (null if it is not a number), ``seconds`` of compressing and writing,
``peak_mb`` (largest resident memory until the model is loaded back, in 10^6 bytes) and ``torch``;
or, in place of figures, ``error``. ``--list`` prints what there is to measure, a task and a setting
a line. Tasks whose model has no published checkpoint need ``--weights`` with those that were
trained.

Compressing and loading share nothing but the files: ``restore`` gets the folder, and no object of
``compress``; and a model that it fills begins with NaN everywhere, so that nothing of the original
can count for the peer.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
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

TASKS = ("resnet20_cifar10", "minilm_stsb", "minilm_sst2", "lm_ptb")
ZSTD_LEVEL = 19
_IMAGES = 1024  # of the training part, for peers that calibrate
_SENTENCES = 512  # of either task, and as many windows of text
_SEED = 12_345


@dataclass(frozen=True)
class Task:
    """One of the benchmark's tasks.

    Attributes:
        name: of a module of ``benchmarks.tasks``.
        weights: of the trained model, for tasks whose checkpoint is not published.
        seed: of these, and of what is random in compressing.
    """

    name: str
    weights: Path | None = None
    seed: int = 0

    def load(self) -> nn.Module:
        """The trained model in fp32 and evaluation mode."""
        given = () if self.weights is None else (self.weights,)
        model: nn.Module = self._module().load(*given)
        return model

    def blank(self) -> nn.Module:
        """The same model with NaN for all that a checkpoint holds in floats, to be filled."""
        model = self.load()
        for tensor in model.state_dict().values():  # not constants that the code itself makes
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
        return model

    def evaluate(self, model: nn.Module, split: str) -> float:
        """The score of the task; :data:`benchmarks.methods.TASKS` says what it is."""
        return float(self._module().evaluate(model, split))

    def calibration(self, size: int = 64) -> list[dict[str, Tensor]]:
        """Batches of training data, as keyword arguments of the model: nothing of dev or test."""
        made = {
            "resnet20_cifar10": _images,
            "minilm_stsb": _sentences,
            "minilm_sst2": _reviews,
            "lm_ptb": _windows,
        }
        return made[self.name](size)

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

    def labels(self, task: str) -> list[str]:
        """The settings to measure on a task."""
        return list(self.only.get(task, self.settings))


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


def _reviews(size: int) -> list[dict[str, Tensor]]:
    """Random training sentences of SST-2, without their labels."""
    stream = importlib.import_module("benchmarks.tasks.minilm_sst2").batches(size, _SEED)
    found = (next(stream) for _ in range(_SENTENCES // size))
    return [{"ids": ids, "mask": mask} for ids, mask, _ in found]


def _windows(size: int) -> list[dict[str, Tensor]]:
    """Random windows of 64 tokens of the training text."""
    stream = importlib.import_module("benchmarks.tasks.lm_ptb").windows(size, _SEED)
    return [{"tokens": next(stream)[:, :-1]} for _ in range(_SENTENCES // size)]


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
    row |= {"task": task.name, "split": split, "unseen": True}
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        torch.manual_seed(task.seed)
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


def run(peer: Peer) -> None:
    """The command line of a peer."""
    parser = argparse.ArgumentParser(
        description=f"{peer.name} {peer.version}, as a peer of dither."
    )
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--setting", choices=list(peer.settings))
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--weights", type=Path, help="of the model, where none is published")
    parser.add_argument("--seed", type=int, default=0, help="of the model, and of training")
    parser.add_argument("--folder", type=Path, help="for the files; what it held is removed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.list:
        tasks = [options.task] if options.task else peer.tasks
        print("\n".join(f"{task} {label}" for task in tasks for label in peer.labels(task)))
        return
    if not (options.task and options.setting and options.folder):
        parser.error("--task, --setting and --folder are needed")
    if options.task not in peer.tasks:
        row = {"peer": peer.name, "version": peer.version, "setting": options.setting}
        row |= {"task": options.task, "split": options.split, "torch": torch.__version__}
        print(json.dumps(row | {"error": f"takes {', '.join(peer.tasks)} only"}))
        return
    # A folder of its own below the given one, so that nothing else can be counted or removed.
    folder = options.folder / f"{peer.name}-{options.task}-{options.setting}-{options.seed}"
    task = Task(options.task, options.weights, options.seed)
    row = measure(peer, options.setting, task, options.split, folder)
    print(json.dumps(row), flush=True)
