"""Does Quant-Noise beat quantization-aware and post-training quantization, as published?

``python -m benchmarks.ordering`` trains a small language model on Penn Treebank, and fine-tunes
MiniLM on SST-2, three seeds each. For each seed one plain model is trained; from there every row
goes on for the same number of steps, plainly or with one kind of noise, while the learning rate
falls. Then int4 rows are evaluated, and iPQ rows go through three stages (feed-forward, embeddings,
attention) with the same further steps. So noise is here what the paper calls fine-tuning with
Quant-Noise; the fp32 row has as many steps as the int4 rows.

Every result is saved at once, and found again when the program is started anew. Training needs one
thread. Models are kept in ``--work``, which may be deleted.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import describe
from benchmarks.tasks import lm_ptb, minilm_sst2
from dither.formats import Affine, Product
from dither.train import Method, Plan, Run, attach
from dither.train.ipq import IterativePQ, ProductCodes
from dither.train.quant_noise import QuantNoise
from dither.train.straight_through import StraightThrough

RESULTS = Path(__file__).parent / "results" / "ordering.json"
SEEDS = 3
INT4, INT4_P, PRODUCT_P = Affine(4), 0.5, 0.1
CENTROID_LR = 1e-3
REFRESH = 50


@dataclass(frozen=True)
class Task:
    """What is trained, for how long, and how it is scored.

    Attributes:
        steps: of the shared training, of each row after it, and of each iPQ stage.
        rates: learning rates of Adam in these three.
        blocks: glob -> block of the Product.
    """

    build: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    score: Callable[[nn.Module], float]
    metric: str
    steps: tuple[int, int, int]
    rates: tuple[float, float, float]
    blocks: Mapping[str, int]


TASKS = {
    "ptb": Task(
        lm_ptb.LanguageModel,
        lambda seed: lm_ptb.windows(lm_ptb.ROWS, seed),
        lm_ptb.loss_of,
        lambda model: lm_ptb.evaluate(model, "test"),
        "test perplexity",
        (1000, lm_ptb.STEPS, 50),
        (3e-3, lm_ptb.RATE, 5e-4),
        {"*proj.weight": 4, "*fc?.weight": 8, "embedding.weight": 8, "output.weight": 8},
    ),
    "sst2": Task(
        minilm_sst2.Classifier,
        lambda seed: minilm_sst2.batches(minilm_sst2.ROWS, seed),
        minilm_sst2.loss_of,
        lambda model: minilm_sst2.evaluate(model, "test"),
        "test accuracy, %",
        (150, minilm_sst2.STEPS, 20),
        (1e-4, minilm_sst2.RATE, 5e-5),
        {
            "*LayerNorm*": 0,
            "*embeddings.weight": 8,
            "*attention*.weight": 4,
            "*dense.weight": 8,
        },
    ),
}

# Row: how weights are trained, given the block of a Product or 0 for int4; None is plainly.
Noise = Callable[[int], Method] | None
INT4_NOISE: dict[str, Noise] = {
    "int4, after training": None,
    "int4, QAT": lambda _: StraightThrough(INT4),
    "int4, Quant-Noise": lambda _: QuantNoise(INT4, INT4_P),
}
PRODUCT_NOISE: dict[str, Noise] = {
    "iPQ, plainly trained": None,
    "iPQ, QAT": lambda block: StraightThrough(Product(block), refresh=REFRESH),
    "iPQ, Quant-Noise (proxy)": lambda block: QuantNoise(Product(block), PRODUCT_P, kind="proxy"),
    "iPQ, Quant-Noise (exact)": lambda block: QuantNoise(
        Product(block), PRODUCT_P, refresh=REFRESH
    ),
}
ROWS = ["fp32", *INT4_NOISE, *PRODUCT_NOISE]


def train(task: Task, model: nn.Module, run: Run | None, stage: int, seed: int) -> None:
    """Train for the steps of a stage; the learning rate warms up, or falls along a cosine."""
    steps = task.steps[stage] * (3 if stage == 2 else 1)
    optimizer = torch.optim.Adam(model.parameters(), task.rates[stage])
    if run is not None:
        run.join(optimizer)
    first = [group["lr"] for group in optimizer.param_groups]
    data = task.batches(1000 * seed + stage)
    model.train()
    for step in range(steps):
        share = min(1.0, (step + 1) / 100)
        if stage:
            share = (1 + math.cos(math.pi * step / steps)) / 2
        for group, rate in zip(optimizer.param_groups, first, strict=True):
            group["lr"] = rate * share
        loss = task.loss(model, next(data))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if run is not None:
            run.step()
    model.eval()


def plan_of(task: Task, make: Callable[[int], Any]) -> Plan:
    """A plan for the task's matrices; a block of 0 leaves tensors raw."""
    some = {glob: block for glob, block in task.blocks.items() if block}
    raw = {glob: Affine(16) for glob, block in task.blocks.items() if not block}
    return Plan({**raw, **{glob: make(block) for glob, block in some.items()}})


def branch(task: Task, noise: Noise, seed: int, work: Path, name: str) -> nn.Module:
    """The model of a row after training with its noise, before iPQ: trained, or found."""
    torch.manual_seed(seed)
    model = task.build()
    path = work / f"{name}.pt"
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    base = work / "base.pt"
    if not base.is_file():
        train(task, model, None, 0, seed)
        torch.save(model.state_dict(), base)
    model.load_state_dict(torch.load(base, weights_only=True))
    torch.manual_seed(seed)
    run = None
    if noise is not None:
        run = attach(model, plan_of(task, noise), steps=task.steps[1], noise=seed)
    train(task, model, run, 1, seed)
    if run is not None:
        run.detach(commit=False)
    torch.save(model.state_dict(), path)
    return model


def result(task: Task, row: str, seed: int, work: Path) -> dict[str, Any]:
    """Train and score one row."""
    start = time.process_time()
    if row == "fp32":
        model = branch(task, None, seed, work, "plain").eval()
        nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
        return {"score": task.score(model), "nbytes": nbytes, "cpu_s": time.process_time() - start}
    is_product = row in PRODUCT_NOISE
    noise = PRODUCT_NOISE[row] if is_product else INT4_NOISE[row]
    kept = "plain" if noise is None else row.translate(str.maketrans(" ,()", "____"))
    model = branch(task, noise, seed, work, kept)
    if not is_product:
        run = attach(model, plan_of(task, lambda _: INT4))
    else:
        run = attach(
            model,
            plan_of(
                task,
                lambda block: ProductCodes(Product(block), noise and noise(block), lr=CENTROID_LR),
            ),
            steps=3 * task.steps[2],
            schedules=[IterativePQ(task.steps[2])],
            noise=seed,
        )
        torch.manual_seed(seed)
        train(task, model, run, 2, seed)
    nbytes = run.finish()
    model.eval()
    return {"score": task.score(model), "nbytes": nbytes, "cpu_s": time.process_time() - start}


def table(found: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, as markdown."""
    lines = ["| task | row | bytes | score | seeds |", "| --- | --- | --- | --- | --- |"]
    for name, task in TASKS.items():
        for row in ROWS:
            rows = [r for r in found if (r["task"], r["row"]) == (name, row)]
            if not rows:
                continue
            scores = [r["score"] for r in rows]
            spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
            nbytes = round(statistics.mean(r["nbytes"] for r in rows))
            score = f"{statistics.mean(scores):.2f}{spread}"
            lines.append(
                f"| {name}, {task.metric} | {row} | {nbytes:,} | {score} | {len(scores)} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "ordering"))
    arguments = parser.parse_args()
    for name in arguments.tasks:
        path = arguments.json.with_stem(f"{arguments.json.stem}_{name}")
        found = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
        for seed in range(arguments.seeds):
            work = arguments.work / f"{name}-{seed}"
            work.mkdir(parents=True, exist_ok=True)
            for row in ROWS:
                key = {"task": name, "row": row, "seed": seed}
                if any(key.items() <= r.items() for r in found):
                    continue
                found.append(key | result(TASKS[name], row, seed, work))
                print(json.dumps(found[-1]), flush=True)
                path.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps(describe() | {"rows": found}, indent=1)
                path.write_text(text + "\n", encoding="utf-8")
                path.with_suffix(".md").write_text(table(found), encoding="utf-8")
        print(table(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
