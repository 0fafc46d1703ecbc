"""What the full-scale scripts share: processes, order of data, the loop, checkpoints, the file."""

from __future__ import annotations

import argparse
import importlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler

import dither
from dither.train import Run


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def sums(self, *values: float) -> list[float]:
        """Sums over all processes."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            distributed.all_reduce(total)
        return [float(value) for value in total]

    def say(self, text: str) -> None:
        """Print once."""
        if self.is_first:
            print(text, flush=True)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            distributed.barrier()


def join_world() -> World:
    """Join the processes that torchrun started; without it, be alone."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if size > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank, size, device)


def leave_world() -> None:
    """Say goodbye to the other processes."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def optional(package: str, why: str) -> ModuleType:
    """Import a package that only these scripts need."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise SystemExit(
            f"{why} needs the package {package!r}: pip install {package}; or try --tiny, which "
            "has a small random model and made-up data"
        ) from error


def parser(document: str | None, name: str) -> argparse.ArgumentParser:
    """Options of all scripts."""
    made = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--tiny", action="store_true", help="a small random model, made-up data")
    made.add_argument("--data", type=Path, help="folder of the data")
    made.add_argument("--out", type=Path, default=Path(name), help="folder for checkpoint and file")
    made.add_argument("--steps", type=int, help="optimizer steps in all")
    made.add_argument("--stop", type=int, help="stop after this step, to be resumed")
    made.add_argument("--every", type=int, default=1000, help="steps between checkpoints")
    made.add_argument("--seed", type=int, default=0)
    return made


class Order(Sampler[list[int]]):
    """Indices of each step's batch for this process: the same however often one resumes."""

    def __init__(self, length: int, batch: int, world: World, seed: int) -> None:
        self.length, self.batch, self.world, self.seed = length, batch, world, seed
        self.first, self.last = 0, 0

    @property
    def per_epoch(self) -> int:
        """Steps of one epoch."""
        return max(1, self.length // (self.batch * self.world.size))

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0)
        for step in range(self.first, self.last):
            if step // self.per_epoch != epoch:
                epoch = step // self.per_epoch
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.length, generator=generator)
            place = (step % self.per_epoch * self.world.size + self.world.rank) * self.batch
            yield order[place : place + self.batch].tolist()

    def __len__(self) -> int:
        return self.last - self.first


def shares(count: int, world: World) -> range:
    """The indices of ``count`` that this process evaluates."""
    return range(world.rank, count, world.size)


def warm_cosine(optimizer: Optimizer, warm: int, steps: int, least: float = 0.0) -> LRScheduler:
    """Linear warm-up, then half a cosine down to ``least`` of the rate."""

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        share = min(1.0, (step - warm) / max(1, steps - warm))
        return least + (1 - least) * (1 + math.cos(math.pi * share)) / 2

    return LambdaLR(optimizer, factor)


@dataclass
class Job:
    """One training: what changes from step to step, and how.

    Attributes:
        run: the attached model, not wrapped.
        optimizer: of its weights.
        rates: steers the optimizer; made before it joined the run.
        loss: ``(model, batch) -> scalar``.
        steps: in all.
        clip: largest norm of the gradient, if any.
        drops: whether a step may leave parameters out, as LayerDrop does.
    """

    run: Run
    optimizer: Optimizer
    rates: LRScheduler
    loss: Callable[[nn.Module, Any], Tensor]
    steps: int
    clip: float | None = None
    drops: bool = False

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint holds."""
        return {
            "model": self.run.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rates": self.rates.state_dict(),
            "run": self.run.state_dict(),
        }

    def resume(self, path: Path, device: torch.device) -> None:
        """Take up a checkpoint, if there is one."""
        if path.exists():
            state = torch.load(path, map_location=device, weights_only=True)
            self.run.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.rates.load_state_dict(state["rates"])
            self.run.load_state_dict(state["run"])


class Step(nn.Module):
    """Loss and penalty in one ``forward``: DDP then sees every use of a parameter."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model = job.run.model
        self.job = job

    def forward(self, batch: Any) -> Tensor:  # noqa: ANN401 - nested as data sets please
        """The whole loss of a batch, a scalar."""
        kind = next(self.model.parameters()).device.type
        with torch.autocast(kind, torch.bfloat16, kind == "cuda"):
            loss = self.job.loss(self.model, batch)
        return loss.float() + self.job.run.penalty()


def train(
    job: Job, data: Dataset[Any], order: Order, world: World, options: argparse.Namespace
) -> bool:
    """Train to the end, or to ``--stop``; resumes from the folder. Returns whether it is done."""
    options.out.mkdir(parents=True, exist_ok=True)
    saved = options.out / "checkpoint.pt"
    job.resume(saved, world.device)
    step: nn.Module = Step(job).train()
    if world.size > 1:
        places = [world.device] if world.device.type == "cuda" else None
        step = DistributedDataParallel(step, device_ids=places, find_unused_parameters=job.drops)
    until = min(job.steps, options.stop or job.steps)
    order.first, order.last = job.run.done, until
    workers = 0 if options.tiny else 8
    for batch in DataLoader(data, batch_sampler=order, num_workers=workers):
        torch.manual_seed(options.seed + job.run.done * world.size + world.rank)  # dropout
        job.optimizer.zero_grad()
        loss = step(moved(batch, world.device))
        loss.backward()
        if job.clip is not None:
            nn.utils.clip_grad_norm_(job.run.model.parameters(), job.clip)
        job.optimizer.step()
        job.rates.step()
        job.run.step()
        if job.run.done % 100 == 0 or job.run.done == until:
            world.say(f"step {job.run.done} of {job.steps}: loss {float(loss.detach()):.4f}")
        if job.run.done % options.every == 0 or job.run.done == until:
            _save(job, saved, world)
    return job.run.done == job.steps


def _save(job: Job, path: Path, world: World) -> None:
    if world.is_first:
        new = path.with_suffix(".new")
        torch.save(job.state(), new)
        new.replace(path)
    world.wait()


def moved(batch: Any, device: torch.device) -> Any:  # noqa: ANN401 - nested as data sets please
    """A batch of tensors on a device."""
    if isinstance(batch, dict):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(moved(value, device) for value in batch)
    return batch.to(device)


def ship(
    run: Run,
    empty: nn.Module,
    evaluate: Callable[[nn.Module], float],
    world: World,
    options: argparse.Namespace,
    loader: Iterable[Any] | None = None,
) -> None:
    """Finish, write ``model.dither``, load it into an empty model, and evaluate that.

    Args:
        run: trained.
        empty: a model of the same architecture.
        evaluate: the score, over all processes.
        world: of this process.
        options: the command line.
        loader: batches for batch norm's statistics.
    """
    path = options.out / "model.dither"
    run.finish(loader)
    if world.is_first:
        run.save(path)
    world.wait()
    dither.load_into(empty, path)
    score = evaluate(empty.to(world.device).eval())
    nbytes = path.stat().st_size
    world.say(f"{nbytes:,} bytes ({nbytes / 2**20:.2f} MiB), score {score:.2f}: {path}")
