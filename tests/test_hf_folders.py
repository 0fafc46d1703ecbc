"""Hugging Face folders of every kind of head: in by the command line, and back by transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import dither
from dither.archive import Archive
from dither.cli import app
from dither.cli.data import data_of
from dither.cli.folders import folder_model
from dither.data import divergence, squared

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = [f"w{i}" for i in range(60)]
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 32, "vocab_size": 64, "max_position_embeddings": 64}
LLAMA = {**BERT, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0}
BART = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32}
BART |= {"decoder_ffn_dim": 32, "max_position_embeddings": 64}
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VIT |= {"intermediate_size": 32, "image_size": 16, "patch_size": 8}

HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "no head": ("Bert", BERT),
    "masked": ("BertForMaskedLM", BERT),
    "sequence": ("BertForSequenceClassification", {**BERT, "num_labels": 3}),
    "regression": ("BertForSequenceClassification", {**BERT, "num_labels": 1}),
    "token": ("BertForTokenClassification", {**BERT, "num_labels": 5}),
    "answers": ("BertForQuestionAnswering", BERT),
    "causal": ("LlamaForCausalLM", LLAMA),
    "tied causal": ("GPT2LMHeadModel", GPT2),
    "decoder's classifier": ("GPT2ForSequenceClassification", {**GPT2, "num_labels": 3}),
    "text to text": ("T5ForConditionalGeneration", T5),
    "bart": ("BartForConditionalGeneration", BART),
    "seq2seq without a head": ("T5", T5),
    "mixtral": ("MixtralForCausalLM", {**LLAMA, "num_local_experts": 3}),
}
"""Class and settings; ``T5`` and ``Bert`` stand for the models without a head."""


def build(name: str, settings: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    base = next(
        part
        for part in ("Qwen2Moe", "Mixtral", "Llama", "GPT2", "Bert", "Bart", "T5", "ViT")
        if name.startswith(part)
    )
    config = getattr(transformers, f"{base}Config")(**settings)
    kind = getattr(transformers, f"{name}Model" if name == base else name)
    model: nn.Module = kind(config).eval()
    return model


def write_tokenizer(folder: Path) -> None:
    words = {word: i for i, word in enumerate(["[UNK]", "[EOS]", "[X]", "[Y]", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))


def write_text(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(60, (24, 9), generator=generator).tolist()
    lines = [" ".join(WORDS[i] for i in row[: 6 + n % 3]) for n, row in enumerate(picks)]
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    yield tmp_path
    transformers.utils.logging.enable_progress_bar()


def run(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.stdout + result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("case", HEADS)
def test_text_for_a_folder_with_a_head(case: str, place: Path) -> None:
    model = build(*HEADS[case])
    model.save_pretrained(place / "m")  # type: ignore[operator]
    write_tokenizer(place / "m")
    write_text(place / "lines.txt")
    document = run("compress", "m", "--data", "lines.txt", "--size", "5x", "-o", "m.dither")
    assert document["nbytes"] <= document["original_nbytes"] / 5
    assert [trial["error"] for trial in document["trials"]] == [""] * len(document["trials"])
    assert {"calibrated", "calibrated, in sequence"} <= {t["stage"] for t in document["trials"]}
    assert all(trial["distance"] < 5 for trial in document["trials"])
    loaded = folder_model(place / "m")
    assert type(loaded) is type(model)
    assert dither.load_into(loaded, place / "m.dither").exact


@pytest.mark.parametrize("case", HEADS)
def test_scores_are_what_counts(case: str, place: Path) -> None:
    model = build(*HEADS[case])
    write_tokenizer(place)
    write_text(place / "lines.txt")
    data = data_of("lines.txt", place, model)
    is_score = case not in ("no head", "regression", "seq2seq without a head")
    assert data.distance is (divergence if is_score else squared)
    with torch.no_grad():
        output = data.forward(model, next(iter(data)))
    assert isinstance(output, list)
    assert len(output) == (2 if case == "answers" else 1)


RENAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": HEADS["mixtral"],
    "qwen": (
        "Qwen2MoeForCausalLM",
        {**LLAMA, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
        | {"num_experts": 4},
    ),
    "vit": ("ViTForImageClassification", VIT),
}


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("case", RENAMED)
def test_names_on_disk_are_not_the_models(case: str, wrap: bool, place: Path) -> None:
    """Out of the folder, and back into a folder or a model, with the same outputs."""
    model = build(*RENAMED[case])
    model.save_pretrained(place / "m")  # type: ignore[operator]
    run("compress", "m", "--size", "4x", "-o", "m.dither")
    with Archive.open("m.dither") as archive:
        assert set(archive) != set(model.state_dict())
    run("decompress", "m.dither", "-o", "back/model.safetensors")
    shutil.copy(place / "m" / "config.json", place / "back")
    back = type(model).from_pretrained(place / "back").eval()  # type: ignore[attr-defined]
    into = type(model)(model.config).eval()
    found = dither.load_into(nn.DataParallel(into) if wrap else into, place / "m.dither")
    assert found.exact
    size = (2, 3, 16, 16)
    sample = torch.randn(size) if case == "vit" else torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        ours, theirs, before = (m(sample).logits for m in (into, back, model))
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, before)


def test_what_transformers_cannot_convert_either(place: Path) -> None:
    model = build(*RENAMED["mixtral"])
    model.save_pretrained(place / "m")  # type: ignore[operator]
    archive = dither.compress(place / "m", "4x")
    state = archive.state_dict()
    lost = next(name for name in state if ".experts.1.w2" in name)
    del state[lost]
    dither.compress({**state, "odd": torch.ones(3)}, "2x").save("m.dither")
    with pytest.raises(dither.CheckpointError, match="unknown to the model"):
        dither.load_into(model, "m.dither")


def test_a_head_without_weights_is_refused(place: Path) -> None:
    build("Bert", BERT).save_pretrained(place / "m")  # type: ignore[operator]
    config = json.loads((place / "m" / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["BertForTokenClassification"]
    (place / "m" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(dither.CheckpointError, match=r"classifier\.bias.* are missing"):
        folder_model(place / "m")
