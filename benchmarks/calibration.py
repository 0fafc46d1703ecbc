"""Training samples without labels; imports nothing of dither, so that peers can use it, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.tasks import data_path, minilm_stsb, resnet20_cifar10

SAMPLES = 500


def samples(task: str) -> list[Any]:
    """Batches of 500 training samples in all, without labels; sentences by length."""
    if task == "resnet20_cifar10":
        batches = resnet20_cifar10.Batches(100, seed=0)
        return [batches[number][0] for number in range(SAMPLES // 100)]
    from tokenizers import Tokenizer

    lines = data_path("stsb/sts-train.csv").read_text(encoding="utf-8").splitlines()
    sentences = sorted({line.split("\t")[5].strip() for line in lines})
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0))
    tokenizer = Tokenizer.from_file(str(minilm_stsb.model_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    rows = tokenizer.encode_batch([sentences[i] for i in order[:SAMPLES].tolist()])
    ids = sorted((row.ids for row in rows), key=len)
    found = []
    for start in range(0, SAMPLES, 20):
        some = [torch.tensor(row) for row in ids[start : start + 20]]
        padded = nn.utils.rnn.pad_sequence(some, batch_first=True)
        found.append({"input_ids": padded, "attention_mask": (padded != 0).long()})
    return found
