"""Folders of transformers whose weights are an archive: written, read in one line, or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import dither
from dither.archive import Archive
from dither.checkpoint import read_checkpoint
from dither.cli import app
from dither.core import CheckpointError, SpecError
from dither.testing import same_bits
from tests.test_hf_folders import (
    BERT,
    GPT2,
    HEADS,
    LLAMA,
    RENAMED,
    VIT,
    build,
    place,
    run,
    write_text,
    write_tokenizer,
)

transformers = pytest.importorskip("transformers", reason="NEEDS transformers: install dither[hf]")

from dither.integrations.transformers import WEIGHTS, save_pretrained  # noqa: E402

__all__ = ["place"]

CASES = {
    **HEADS,
    **RENAMED,
    "untied": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": False}),
}


@torch.no_grad()
def outputs(model: Any) -> list[Tensor]:  # noqa: ANN401 - of an optional package
    tokens = torch.arange(12).reshape(2, 6)
    if "ViT" in type(model).__name__:
        given = {"pixel_values": torch.linspace(-1, 1, 1536).reshape(2, 3, 16, 16)}
    elif model.config.is_encoder_decoder:
        given = {"input_ids": tokens, "decoder_input_ids": tokens}
    else:
        given = {"input_ids": tokens[:1]}
    return [value for value in model(**given).values() if isinstance(value, Tensor)]


def same(one: Any, other: Any) -> bool:  # noqa: ANN401 - of an optional package
    pairs = zip(outputs(one), outputs(other), strict=True)
    return all(same_bits(a, b) for a, b in pairs)


@pytest.mark.parametrize("case", CASES)
def test_what_was_evaluated_is_what_is_read(case: str, place: Path) -> None:
    """The same numbers, ties included, in a plain model, from a file of the archive's size."""
    model = build(*CASES[case])
    archive = dither.compress(model, "4x")
    assert save_pretrained(archive, place / "out", model) == archive.nbytes + 128
    dither.load_into(model, archive)
    read, info = type(model).from_pretrained(  # type: ignore[attr-defined]
        place / "out", output_loading_info=True
    )
    assert not any(info.values()), info
    assert same(read, model)
    ties = [len({p.data_ptr() for p in m.parameters()}) for m in (read, model)]
    assert ties[0] == ties[1]
    assert not hasattr(read.config, "quantization_config")
    assert not hasattr(read.config, "transformers_weights")
    assert sorted(path.name for path in (place / "out").glob("*.safetensors")) == [WEIGHTS]
    read.save_pretrained(place / "plain")
    plain = type(model).from_pretrained(place / "plain").state_dict()  # type: ignore[attr-defined]
    assert all(same_bits(value, plain[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("case", RENAMED)
def test_a_folder_is_as_good_as_its_model(case: str, place: Path) -> None:
    """Names on disk that are not the model's are converted, and the rest of the folder is kept."""
    model: Any = build(*RENAMED[case])
    model.save_pretrained(place / "m")
    write_tokenizer(place / "m")
    archive = dither.compress(place / "m", "4x")
    save_pretrained(archive, place / "out", place / "m")
    assert (place / "out" / "tokenizer.json").read_bytes() == (
        place / "m" / "tokenizer.json"
    ).read_bytes()
    assert not (place / "out" / "model.safetensors").exists()
    dither.load_into(model, archive)
    assert same(type(model).from_pretrained(place / "out"), model)


def test_generation_goes_on_as_before(place: Path) -> None:
    model: Any = build("LlamaForCausalLM", LLAMA)
    model.generation_config.repetition_penalty = 1.7
    archive = dither.compress(model, "4x")
    dither.load_into(model, archive)
    save_pretrained(archive, place / "out", model)
    read = transformers.AutoModelForCausalLM.from_pretrained(place / "out")
    assert read.generation_config.repetition_penalty == 1.7
    start = torch.tensor([[1, 5, 7]])
    one, other = (m.generate(start, max_new_tokens=8, do_sample=False) for m in (model, read))
    assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_types_are_those_that_are_asked_for(kind: torch.dtype, place: Path) -> None:
    """Decoding is in float32 whatever the model's type, and rounded once."""
    model: Any = build("BertForMaskedLM", BERT)
    save_pretrained(dither.compress(model, "4x"), place / "out", model)
    whole = transformers.AutoModelForMaskedLM.from_pretrained(place / "out")
    half = transformers.AutoModelForMaskedLM.from_pretrained(place / "out", dtype=kind)
    assert half.dtype == kind
    pairs = zip(half.parameters(), whole.to(kind).parameters(), strict=True)
    assert all(same_bits(a, b) for a, b in pairs)
    assert torch.get_default_dtype() == torch.float32
    small = build("BertForMaskedLM", BERT).to(kind)
    save_pretrained(dither.compress(small, "2x"), place / "small", small)
    assert transformers.AutoModelForMaskedLM.from_pretrained(place / "small").dtype == kind


def test_a_base_model_is_read_out_of_one_with_a_head(place: Path) -> None:
    model: Any = build("BertForMaskedLM", BERT)
    archive = dither.compress(model, "4x")
    save_pretrained(archive, place / "out", model)
    base = transformers.AutoModel.from_pretrained(place / "out", add_pooling_layer=False)
    assert all(same_bits(v, archive[f"bert.{n}"]) for n, v in base.named_parameters())


def test_grids_of_activations_come_with_the_weights(place: Path) -> None:
    """The evaluated model quantizes them, and so does what is read, with or without its head."""
    model: Any = build("BertForMaskedLM", BERT)
    tokens = torch.arange(12).reshape(2, 6)
    archive = dither.compress(
        model, "3x", data=[{"input_ids": tokens}] * 4, activations={"*@in": dither.Activation(8)}
    )
    save_pretrained(archive, place / "out", model)
    dither.activations.apply(model, archive.sites)
    dither.load_into(model, archive)
    read = transformers.AutoModelForMaskedLM.from_pretrained(place / "out")
    assert same(read, model)
    base = transformers.AutoModel.from_pretrained(place / "out", add_pooling_layer=False)
    with torch.no_grad():
        assert same_bits(base(tokens)[0], model.bert(tokens)[0])


def test_a_finished_run_is_written_as_it_was_evaluated(place: Path) -> None:
    model: Any = build("LlamaForCausalLM", LLAMA)
    run = dither.attach(model, {"*proj.weight": dither.LSQ(4)})
    run.finish()
    save_pretrained(run, place / "out")
    assert same(transformers.AutoModelForCausalLM.from_pretrained(place / "out"), model.eval())


FRESH = """
import sys
{first}
from transformers import AutoModel
try:
    model, info = AutoModel.from_pretrained(sys.argv[1], output_loading_info=True)
    print("read", len(info["missing_keys"]))
except OSError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("is_known", [True, False])
def test_a_fresh_process_reads_it_or_says_what_is_missing(is_known: bool, place: Path) -> None:
    """Three lines with the import; without it an error that names it, and never random weights."""
    model = build("Bert", BERT)
    save_pretrained(dither.compress(model, "4x"), place / "out", model)
    first = "import dither.integrations.transformers" if is_known else ""
    done = subprocess.run(
        [sys.executable, "-c", FRESH.format(first=first), str(place / "out")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if is_known:
        assert done.stdout == "read 0\n"
    else:
        assert done.stdout.startswith("FileNotFoundError ")
        assert "`pip install dither` and `import dither.integrations.transformers`" in done.stdout


def test_sharded_folders_and_links_of_the_cache_are_read(place: Path) -> None:
    model: Any = build("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True})
    model.save_pretrained(place / "m", max_shard_size="8KB")
    assert (place / "m" / "model.safetensors.index.json").is_file()
    archive = dither.compress(place / "m", "4x")
    save_pretrained(archive, place / "out", place / "m")
    dither.load_into(model, archive)
    assert same(transformers.AutoModelForCausalLM.from_pretrained(place / "out"), model)
    assert sorted(p.name for p in (place / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        WEIGHTS,
        "model.safetensors.index.json",
    ]


CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel


class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, width=16, **rest):
        self.width = width
        super().__init__(**rest)


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.line = torch.nn.Linear(config.width, config.width)
        self.post_init()

    def forward(self, values):
        return self.line(values)
"""


def test_models_with_code_of_their_own(place: Path) -> None:
    (place / "m").mkdir()
    (place / "m" / "own.py").write_text(CODE, encoding="utf-8")
    named = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    config = {"model_type": "own", "width": 16, "auto_map": named, "architectures": ["OwnModel"]}
    (place / "m" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)
    from safetensors.torch import save_file

    tensors = {"line.weight": torch.randn(16, 16), "line.bias": torch.zeros(16)}
    save_file(tensors, place / "m" / "model.safetensors", {"format": "pt"})
    archive = dither.compress(place / "m", "3x")
    save_pretrained(archive, place / "out", place / "m")
    read = transformers.AutoModel.from_pretrained(place / "out", trust_remote_code=True)
    assert same_bits(read.line.weight, archive["line.weight"])
    save_pretrained(archive, place / "again", read)  # of an object, whose code is in the cache
    again = transformers.AutoModel.from_pretrained(place / "again", trust_remote_code=True)
    assert same_bits(again.line.weight, archive["line.weight"])


def test_what_is_no_place_for_a_folder_is_refused(place: Path) -> None:
    model = build("Bert", BERT)
    archive = dither.compress(model, "4x")
    model.save_pretrained(place / "m")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="holds other files"):
        save_pretrained(archive, place / "m", model)
    with pytest.raises(CheckpointError, match="in the model's own folder"):
        save_pretrained(archive, place / "m" / "small", place / "m")
    with pytest.raises(CheckpointError, match="is a file"):
        save_pretrained(archive, place / "m" / "config.json", model)
    with pytest.raises(SpecError, match="name the model"):
        save_pretrained(archive, place / "out")
    with pytest.raises(SpecError, match="no model of transformers"):
        save_pretrained(archive, place / "out", torch.nn.Linear(2, 2))
    with pytest.raises(SpecError, match="no model folder"):
        save_pretrained(archive, place / "out", place / "nothing")
    with pytest.raises(CheckpointError, match="lacks embeddings"):
        save_pretrained(dither.compress({"w": torch.randn(32, 32)}, "2x"), place / "out", model)
    config = json.loads((place / "m" / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq"}
    (place / "m" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="quantized by 'gptq'"):
        save_pretrained(archive, place / "out", place / "m")


def test_a_link_out_of_the_folder_is_not_followed(place: Path) -> None:
    build("Bert", BERT).save_pretrained(place / "m")  # type: ignore[operator]
    (place / "secret").write_text("secret", encoding="utf-8")
    (place / "m" / "vocab.txt").symlink_to(place / "secret")
    with pytest.raises(CheckpointError, match="out of its folder"):
        save_pretrained(dither.compress(place / "m", "4x"), place / "out", place / "m")


def test_the_file_of_weights_is_an_archive_for_all_of_dither(place: Path) -> None:
    model = build("ViTForImageClassification", VIT)
    archive = dither.compress(model, "4x")
    save_pretrained(archive, place / "out", model)
    path = place / "out" / WEIGHTS
    assert dither.verify(path) == []
    with Archive.open(path) as read:
        assert read.to_bytes() == archive.to_bytes()
        read.save(place / "plain.dither")
    assert (place / "plain.dither").read_bytes() == archive.to_bytes()
    assert dither.load_into(model, path).exact
    with pytest.raises(CheckpointError, match="is an archive"):
        read_checkpoint(place / "out")


def test_a_folder_is_an_archive_for_all_of_dither(place: Path) -> None:
    """Commands and functions that take a file take the folder, also to make another one of it."""
    model: Any = build("BertForSequenceClassification", {**BERT, "num_labels": 3})
    model.save_pretrained(place / "m")
    write_tokenizer(place / "m")
    write_text(place / "lines.txt")
    whole = run("compress", "m", "--size", "3x", "-o", "out/")
    assert dither.load_into(model, place / "out").exact
    assert run("inspect", "out")["nbytes"] == whole["nbytes"]
    assert run("verify", "out")["good"]
    assert run("compare", "m", "out")["same_names"]
    assert run("report", "out", "--against", "m")["output"] == "out.html"
    less = run("compress", "out", "--size", "6x", "-o", "less/", "--data", "lines.txt")
    assert less["nbytes"] < whole["nbytes"]
    dither.load_into(model, place / "less")
    assert same(
        transformers.AutoModelForSequenceClassification.from_pretrained(place / "less"), model
    )


def test_nothing_is_left_behind(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded weights stand in a file while they are read; it goes, whatever happens."""
    held = place / "temporary"
    held.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(held))
    model = build("Bert", BERT)
    save_pretrained(dither.compress(model, "4x"), place / "out", model)
    transformers.AutoModel.from_pretrained(place / "out")
    assert list(held.iterdir()) == []
    data = bytearray((place / "out" / WEIGHTS).read_bytes())
    data[len(data) // 2] ^= 1
    (place / "out" / WEIGHTS).write_bytes(bytes(data))
    with pytest.raises(dither.ArchiveError, match="damaged"):
        transformers.AutoModel.from_pretrained(place / "out")
    assert list(held.iterdir()) == []


@pytest.mark.parametrize("case", ["masked", "vit"])
def test_a_folder_out_of_the_command_line_is_read_in_one_line(case: str, place: Path) -> None:
    """The rest of the folder is kept, and the file of weights keeps to the size."""
    model: Any = build(*CASES[case])
    model.save_pretrained(place / "m")
    write_tokenizer(place / "m")
    size = str(sum(p.numel() for p in model.parameters()))
    run("compress", "m", "--size", size, "-o", "out/")
    assert (place / "out" / WEIGHTS).stat().st_size <= int(size)
    assert (place / "out" / "tokenizer.json").is_file()
    dither.load_into(model, place / "out" / WEIGHTS)
    assert same(type(model).from_pretrained(place / "out"), model)
    run("compress", "m", "--size", "8x", "-o", "out")  # once more, over what was written
    assert run("inspect", f"out/{WEIGHTS}")["nbytes"] < int(size)
    back = run("decompress", f"out/{WEIGHTS}", "-o", "dense/model.safetensors")
    assert back["tensors"] == len(dither.load(place / "out" / WEIGHTS))


def test_folders_out_of_what_is_none(place: Path) -> None:
    model: Any = build("Bert", BERT)
    model.save_pretrained(place / "m")
    for arguments, said in [
        (("m/model.safetensors", "-o", "out/"), "is no model folder"),
        (("m", "-o", "m/"), "in the model's own folder"),
        (("m", "-o", "m/small/"), "in the model's own folder"),
        (("m", "-o", "."), "holds other files"),
        (("m", "-o", "out/", "--data", "a:b", "--model", "a:b"), "with --model name a file"),
    ]:
        result = CliRunner().invoke(app, ["compress", *arguments, "--size", "4x"])
        assert result.exit_code == 2, result.output
        assert said in " ".join(result.output.split())
    assert not (place / "out").exists()


def test_modules_of_sentence_transformers_stay_as_they_are(place: Path) -> None:
    """Pooling and dense modules behind the transformer are copied with their weights."""
    package = pytest.importorskip("sentence_transformers", reason="NEEDS sentence-transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    model: Any = build("Bert", BERT)
    model.save_pretrained(place / "bert")
    write_tokenizer(place / "bert")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(place / "bert" / "tokenizer.json"), pad_token="[UNK]"
    )
    tokenizer.save_pretrained(place / "bert")
    words = modules.Transformer(str(place / "bert"))
    torch.manual_seed(1)
    parts = [words, modules.Pooling(16), modules.Dense(16, 4)]
    package.SentenceTransformer(modules=parts, device="cpu").save(str(place / "m"))
    run("compress", "m", "--size", "4x", "-o", "out/")
    read = package.SentenceTransformer(str(place / "out"), device="cpu")
    whole = package.SentenceTransformer(str(place / "m"), device="cpu")
    assert same_bits(read[2].linear.weight, whole[2].linear.weight)
    one, other = (m.encode(["w1 w2 w3", "w4"]) for m in (read, whole))
    dither.load_into(whole[0].auto_model, place / "out" / WEIGHTS)
    assert (whole.encode(["w1 w2 w3", "w4"]) == one).all()
    assert not (one == other).all()


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_parts_go_where_a_device_map_says(where: str, place: Path) -> None:
    """Also to a disk: what is read from the decoded file later on is kept as long as the model."""
    pytest.importorskip("accelerate", reason="NEEDS accelerate, for device maps")
    model: Any = build("GPT2LMHeadModel", {**GPT2, "n_layer": 2})
    archive = dither.compress(model, "4x")
    save_pretrained(archive, place / "out", model)
    dither.load_into(model, archive)
    parts = ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head", "transformer.h.0")
    read = transformers.AutoModelForCausalLM.from_pretrained(
        place / "out",
        device_map=dict.fromkeys(parts, "cpu") | {"transformer.h.1": where},
        offload_folder=str(place / "offload"),
    )
    assert same(read, model)


def test_a_tokenizer_is_saved_with_the_model(place: Path) -> None:
    write_tokenizer(place)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(place / "tokenizer.json"))
    model: Any = build("BertForMaskedLM", BERT)
    for _ in range(2):  # over the first
        save_pretrained(dither.compress(model, "4x"), place / "out", model, tokenizer)
    words = transformers.pipeline("feature-extraction", str(place / "out"), device=-1)
    assert len(words("w1 w2 w3")[0]) == 3
