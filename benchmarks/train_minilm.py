"""all-MiniLM-L6-v2 distilled from its own outputs to a budget, on sentences without labels.

``python -m benchmarks.train_minilm --budgets 4930000 2670000 --split test``

The sentences are those of SST-2 and of STS-B's training part; no score is read. Every run saves its
state as it goes and takes up where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import dither
from benchmarks.environment import describe
from benchmarks.tasks import data_path, minilm_stsb
from dither.search import token_counts

TABLE = "embeddings.word_embeddings.weight"
TOKENS = 768
STS_SHARE = 0.6
MAX_TOKENS = 128
LEAST_TOKENS = 5
RATE, VECTOR_RATE, STEP_RATE = 2.5e-4, 1e-4, 7e-3
WARM_STEPS = 20
START = {4_930_000: 4_930_000, 2_670_000: 4_000_000}
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


def train(budget: int, seed: int, steps: int, folder: Path) -> tuple[Path, dict[str, Any]]:
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
    run = dither.attach(model, budget=goal, steps=steps, noise=seed)
    vectors = [p for n, p in model.named_parameters() if n in run.surrogates and p.ndim < 2]
    tables = [p for n, p in model.named_parameters() if n in run.surrogates and p.ndim > 1]
    groups = [{"params": tables, "lr": RATE}, {"params": vectors, "lr": VECTOR_RATE}]
    groups.append({"params": run.extras.parameters(), "lr": STEP_RATE})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-10, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    saved = folder / f"minilm-{budget}-{seed}.pt"
    seconds = 0.0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        run.load_state_dict(state["run"])
        seconds = state["seconds"]
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
            weight = run.controller.weight if run.controller else 0.0
            print(
                f"step {run.done}/{steps}  loss {np.mean(losses[-50:]):.4f}  predicted "
                f"{run.predicted_nbytes():.0f} B  lambda {weight:.4f}  "
                f"{time.monotonic() - begun:.0f} s",
                flush=True,
            )
        if run.done % _SAVE_EVERY == 0 or run.done == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"run": run.state_dict(), "seconds": time.monotonic() - begun}
            torch.save(state, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)
    before = run.measure()
    run.finish()
    path = folder / f"minilm-{budget}-{seed}.dither"
    nbytes = run.save(path)
    trim = max(surrogate.trim for surrogate in run.surrogates.values())
    row = {"budget": budget, "seed": seed, "steps": steps, "bytes": nbytes, "untrimmed": before}
    return path, row | {"trim_octaves": trim, "seconds": round(time.monotonic() - begun)}


def score(path: Path, split: str) -> float:
    """Spearman's correlation of a file, times 100, loaded in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.data_free", "--score", str(path)]
    command += ["--tasks", "minilm_stsb", "--split", split]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", type=int, nargs="+", default=[4_930_000, 2_670_000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--split", choices=["dev", "test"], default="dev")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=Path("out/train_minilm"))
    parser.add_argument("--output", type=Path, help="results file (JSON)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    output = options.output or Path(f"benchmarks/results/train_minilm_{options.split}.json")
    result = json.loads(output.read_text()) if output.exists() else {"rows": []}
    known = {(row["budget"], row["seed"], row["steps"]) for row in result["rows"]}
    for budget in options.budgets:
        for seed in options.seeds:
            if (budget, seed, options.steps) in known:
                continue
            path, row = train(budget, seed, options.steps, options.folder)
            row |= {"split": options.split, "spearman": score(path, options.split)}
            print(row, flush=True)
            result = {"environment": describe(), "rows": [*result["rows"], row]}
            output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
