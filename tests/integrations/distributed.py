"""One rank of a trainer's loop: what callbacks do, in a model that DDP wraps."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dither
from dither.integrations.loop import add_penalty, begin, withhold_extras

STEPS = 4


def train(share: slice, path: Path) -> None:
    """Train on a share of each batch; the file, and what surrogates learned, go to ``path``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    run = dither.attach(model, budget="1500", steps=STEPS)
    withheld = run.extras.parameters()
    withhold_extras(run)
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, weight_decay=0.1)
    begin(run, STEPS, withheld, [optimizer])
    inputs = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    for _ in range(STEPS):
        optimizer.zero_grad()
        wrapped.train()(inputs[share]).square().mean().backward()
        add_penalty(run)
        optimizer.step()
        run.step()
    state = {"extras": [p.detach() for p in withheld], "history": run.history}
    run.finish()
    torch.save(state | {"file": run.archive.to_bytes(), "state": dict(run.archive)}, path)


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    train(slice(4 * rank, 4 * rank + 4), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
