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


def train(kind: str, method: str, way: str, path: str) -> dict[str, Any]:
    """Train on this rank's share of the batch, finish and save; `way` is ddp, fsdp or one."""
    model, inputs = build(kind)
    run = attach(model, dict.fromkeys(weights_of(model), METHODS[method]))
    # Its weights themselves do not train, so that they get no gradient.
    wrapped = _wrap(model, way, find_unused=method == "learned_codebook")
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
    results = {}
    for way in ("ddp", "fsdp"):
        for kind, method in CASES:
            if way == "fsdp" and kind == "tied":
                continue  # two units cannot share a parameter: a limit of FSDP2
            path = f"{folder}/{way}-{kind}-{method}.dither"
            results[way, kind, method] = train(kind, method, way, path)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
