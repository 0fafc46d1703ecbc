"""all-MiniLM-L6-v2 distilled from its own outputs to a budget, on sentences without labels.

``python -m benchmarks.train_minilm --split test``

The sentences are those of SST-2 and of STS-B's training part; no score is read. Every run saves its
state as it goes and takes up where it was stopped.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import dither
from benchmarks.tasks import data_path, minilm_stsb
from benchmarks.training import Planned, by_default, keep, main, report, take_up, write_file
from dither.search import token_counts

TABLE = "embeddings.word_embeddings.weight"
TOKENS = 768
STS_SHARE = 0.6
MAX_TOKENS = 128
LEAST_TOKENS = 5
RATES = {4_930_000: 1.5e-4, 2_670_000: 2.5e-4}
"""Learning rates of matrices for budgets; the finer, the less there is to mend."""
VECTOR_RATE, STEP_RATE = 1e-4, 7e-3
WARM_STEPS = 20
START = {4_930_000: 5_750_000, 2_670_000: 4_000_000}
"""Where training to a budget begins, in bytes; other budgets begin at themselves."""
_SAVE_EVERY = 200


class Sentences:
    """Batches of token ids ``(sentences, tokens)`` without padding, all of one length.

    A batch depends on nothing but the seed and its number.
    """

    def __init__(self, seed: int) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(minilm_stsb.model_folder() / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(MAX_TOKENS)
        rows = data_path("stsb/sts-train.csv").read_text(encoding="utf-8").splitlines()
        pairs = sorted({part.strip() for row in rows for part in row.split("\t")[5:7]})
        rows = data_path("sst2/train.tsv").read_text(encoding="utf-8").splitlines()[1:]
        phrases = sorted({row.split("\t")[0].strip() for row in rows})
        sources = [[e.ids for e in tokenizer.encode_batch(texts)] for texts in (pairs, phrases)]
        sources[1] = [ids for ids in sources[1] if len(ids) >= LEAST_TOKENS]
        self._sources = [_by_length(source) for source in sources]
        self._seed = seed
        self.counts = torch.zeros(30522, dtype=torch.float64)
        total = sum(len(ids) for source in sources for ids in source)
        for source, share in zip(sources, (STS_SHARE, 1 - STS_SHARE), strict=True):
            flat = torch.tensor([i for ids in source for i in ids])
            counts = torch.bincount(flat, minlength=len(self.counts)).double()
            self.counts += counts * share * total / len(flat)

    def __getitem__(self, number: int) -> Tensor:
        """The batch of a step."""
        random = np.random.default_rng([self._seed, number])
        lengths, tables, shares = self._sources[int(random.random() >= STS_SHARE)]
        table = tables[int(random.choice(len(lengths), p=shares))]
        count = min(max(4, TOKENS // table.shape[1]), len(table))
        return torch.from_numpy(table[random.choice(len(table), count, replace=False)])


def _by_length(source: list[list[int]]) -> tuple[list[int], list[Any], Any]:
    found: dict[int, list[list[int]]] = {}
    for ids in source:
        found.setdefault(len(ids), []).append(ids)
    tables = {length: np.array(ids) for length, ids in found.items() if len(ids) >= 8}
    tokens = np.array([length * len(table) for length, table in tables.items()], float)
    return list(tables), list(tables.values()), tokens / tokens.sum()


def distillation(student: nn.Module, teacher: nn.Module, ids: Tensor) -> Tensor:
    """Cosine distance of the sentence embeddings, and relative errors of all hidden states."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            goals = teacher(input_ids=ids, output_hidden_states=True).hidden_states
        states = student(input_ids=ids, output_hidden_states=True).hidden_states
    own, goal = (functional.normalize(h[-1].float().mean(1), dim=1) for h in (states, goals))
    distance = (1 - (own * goal).sum(1)).mean()
    errors = [
        functional.mse_loss(state.float(), goal.float()) / goal.float().var()
        for state, goal in zip(states[1:], goals[1:], strict=True)
    ]
    return distance + torch.stack(errors).mean()


def share_at(step: int, steps: int) -> float:
    """Share of the learning rates: a short rise, flat for half the steps, then down to 0."""
    return min(1.0, (step + 1) / WARM_STEPS, 2 * (1 - step / steps))


def train(
    budget: int, seed: int, steps: int, folder: Path, planned: Planned = by_default
) -> tuple[Path, dict[str, Any]]:
    """Train to a budget and save the file; resumes from the folder."""
    sentences = Sentences(seed)
    torch.manual_seed(seed)
    teacher = minilm_stsb.load()
    model = copy.deepcopy(teacher)
    goal = dither.Budget(
        budget,
        start=START.get(budget),
        sensitivity=token_counts({TABLE: sentences.counts}),
    )
    run = dither.attach(model, planned(model), budget=goal, steps=steps, noise=seed)
    vectors = [p for n, p in model.named_parameters() if n in run.surrogates and p.ndim < 2]
    tables = [p for n, p in model.named_parameters() if n in run.surrogates and p.ndim > 1]
    groups = [
        {"params": tables, "lr": RATES.get(budget, 2e-4)},
        {"params": vectors, "lr": VECTOR_RATE},
    ]
    groups.append({"params": run.extras.parameters(), "lr": STEP_RATE})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-10, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    saved = folder / f"minilm-{budget}-{seed}.pt"
    seconds = take_up(saved, model, optimizer, run)
    begun, losses = time.monotonic() - seconds, []
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for step in range(run.done, steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share_at(step, steps)
        loss = distillation(model, teacher, sentences[step])
        (loss + run.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()
        losses.append(float(loss.detach()))
        if run.done % 50 == 0:
            report(run, float(np.mean(losses[-50:])), time.monotonic() - begun)
        if run.done % _SAVE_EVERY == 0 or run.done == steps:
            keep(saved, model, optimizer, run, time.monotonic() - begun)
    before = run.measure()
    run.finish()
    path = saved.with_suffix(".dither")
    row = write_file(run, path, before)
    return path, row | {"seconds": round(time.monotonic() - begun)}


if __name__ == "__main__":
    main(__doc__, "minilm_stsb", train, [4_930_000, 2_670_000], 1600)
