"""A grapheme-to-phoneme model (g2p_en: two GRUs, 0.83 M parameters) on words of CMUdict.

The package computes with NumPy; here the same weights are in a torch module that writes the same
phonemes. The score is the phoneme error rate in percent: edits over phonemes of the dictionary, for
2,000 words drawn at random; 512 others are the samples, run with the model's own phonemes.
"""

from collections.abc import Iterator
from functools import cache
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.zoo_models.packages import packaged
from dither import Data
from dither.data import divergence

SCORE, LESS = "phoneme error rate, %", True

_LETTERS = ("<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz")
_SOUNDS = """
<pad> <unk> <s> </s> AA0 AA1 AA2 AE0 AE1 AE2 AH0 AH1 AH2 AO0 AO1 AO2 AW0 AW1 AW2 AY0 AY1 AY2 B CH D
DH EH0 EH1 EH2 ER0 ER1 ER2 EY0 EY1 EY2 F G HH IH0 IH1 IH2 IY0 IY1 IY2 JH K L M N NG OW0 OW1 OW2 OY0
OY1 OY2 P R S SH T TH UH0 UH1 UH2 UW UW0 UW1 UW2 V W Y Z ZH
"""
_PHONEMES = _SOUNDS.split()
_START, _END, _MOST = 2, 3, 20
_TESTED, _SAMPLED = 2000, 512


class GraphemesToPhonemes(nn.Module):
    """Letters ``(rows, letters)`` and phonemes so far ``(rows, phonemes)`` to the next's logits."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.enc_emb = nn.Embedding(len(_LETTERS), width)
        self.enc = nn.GRU(width, width, batch_first=True)
        self.dec_emb = nn.Embedding(len(_PHONEMES), width)
        self.dec = nn.GRU(width, width, batch_first=True)
        self.fc = nn.Linear(width, len(_PHONEMES))

    def forward(self, letters: Tensor, phonemes: Tensor) -> Tensor:
        _, state = self.enc(self.enc_emb(letters))
        out, _ = self.dec(self.dec_emb(phonemes), state)
        logits: Tensor = self.fc(out)
        return logits

    @torch.no_grad()
    def spell(self, letters: Tensor) -> list[list[int]]:
        """Phonemes of words of one length, each the likeliest after those before."""
        _, state = self.enc(self.enc_emb(letters))
        last = torch.full((len(letters), 1), _START)
        found = []
        for _ in range(_MOST):
            out, state = self.dec(self.dec_emb(last), state)
            last = self.fc(out).argmax(-1)
            found.append(last)
        rows = torch.cat(found, 1).tolist()
        return [row[: row.index(_END)] if _END in row else row for row in rows]


def load() -> nn.Module:
    """The model with the package's weights."""
    model = GraphemesToPhonemes()
    held = np.load(packaged("g2p_en", "checkpoint20.npz"))
    state = {}
    for side in ("enc", "dec"):
        state[f"{side}_emb.weight"] = held[f"{side}_emb"]
        for kind, name in (("w", "weight"), ("b", "bias")):
            for part in ("ih", "hh"):
                state[f"{side}.{name}_{part}_l0"] = held[f"{side}_{kind}_{part}"]
    state |= {"fc.weight": held["fc_w"], "fc.bias": held["fc_b"]}
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return model.eval()


def evaluate(model: nn.Module) -> float:
    """Phoneme error rate."""
    assert isinstance(model, GraphemesToPhonemes)
    wrong = total = 0
    for words in _batches(0, _TESTED):
        found = model.spell(torch.tensor([_numbers(word) for word, _ in words]))
        for got, (_, wanted) in zip(found, words, strict=True):
            wrong += edits([_PHONEMES[i] for i in got], wanted)
            total += len(wanted)
    return 100 * wrong / total


def samples() -> Data:
    """Other words, with the phonemes that the model itself writes."""
    model, batches = load(), []
    assert isinstance(model, GraphemesToPhonemes)
    for words in _batches(_TESTED, _TESTED + _SAMPLED):
        letters = torch.tensor([_numbers(word) for word, _ in words])
        said = model.spell(letters)
        shown = sorted(zip(said, letters, strict=True), key=lambda pair: len(pair[0]))
        for _, group in groupby(shown, key=lambda pair: len(pair[0])):
            rows = list(group)
            phonemes = torch.tensor([[_START, *row] for row, _ in rows])
            batches.append({"letters": torch.stack([b for _, b in rows]), "phonemes": phonemes})
    return Data(batches, distance=divergence)


def edits(got: list[str], wanted: list[str]) -> int:
    """Levenshtein's distance."""
    row = list(range(len(wanted) + 1))
    for i, a in enumerate(got, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(wanted, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def _batches(start: int, end: int) -> Iterator[list[tuple[str, list[str]]]]:
    """Some words of the shuffled dictionary, grouped by length: nothing is padded."""
    words = sorted(_words()[start:end], key=lambda word: len(word[0]))
    for _, group in groupby(words, key=lambda word: len(word[0])):
        yield list(group)


@cache
def _words() -> list[tuple[str, list[str]]]:
    text = packaged("cmudict", "data/cmudict.dict").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        word, *said = line.partition("#")[0].split()
        if word.isalpha() and word.isascii() and len(word) > 1:
            found.setdefault(word, said)
    rows = sorted(found.items())
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[i] for i in order[: _TESTED + _SAMPLED]]


def _numbers(word: str) -> list[int]:
    return [_LETTERS.index(letter) for letter in word] + [_LETTERS.index("</s>")]
