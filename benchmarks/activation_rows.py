"""Rows of ``python -m benchmarks.activations``: how weights are stored, where activations are."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import ordering
from benchmarks.tasks import Split, data_path, minilm_sst2, minilm_stsb, resnet20_cifar10
from dither.activations import Activation
from dither.calibrate import collect
from dither.core import Encoder
from dither.data import Data, call
from dither.encoders import GPTQ, AdaRound, Ranges
from dither.formats import Affine
from dither.rewrite import correct_biases, equalize, fold_batch_norm

SAMPLES = 500
ITERATIONS = {"resnet20_cifar10": 1000, "minilm_stsb": 300, "minilm_sst2": 300}
"""Of AdaRound; the paper has 10,000."""

RANGES: dict[str, dict[str, Any]] = {
    "min-max": {},
    "running min-max": {"ranges": "running"},
    "percentile 99.99": {"ranges": "percentile"},
    "percentile 99.9": {"ranges": "percentile", "percentile": 99.9},
    "mse": {"ranges": "mse"},
    "dynamic, per tensor": {"dynamic": True},
}
FFN = (
    "*attention.output.LayerNorm@out",
    "*intermediate.dense@in",
    "*[0-9].output.dense@out",
    "*[0-9].output.LayerNorm@in",
)
"""What Bondarenko et al. 2021 give groups or 16 bits: input, output and sum of the feed-forward.

The first two are the same tensor, which must not be quantized a second time with one range.
"""
MORE = ("*[0-9].output.dense@in", "*embeddings.LayerNorm@*")
"""Further tensors of unlike dimensions: behind the GELU, and the embeddings."""
GROUPS = 48

Plan = dict[str, Activation]


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: of the row.
        weights: a key of what :func:`stored` makes.
        plan: of activations, or None.
    """

    name: str
    weights: str
    plan: Plan | None = None


def sites(task: str, **settings: Any) -> Plan:
    """Every tensor that a matrix product, a convolution or a sum reads, where a module sees it."""
    one = Activation(**settings)
    if task != "resnet20_cifar10":
        parts = ("query@out", "key@out", "value@out", "dense@in", "dense@out", "LayerNorm@*")
        return {f"*.{part}": one for part in parts}
    channels = Activation(**{**settings, "axis": 1})
    return {"*conv?@in": channels, "*bn2@out": channels, "linear@in": one}


def functions(task: str, **settings: Any) -> Plan:
    """What no module takes or gives: sums, scores, softmaxes and products."""
    if task != "resnet20_cifar10":
        ends = ("*@softmax", "*@scores", "*@matmul*", "*embeddings@add")
        return dict.fromkeys(ends, Activation(**settings))
    return {"*@add": Activation(**{**settings, "axis": 1})}


def grouped(task: str, bits: int, groups: int, **settings: Any) -> Plan:
    """Groups of embeddings around the feed-forward, one range for each other tensor."""
    special = Activation(bits, groups=groups, share=3, **settings)
    return {**dict.fromkeys(FFN, special), **sites(task, bits=bits, **settings)}


def widely(task: str, bits: int, groups: int) -> Plan:
    """More groups, at more places, each with its own permutation."""
    special = Activation(bits, groups=groups)
    return {**dict.fromkeys(FFN + MORE, special), **sites(task, bits=bits)}


def rows(task: str) -> list[Row]:
    """All rows of a task, in the order of the table."""
    found = [Row("fp32", "fp32"), Row("W8", "W8")]
    kinds = _resnet if task == "resnet20_cifar10" else _bert
    return [*found, *kinds(task)]


def _resnet(task: str) -> Iterator[Row]:
    mse = sites(task, bits=8, ranges="mse")
    for name, settings in RANGES.items():
        yield Row(f"W8A8 {name}", "W8", sites(task, bits=8, **settings))
    logits = {way: Activation(8, ranges=way) for way in ("mse", "crossentropy")}
    yield Row("W8A8 mse, logits too", "W8", {**mse, "linear@out": logits["mse"]})
    least = {**mse, "linear@out": logits["crossentropy"]}
    yield Row("W8A8 mse, logits by cross-entropy", "W8", least)
    sums = {**mse, **functions(task, bits=8, ranges="mse")}
    yield Row("W8A8 mse, sums too", "W8", sums)
    for weights in ("per tensor", "per tensor, CLE", "per tensor, CLE, bias correction"):
        yield Row(f"W8A8 mse, weights {weights}", f"W8 {weights}", mse)
    yield from _four_bits(mse, "mse")
    for weights in ("per tensor", "per tensor, CLE", "per tensor, CLE, AdaRound"):
        yield Row(f"W4A8 mse, weights {weights}", f"W4 {weights}", mse)
    yield Row("W4A8 mse, CLE, AdaRound", "W4 CLE, AdaRound", mse)
    yield Row("W4A8 mse, bias correction", "W4 MSE, bias correction", mse)
    for name, settings in RANGES.items():
        yield Row(f"W8A4 {name}", "W8", sites(task, bits=4, **settings))


def _bert(task: str) -> Iterator[Row]:
    best, wide = widely(task, 8, GROUPS), f"PEG {GROUPS} wide"
    for name, settings in RANGES.items():
        yield Row(f"W8A8 {name}", "W8", sites(task, bits=8, **settings))
    sixteen = {
        bits: {**dict.fromkeys(FFN, Activation(16)), **sites(task, bits=bits)} for bits in (8, 6)
    }
    yield Row("W8A8 min-max, feed-forward 16 bits", "W8", sixteen[8])
    for groups in (6, 12):
        yield Row(f"W8A8 min-max, PEG {groups}", "W8", grouped(task, 8, groups))
    plain = {**dict.fromkeys(FFN, Activation(8, groups=6, permute=False)), **sites(task, bits=8)}
    yield Row("W8A8 min-max, PEG 6 without permutation", "W8", plain)
    yield Row(f"W8A8 min-max, {wide}", "W8", best)
    yield Row("W8A8 dynamic, per token", "W8", sites(task, bits=8, per="token"))
    every = {**best, **functions(task, bits=8)}
    yield Row(f"W8A8 min-max, {wide}, functions too", "W8", every)
    yield Row(f"W8A8 min-max, {wide}, weights CLE", "W8 CLE", best)
    yield from _four_bits(best, wide)
    yield Row(f"W4A8 {wide}, CLE, AdaRound", "W4 CLE, AdaRound", best)
    for name in ("min-max", "mse"):
        yield Row(f"W8A6 {name}", "W8", sites(task, bits=6, **RANGES[name]))
    yield Row("W8A6 min-max, feed-forward 16 bits", "W8", sixteen[6])
    yield Row("W8A6 min-max, PEG 6", "W8", grouped(task, 6, 6))
    yield Row(f"W8A6 min-max, {wide}", "W8", widely(task, 6, GROUPS))
    yield Row("W8A6 dynamic, per token", "W8", sites(task, bits=6, per="token"))


def _four_bits(plan: Plan, name: str) -> Iterator[Row]:
    for weights in ("nearest", "MSE", "GPTQ", "AdaRound"):
        yield Row(f"W4A8 {name}, {weights}", f"W4 {weights}", plan)
    yield Row("W4, AdaRound", "W4 AdaRound")


# --- models --------------------------------------------------------------------------------------


def load(task: str) -> nn.Module:
    """The model in fp32 and evaluation mode; SST-2's is fine-tuned (210 steps) or found."""
    if task == "minilm_sst2":
        work = Path(tempfile.gettempdir(), "activations-sst2")
        work.mkdir(exist_ok=True)
        return ordering.branch(ordering.TASKS["sst2"], None, 0, work, "plain").eval()
    found: nn.Module = {"resnet20_cifar10": resnet20_cifar10, "minilm_stsb": minilm_stsb}[
        task
    ].load()
    return found


def evaluate(task: str, model: nn.Module, split: Split) -> float:
    """The task's score."""
    if task == "minilm_sst2":
        return minilm_sst2.evaluate(model, split)
    if task == "minilm_stsb":
        return minilm_stsb.evaluate(model, split)
    return resnet20_cifar10.evaluate(model, split)


def forward(model: nn.Module, batch: object) -> object:
    """Run a model on a batch of :func:`samples`."""
    if isinstance(model, minilm_sst2.Classifier) and isinstance(batch, tuple):
        return model(*batch)
    return call(model, batch)


def samples(task: str) -> list[Any]:
    """Batches of 500 training samples in all, without labels."""
    if task == "resnet20_cifar10":
        batches = resnet20_cifar10.Batches(100, seed=0)
        return [batches[number][0] for number in range(SAMPLES // 100)]
    if task == "minilm_sst2":
        stream = minilm_sst2.batches(20, seed=12345)
        return [next(stream)[:2] for _ in range(SAMPLES // 20)]
    from tokenizers import Tokenizer

    lines = data_path("stsb/sts-train.csv").read_text(encoding="utf-8").splitlines()
    sentences = sorted({line.split("\t")[5].strip() for line in lines})
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0))
    tokenizer = Tokenizer.from_file(str(minilm_stsb.model_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch([sentences[i] for i in order[:SAMPLES].tolist()])
    ids_of = sorted((row.ids for row in encoded), key=len)
    found = []
    for start in range(0, SAMPLES, 20):
        some = ids_of[start : start + 20]
        length = max(map(len, some))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in some])
        found.append({"input_ids": ids, "attention_mask": (ids != 0).long()})
    return found


# --- weights -------------------------------------------------------------------------------------


def stored(task: str, key: str, data: list[Any]) -> nn.Module:
    """A model with its weights as a row has them.

    Of 8 bits: every matrix and kernel, nearest codes, one scale for each output (each row of a
    table) or for all. Of 4: layers; tables have 8. Rows with CLE, bias correction or scales per
    tensor have batch norms folded.
    """
    model = load(task)
    if key == "fp32":
        return model
    is_folded = any(word in key for word in ("CLE", "per tensor", "bias"))
    if is_folded and task == "resnet20_cifar10":
        fold_batch_norm(model)
    if "CLE" in key:
        equalize(model, None if task == "resnet20_cifar10" else _value_pairs(model))
    original = copy.deepcopy(model)
    axis = None if "per tensor" in key else 0
    encoder = _encoder(key, Affine(int(key[1]), axis=axis), ITERATIONS[task])
    needs_data = isinstance(encoder, AdaRound | GPTQ)
    stats = collect(model, Data(data, forward)) if needs_data else {}
    tables = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                chosen: Encoder = Affine(8, axis=axis) if name in tables else encoder
                weight.copy_(chosen.encode(weight.detach(), stats.get(name)).decode())
    if "bias correction" in key:
        correct_biases(model, original, Data(data[:2], forward))
    return model


def _encoder(key: str, form: Affine, iterations: int) -> Encoder:
    if "AdaRound" in key:
        return AdaRound(form, iterations=iterations)
    if "GPTQ" in key:
        return GPTQ(format=form, damping=0.01)
    if key.startswith("W8") or "nearest" in key:
        return form
    return Ranges(form)


def _value_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Attention mixes values over tokens, not over channels: those two layers can be balanced."""
    ends = ("attention.self.value", "attention.output.dense")
    paths: Callable[[str], str] = lambda path: path.removesuffix(ends[0])  # noqa: E731
    return [
        (path, paths(path) + ends[1]) for path, _ in model.named_modules() if path.endswith(ends[0])
    ]
