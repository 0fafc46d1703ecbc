"""Tables of transformers' models: rows of tokens are counted, and positions only where they show.

Tables of positions are subclasses of Embedding that are called with a mask, a shape or tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.calibrate import collect
from dither.search import Trial

transformers = pytest.importorskip("transformers", reason="NEEDS transformers: install dither[hf]")

LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "vocab_size": 60,
}
OPT = {**LAYERS, "vocab_size": 60, "ffn_dim": 48, "word_embed_proj_dim": 32}
WHISPER = {
    **SEQ2SEQ,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
GPT2 = {"vocab_size": 60, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}

IDS = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(4, 9, dtype=torch.long)
MASK[0, 5:] = 0
PADDED = IDS.masked_fill(MASK == 0, 1)
TEXT = {"input_ids": PADDED, "attention_mask": MASK}
PAIR = {**TEXT, "decoder_input_ids": IDS[:, :7]}
SOUND = {"input_features": torch.randn(4, 8, 20), "decoder_input_ids": IDS[:, :7]}
SHOWN, TARGET = PADDED[MASK == 1], IDS[:, :7].flatten()

# Model, config, batch; the ids that are read from tables of tokens; how many tables of positions
# are read by torch's own forward.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Tensor], Tensor, int]] = {
    "opt": ("OPT", {**OPT, "max_position_embeddings": 32}, TEXT, SHOWN, 0),
    "gpt2": ("GPT2", {**GPT2, **ENDS}, TEXT, SHOWN, 1),
    "bert": ("Bert", {**LAYERS, "vocab_size": 60, "intermediate_size": 48}, TEXT, SHOWN, 2),
    "bart": ("Bart", SEQ2SEQ, PAIR, torch.cat([SHOWN, TARGET]), 0),
    "mbart": ("MBart", SEQ2SEQ, PAIR, torch.cat([SHOWN, TARGET]), 0),
    "whisper": ("Whisper", WHISPER, SOUND, TARGET, 1),
    "biogpt": ("BioGpt", {**LAYERS, "vocab_size": 60, "intermediate_size": 48}, TEXT, SHOWN, 0),
}


def build(name: str) -> nn.Module:
    kind, options, *_ = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    model: nn.Module = getattr(transformers, f"{kind}Model")(config)
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_rows_of_tokens_are_counted_and_no_others(name: str) -> None:
    *_, batch, read, others = CASES[name]
    counts = {n: s.counts for n, s in collect(build(name), [batch]).items() if s.counts is not None}
    wanted = torch.bincount(read, minlength=60)
    tables = [n for n, found in counts.items() if len(found) == 60]
    assert len(tables) == 1
    assert torch.equal(counts[tables[0]], wanted)
    assert len(counts) == 1 + others


@pytest.mark.parametrize("name", ["opt", "bart", "whisper"])
def test_their_models_are_compressed_with_data(name: str) -> None:
    archive = dither.compress(build(name), "6x", data=[CASES[name][2]])
    trials = [trial for trial in archive.trials if isinstance(trial, Trial)]
    assert not any(trial.error for trial in trials)
