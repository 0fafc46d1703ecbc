"""A static table of token embeddings (WordLlama, 32,000 x 256) on STS-Benchmark's test part.

A sentence is the mean of its tokens' rows; the score is 100 x Spearman's correlation of cosines
with what people said. 512 sentences of the training part are the samples.
"""

from functools import cache
from itertools import groupby

import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.tasks import data_path
from benchmarks.zoo_models.packages import packaged
from dither import Data

SCORE, LESS = "STS-B, 100 x Spearman", False
_SAMPLED = 512


class MeanOfTokens(nn.Module):
    """Token numbers ``(rows, tokens)`` to the mean of their embeddings, of length 1."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, columns)

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.normalize(self.embedding(tokens).mean(1), dim=-1)


def load() -> nn.Module:
    """The table in float32; the package has it in float16."""
    (table,) = load_file(packaged("wordllama", "weights/l2_supercat_256.safetensors")).values()
    model = MeanOfTokens(*table.shape)
    model.load_state_dict({"embedding.weight": table.float()})
    return model.eval()


def evaluate(model: nn.Module) -> float:
    """Spearman's correlation."""
    rows = _rows("test")
    with torch.no_grad():
        a, b = (
            torch.cat([model(torch.tensor([_tokens(row[side])])) for row in rows])
            for side in (1, 2)
        )
    labels = [float(row[0]) for row in rows]
    return 100 * float(spearmanr((a * b).sum(-1).numpy(), labels).statistic)


def samples() -> Data:
    """Sentences of the training part, in batches of one length."""
    tokens = sorted((_tokens(row[1]) for row in _rows("train")[:_SAMPLED]), key=len)
    groups = [list(group) for _, group in groupby(tokens, key=len)]
    return Data([torch.tensor(group) for group in groups])


def _rows(split: str) -> list[tuple[str, str, str]]:
    lines = data_path(f"stsb/sts-{split}.csv").read_text(encoding="utf-8").splitlines()
    cells = [line.split("\t") for line in lines]
    return [(row[4], row[5], row[6]) for row in cells]


@cache
def _tokenizer() -> Tokenizer:
    path = packaged("wordllama", "tokenizers/l2_supercat_tokenizer_config.json")
    return Tokenizer.from_file(str(path))


def _tokens(text: str) -> list[int]:
    found: list[int] = _tokenizer().encode(text, add_special_tokens=False).ids
    return found
