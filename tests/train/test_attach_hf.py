"""Hugging Face models: ties, saving, and the same outputs from the file."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dither import LSQ, Affine, attach, load_into
from dither.model import SHADOWS
from dither.testing import same_bits
from tests.train.layers import Spec

transformers = pytest.importorskip("transformers", reason="NEEDS transformers: install dither[hf]")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}


def build(kind: str, seed: int = 0) -> Any:  # noqa: ANN401 - of an optional package
    torch.manual_seed(seed)
    if kind == "bert":
        config = transformers.BertConfig(**SIZES, intermediate_size=32)
        return transformers.BertForSequenceClassification(config)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40)
        return transformers.GPT2LMHeadModel(config)
    if kind == "llama":
        config = transformers.LlamaConfig(**SIZES, intermediate_size=32, tie_word_embeddings=True)
        return transformers.LlamaForCausalLM(config)
    config = transformers.MixtralConfig(
        **SIZES, intermediate_size=32, num_local_experts=4, num_key_value_heads=2
    )
    return transformers.MixtralForCausalLM(config)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:  # noqa: ANN401 - the same
    tokens = torch.arange(12).reshape(2, 6)
    out: torch.Tensor = model.eval()(input_ids=tokens).logits
    return out


@pytest.mark.parametrize("spec", [LSQ(4), LSQ(bits=None), Affine(4)], ids=["4", "free", "plain"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "mixtral"])
def test_models_train_save_and_ship(kind: str, spec: Spec, tmp_path: Path) -> None:
    model = build(kind)
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p.ndim > 1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = attach(model, dict.fromkeys(names, spec), optimizer=optimizer)
    own = set(build(kind).state_dict())
    tokens = torch.arange(12).reshape(2, 6)
    for _ in range(2):
        labels = torch.tensor([0, 1]) if kind == "bert" else tokens
        loss = model.train()(input_ids=tokens, labels=labels).loss + 1e-6 * run.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()
    assert {n for n in model.state_dict() if SHADOWS not in n} == own
    run.finish()
    evaluated = logits(model)
    run.save(tmp_path / "model.dither")
    fresh = build(kind, seed=1)
    load_into(fresh, tmp_path / "model.dither")
    assert same_bits(logits(fresh), evaluated)
    model.save_pretrained(tmp_path)
    loaded = type(fresh).from_pretrained(tmp_path)
    assert type(loaded) is type(fresh)
    assert same_bits(logits(loaded), evaluated)
    if kind in {"gpt2", "llama"}:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert head.weight is embedding.weight
        model.tie_weights()
        assert same_bits(logits(model), evaluated)
    run.detach()
    model.save_pretrained(tmp_path / "plain")
    assert same_bits(logits(type(fresh).from_pretrained(tmp_path / "plain")), evaluated)
