"""Builds the page of semantic search: ``python -m packages.web.build OUT --data FOLDER``.

It compresses all-MiniLM-L6-v2 (or takes ``--archive``), writes the graph without weights, embeds a
few thousand sentences of STS-Benchmark with the compressed model, and puts all that, the decoder
and the runtime where a static server finds them. ``expected.json`` beside them, which the page does
not read, holds what Python finds, for the test.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

import dither
from benchmarks.tasks import minilm_stsb
from packages.web.graph import sentence_encoder

HERE = Path(__file__).parent
COUNT = 3000
"""Sentences to search."""
SAMPLES = 512
"""Sentences to compress by."""
BATCH = 64
LONGEST = 128
"""Tokens of a text at most."""
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
QUERIES = (
    "a man is playing a guitar",
    "stock prices fell today",
    "two dogs run on the beach",
    "Où est le café?",
    "how do I cook rice",
    "the president spoke about the war",
    "a woman slices an onion with a knife",
    "earthquake kills dozens",
    "children playing football in a park",
    "zxqv",
    "!",
)

Vectors = npt.NDArray[np.float32]


def sentences(data: Path, *parts: str) -> list[str]:
    """The different sentences of parts of STS-Benchmark, in order."""
    found: dict[str, None] = {}
    for part in parts:
        with (data / "stsb" / f"sts-{part}.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                found.update(dict.fromkeys(text.strip() for text in row[5:7]))
    return list(found)


def tokenizer() -> Tokenizer:
    """The model's own, without padding."""
    found = Tokenizer.from_file(str(minilm_stsb.model_folder() / "tokenizer.json"))
    found.no_padding()
    found.enable_truncation(LONGEST)
    return found


def embed(model: torch.nn.Module, texts: list[list[int]]) -> Vectors:
    """Mean of the last hidden states, of length 1; one row for each text's tokens."""
    out = np.zeros((len(texts), 384), np.float32)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        longest = max(len(texts[i]) for i in chosen)
        ids = torch.tensor([texts[i] + [0] * (longest - len(texts[i])) for i in chosen])
        mask = torch.tensor([[1] * len(texts[i]) + [0] * (longest - len(texts[i])) for i in chosen])
        with torch.inference_mode():
            states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        total = (states * mask[..., None]).sum(1)
        out[chosen] = torch.nn.functional.normalize(total).numpy()
    return out


def best(query: Vectors, rows: npt.NDArray[np.int8]) -> list[int]:
    """The ten rows of the greatest cosine; the page computes the same from the same integers."""
    table = rows.astype(np.float64)
    scores = table @ query.astype(np.float64) / np.linalg.norm(table, axis=1)
    return [int(i) for i in np.argsort(-scores, kind="stable")[:10]]


def compress(folder: Path, data: Path, size: str, archive: Path) -> None:
    """Compress the model by sentences that are not those of the page."""
    samples = archive.with_name("samples.txt")
    samples.write_text("\n".join(sentences(data, "train")[:SAMPLES]), encoding="utf-8")
    command = ["dither", "compress", str(folder), "--size", size, "--data", str(samples)]
    subprocess.run([sys.executable, "-m", *command, "-o", str(archive)], check=True)
    samples.unlink()


def write_model(out: Path) -> torch.nn.Module:
    """The graph of the archive and its layout; returns the model with the archive's weights."""
    model = minilm_stsb.load()
    dither.load_into(model, out / "model.dither")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    graph, layout = sentence_encoder(shapes)
    (out / "graph.onnx").write_bytes(graph)
    (out / "layout.json").write_text(json.dumps(layout, separators=(",", ":")))
    shutil.copy(minilm_stsb.model_folder() / "vocab.txt", out / "vocab.txt")
    return model


def write_sentences(out: Path, model: torch.nn.Module, texts: list[str]) -> None:
    """Sentences and their embeddings, and what is expected of the page."""
    tokens = tokenizer()
    ids = [encoding.ids for encoding in tokens.encode_batch(texts)]
    vectors = embed(model, ids)
    rows = np.rint(vectors / np.abs(vectors).max(axis=1, keepdims=True) * 127).astype(np.int8)
    (out / "sentences.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    (out / "vectors.bin").write_bytes(rows.tobytes())
    asked = [encoding.ids for encoding in tokens.encode_batch(list(QUERIES))]
    found = {q: best(v, rows) for q, v in zip(QUERIES, embed(model, asked), strict=True)}
    tokenized = dict(zip([*texts, *QUERIES], [*ids, *asked], strict=True))
    expected = {"best": found, "tokens": tokenized}
    (out / "expected.json").write_text(json.dumps(expected))


def write_page(out: Path, original: int) -> None:
    """The page, the decoder and the runtime, and a version of the whole for the service worker."""
    shutil.copytree(HERE / "page", out, dirs_exist_ok=True)
    shutil.copytree(HERE.parent / "js" / "src", out / "dither", dirs_exist_ok=True)
    (out / "ort").mkdir(exist_ok=True)
    for name in RUNTIME:
        shutil.copy(HERE / "node_modules" / "onnxruntime-web" / "dist" / name, out / "ort" / name)
    facts = {"original": original, "model": (out / "model.dither").stat().st_size}
    (out / "facts.json").write_text(json.dumps(facts))
    digest = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.suffix != ".br" and path.name != "expected.json":
            digest.update(path.relative_to(out).as_posix().encode() + b"\0" + path.read_bytes())
    worker = out / "service-worker.js"
    text = worker.read_text(encoding="utf-8")
    worker.write_text(text.replace("VERSION", digest.hexdigest()[:16]), encoding="utf-8")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds stsb")
    parser.add_argument("--archive", type=Path, help="all-MiniLM-L6-v2, compressed before")
    parser.add_argument("--size", default="3.3MB")
    arguments = parser.parse_args()
    out: Path = arguments.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    folder = minilm_stsb.model_folder()
    if arguments.archive:
        shutil.copy(arguments.archive, out / "model.dither")
    else:
        compress(folder, arguments.data, arguments.size, out / "model.dither")
    model = write_model(out)
    write_sentences(out, model, sentences(arguments.data, "test", "dev")[:COUNT])
    write_page(out, (folder / "model.safetensors").stat().st_size)


if __name__ == "__main__":
    main()
