"""One rank of a distributed run: trains small attached models and writes what came out."""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dither import LSQ, Affine, Run, attach
from tests.train.layers import EXAMPLES, Spec, build, weights_of

KINDS = ("linear", "encoder", "tied", "lstm")
METHODS: dict[str, Spec] = {
    "plain": Affine(4),
    "unbounded": LSQ(bits=None),
    **{name: specs[0] for name, specs in EXAMPLES.items() if specs},
}
CASES = [(kind, "lsq") for kind in KINDS] + [("linear", name) for name in METHODS if name != "lsq"]
STEPS = 3
NORM_STEPS = 21


def train(kind: str, method: str, way: str, path: str) -> dict[str, Any]:
    """Train on this rank's share of the batch, finish and save; `way` is ddp, fsdp or one."""
    model, inputs = build(kind)
    run = attach(model, dict.fromkeys(weights_of(model), METHODS[method]))
    # Their weights themselves do not train, so that they get no gradient.
    wrapped = _wrap(model, way, find_unused=method in {"learned_codebook", "learned_factors"})
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    run.join(optimizer)
    batch = inputs[: len(inputs) // 2 * 2]
    mine = batch if way == "one" else batch.chunk(2)[dist.get_rank()]
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = wrapped.train()(mine).square().mean() + 1e-5 * run.penalty()
        loss.backward()
        optimizer.step()
        run.step()
    with torch.no_grad():
        preview = wrapped.eval()(inputs)
    return {**_finished(run, wrapped, inputs, path), "preview": preview}


def train_norms(way: str, path: str) -> dict[str, Any]:
    """The same of a network with batch norm, to a budget; ranks see batches of other spreads."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)
    )
    run = attach(model, budget=2200, steps=NORM_STEPS)
    wrapped = _wrap(model, way, find_unused=False)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    run.join(optimizer)
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    images = [(1 + 2 * rank) * torch.randn(8, 3, 8, 8, generator=generator) for _ in range(4)]
    for step in range(NORM_STEPS):
        optimizer.zero_grad()
        (wrapped.train()(images[step % 4]).square().mean() + run.penalty()).backward()
        optimizer.step()
        run.step()
    assert run.controller is not None
    state = {"history": run.history, "controller": run.controller.state_dict()}
    run.finish()
    plainly = {name: e.decode() for name, e in run.encode().items()}
    nbytes = run.finish(images)
    outputs = wrapped.eval()(images[0] if rank == 0 else torch.ones_like(images[0])).detach()
    found = {name: e.decode() for name, e in run.encode().items()}
    if rank == 0:
        run.save(path)
    return {"nbytes": nbytes, "state": state, "plainly": plainly, "encoded": found} | {
        "seen": [norm.clone() for norm in model[1].buffers()],
        "outputs": outputs,
    }


def _wrap(model: nn.Module, way: str, *, find_unused: bool) -> nn.Module:
    if way == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=find_unused)
    if way == "fsdp":
        for child in model.children():
            if next(child.parameters(), None) is not None and not hasattr(child, "out_proj"):
                fully_shard(child)
        fully_shard(model)
    return model


def _finished(run: Run, wrapped: nn.Module, inputs: Tensor, path: str) -> dict[str, Any]:
    nbytes = run.finish()
    with torch.no_grad():
        out = wrapped.eval()(inputs)
    if not dist.is_initialized() or dist.get_rank() == 0:
        run.save(path)
    encoded = {name: e.decode() for name, e in run.encode().items()}
    return {"nbytes": nbytes, "outputs": out, "encoded": encoded}


def main(rank: int, folder: str) -> None:
    """All cases, both ways."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results: dict[Any, dict[str, Any]] = {}
    for way in ("ddp", "fsdp"):
        for kind, method in CASES:
            if way == "fsdp" and kind == "tied":
                continue  # two units cannot share a parameter: a limit of FSDP2
            path = f"{folder}/{way}-{kind}-{method}.dither"
            results[way, kind, method] = train(kind, method, way, path)
        results["norms", way] = train_norms(way, f"{folder}/{way}-norms.dither")
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
