"""all-MiniLM-L6-v2 fine-tuned on SST-2: the score is accuracy in percent on labelled sentences.

The vocabulary is cut to the word pieces that occur in the task's data, so that the model has
14.9 M parameters rather than 22.7 M. Sentences are cut at 32 word pieces.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from . import data_path
from .minilm_stsb import model_folder

__all__ = ["Classifier", "batches", "evaluate", "load", "loss_of"]

ROWS, STEPS, RATE = 16, 60, 1e-4
"""Of training that goes on from the fine-tuned model: sentences in a batch, steps, Adam's rate."""
_LENGTH = 32
_FILES = {"train": "train", "dev": "dev", "test": "test-labeled"}
Batch = tuple[Tensor, Tensor, Tensor]


class Classifier(nn.Module):
    """Ids and mask ``(rows, length)`` to logits ``(rows, 2)``, by the mean of the last states."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertModel  # slow to import, and only needed here

        self.bert = BertModel.from_pretrained(
            str(model_folder()), dtype=torch.float32, add_pooling_layer=False
        )
        table = self.bert.embeddings.word_embeddings.weight.detach()[_pieces()]
        self.bert.embeddings.word_embeddings = nn.Embedding.from_pretrained(
            table.clone(), freeze=False, padding_idx=0
        )
        self.head = nn.Linear(table.shape[1], 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(2).to(hidden.dtype)
        logits: Tensor = self.head((hidden * weight).sum(1) / weight.sum(1))
        return logits


def load(weights: Path) -> nn.Module:
    """The classifier of fine-tuned weights, as ``torch.save`` wrote its state, to evaluate."""
    model = Classifier()
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


@cache
def _split(name: str) -> tuple[list[list[int]], Tensor]:
    from tokenizers import Tokenizer

    rows = data_path(f"sst2/{_FILES[name]}.tsv").read_text(encoding="utf-8").splitlines()[1:]
    sentences, labels = zip(*(row.rsplit("\t", 1) for row in rows), strict=True)
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(_LENGTH)
    return [e.ids for e in tokenizer.encode_batch(list(sentences))], torch.tensor(
        [int(label) for label in labels]
    )


@cache
def _pieces() -> Tensor:
    """Ids of the word pieces that occur, in order; padding stays 0."""
    found = {i for name in _FILES for sentence in _split(name)[0] for i in sentence}
    return torch.tensor(sorted(found | {0}))


def _pad(sentences: list[list[int]]) -> tuple[Tensor, Tensor]:
    length = max(map(len, sentences))
    ids = torch.tensor([s + [0] * (length - len(s)) for s in sentences])
    return torch.searchsorted(_pieces(), ids), (ids != 0).long()


def batches(rows: int, seed: int) -> Iterator[Batch]:
    """Ids, mask and labels of random training sentences for ever."""
    sentences, labels = _split("train")
    generator = torch.Generator().manual_seed(seed)
    while True:
        for some in torch.randperm(len(labels), generator=generator).split(rows):
            yield *_pad([sentences[i] for i in some.tolist()]), labels[some]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats."""
    return nn.functional.cross_entropy(model(*batch[:2]), batch[2])


@torch.no_grad()
def evaluate(model: nn.Module, split: str) -> float:
    """Accuracy in percent on ``"dev"`` (872) or ``"test"`` (1,821); call ``model.eval()`` first."""
    sentences, labels = _split(split)
    order = sorted(range(len(labels)), key=lambda i: len(sentences[i]))
    right = 0
    for start in range(0, len(order), 64):
        some = order[start : start + 64]
        found = model(*_pad([sentences[i] for i in some])).argmax(1)
        right += int((found == labels[some]).sum())
    return 100 * right / len(order)
