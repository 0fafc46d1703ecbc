"""The transformers Trainer, with a callback: bytes, resuming, accumulation, types, logs."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dither
from dither import LSQ
from dither.archive import Archive
from dither.core import CheckpointError, SpecError
from dither.testing import same_bits
from tests.test_hf_folders import BERT, LLAMA, build, place

transformers = pytest.importorskip("transformers", reason="NEEDS transformers: install dither[hf]")
pytest.importorskip("accelerate", reason="NEEDS accelerate, for transformers' Trainer")

from dither.integrations.transformers import WEIGHTS, DitherCallback  # noqa: E402

__all__ = ["place"]

STEPS = 8


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, kind: str) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(64, (64, 10), generator=generator)
        labels = tokens if kind == "llama" else tokens[:, 0] % 3
        self.rows = [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        return self.rows[item]


def model_of(kind: str) -> Any:  # noqa: ANN401 - of an optional package
    if kind == "llama":
        return build("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True})
    return build("BertForSequenceClassification", {**BERT, "num_labels": 3})


def plain_class(model: Any) -> Any:  # noqa: ANN401 - of an optional package
    return getattr(transformers, type(model).__name__)


@pytest.fixture(autouse=True)
def plainly() -> None:
    """No caches of accelerate's between tests."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def trainer_of(model: Any, callbacks: list[Any], kind: str, **more: Any) -> Any:  # noqa: ANN401
    settings = {
        "output_dir": "out",
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    arguments = transformers.TrainingArguments(**(settings | more))
    return transformers.Trainer(
        model, arguments, train_dataset=Rows(kind), eval_dataset=Rows(kind), callbacks=callbacks
    )


def begin(kind: str, **more: Any) -> tuple[Any, dither.Run]:
    model = model_of(kind)
    given: Any = {"budget": "5KB", "steps": STEPS} | more
    return model, dither.attach(model, **given)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_model_is_trained_to_its_bytes(kind: str, place: Path) -> None:
    """Four lines of the user's: attach, the callback, train, and from_pretrained."""
    model, run = begin(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    callback = DitherCallback(run, place / "small")
    trainer = trainer_of(model, [callback], kind)
    trainer.train()
    assert run.done == STEPS
    assert callback.nbytes is not None
    assert callback.nbytes <= 5000
    assert (place / "small" / WEIGHTS).stat().st_size == callback.nbytes + 128
    steps = [name for name in before if name.endswith("log_step")]
    assert steps
    assert any(not torch.equal(before[name], model.state_dict()[name]) for name in steps)
    read = plain_class(model).from_pretrained(place / "small")
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert same_bits(read(tokens).logits, model.eval()(tokens).logits)
    loss = trainer.evaluate()["eval_loss"]
    plain = trainer_of(read, [], kind)
    assert plain.evaluate()["eval_loss"] == loss


def test_logs_have_bytes_and_lambda(place: Path) -> None:
    """In the trainer's history, and for every logger behind the callback."""

    class Logger(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            self.seen: list[dict[str, float]] = []

        def on_log(self, *_: object, logs: dict[str, float], **__: object) -> None:
            self.seen.append(dict(logs))

    model, run = begin("bert")
    logger = Logger()
    trainer = trainer_of(model, [DitherCallback(run), logger], "bert")
    trainer.train()
    for rows in (trainer.state.log_history, logger.seen):
        told = [row for row in rows if "loss" in row]
        assert len(told) == STEPS // 2
        assert all(0 < row["predicted_nbytes"] < 20_000 and row["lambda"] > 0 for row in told)


def test_tensorboard_has_them(place: Path) -> None:
    pytest.importorskip("tensorboard", reason="NEEDS tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    model, run = begin("bert")
    writer = SummaryWriter(str(place / "runs"))
    board = TensorBoardCallback(writer)
    trainer_of(model, [DitherCallback(run), board], "bert").train()
    writer.close()
    events = EventAccumulator(str(place / "runs")).Reload()
    assert len(events.Scalars("train/predicted_nbytes")) == STEPS // 2
    assert len(events.Scalars("train/lambda")) == STEPS // 2


@pytest.mark.parametrize("spec", ["budget", "plan", "own optimizer"])
def test_resuming_ends_where_training_on_would_have(spec: str, place: Path) -> None:
    """Weights, learned steps, lambda and the count of steps: the same file to the last byte."""

    def train(resume: bool) -> tuple[dither.Run, Any]:
        model = model_of("llama")
        given: Any = {"plan": {"*proj.weight": LSQ(4)}, "steps": STEPS}
        if spec == "budget":
            given = {"budget": "5KB", "steps": STEPS}
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3) if spec == "own optimizer" else None
        run = dither.attach(model, optimizer=optimizer, **given)
        trainer = trainer_of(
            model, [DitherCallback(run)], "llama", save_strategy="steps", save_steps=3
        )
        trainer.optimizer = optimizer
        trainer.train(
            resume_from_checkpoint=str(place / "out" / "checkpoint-3") if resume else None
        )
        return run, trainer

    whole, _ = train(resume=False)
    for later in ("checkpoint-6", "checkpoint-8"):
        shutil.rmtree(place / "out" / later, ignore_errors=True)
    resumed, trainer = train(resume=True)
    assert trainer._initial_global_step == 3
    assert resumed.done == whole.done == STEPS
    assert resumed.archive.to_bytes() == whole.archive.to_bytes()
    assert resumed.history == whole.history


def test_resuming_without_the_state_of_the_run_is_refused(place: Path) -> None:
    model, run = begin("bert")
    trainer_of(model, [DitherCallback(run)], "bert", save_strategy="steps", save_steps=4).train()
    (place / "out" / "checkpoint-4").rename(place / "elsewhere")
    model, run = begin("bert")
    trainer = trainer_of(model, [DitherCallback(run)], "bert")
    with pytest.raises(CheckpointError, match="DitherCallback"):
        trainer.train(resume_from_checkpoint=str(place / "elsewhere"))
    model, run = begin("bert")
    named = DitherCallback(run, checkpoint=place / "elsewhere")
    trainer_of(model, [named], "bert").train(resume_from_checkpoint=str(place / "elsewhere"))
    assert run.done == STEPS


def test_accumulated_batches_are_one_step_and_one_penalty(place: Path) -> None:
    """Half the batches twice: the same steps, and nearly the same file."""
    files = []
    for batch, times in ((4, 1), (2, 2)):
        model, run = begin("llama")
        more = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": times}
        trainer_of(model, [DitherCallback(run)], "llama", max_grad_norm=0.0, **more).train()
        assert run.done == STEPS
        files.append(dict(run.archive))
    for name, value in files[0].items():
        assert torch.allclose(value, files[1][name], atol=0.02), name


def test_mixed_precision(place: Path) -> None:
    model, run = begin("llama")
    callback = DitherCallback(run, place / "small")
    trainer_of(model, [callback], "llama", bf16=True).train()
    assert callback.nbytes is not None
    assert callback.nbytes <= 5000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with Archive.open(place / "small" / WEIGHTS) as archive:
        assert all(bool(archive[name].isfinite().all()) for name in archive)


def test_the_best_checkpoint_is_the_one_that_is_finished(place: Path) -> None:
    model, run = begin("bert", budget=None, plan={"*.weight": LSQ(4)})
    trainer = trainer_of(
        model,
        [DitherCallback(run, place / "small")],
        "bert",
        learning_rate=0.5,  # it begins badly, and what began badly is to be kept
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert run.done == int(best.name.rpartition("-")[2]) < STEPS
    losses = {
        row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row
    }
    read = plain_class(model).from_pretrained(place / "small")
    assert trainer_of(read, [], "bert").evaluate()["eval_loss"] == losses[run.done]


def test_what_does_not_go_together_is_said(place: Path) -> None:
    model, run = begin("bert", steps=STEPS + 1)
    with pytest.raises(SpecError, match=f"steps={STEPS}"):
        trainer_of(model, [DitherCallback(run)], "bert").train()
    with pytest.raises(SpecError, match="another model"):
        trainer_of(model_of("bert"), [DitherCallback(run)], "bert")


def test_sentences_are_learned_within_their_bytes(data_dir: Path, place: Path) -> None:
    """Real sentences, words by their hash: the loss falls, and what is evaluated is the file."""
    lines = (data_dir / "sst2" / "train.tsv").read_text(encoding="utf-8").splitlines()[1:257]
    rows = []
    for sentence, _, label in (line.rpartition("\t") for line in lines):
        words = [zlib.crc32(word.encode()) % 500 + 1 for word in sentence.split()[:16]]
        tokens = torch.tensor(words + [0] * (16 - len(words)))
        rows.append({"input_ids": tokens, "attention_mask": tokens > 0, "labels": int(label)})
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**BERT, "vocab_size": 501, "hidden_size": 32})
    model = transformers.BertForSequenceClassification(config)
    run = dither.attach(model, budget="9KB", steps=60)
    callback = DitherCallback(run, place / "small")
    more = {"per_device_train_batch_size": 16, "max_steps": 60, "logging_steps": 15}
    trainer = trainer_of(model, [callback], "bert", learning_rate=5e-3, **more)
    trainer.train_dataset = trainer.eval_dataset = rows
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    assert (place / "small" / WEIGHTS).stat().st_size <= 9000 + 128
    read = trainer_of(plain_class(model).from_pretrained(place / "small"), [], "bert")
    read.eval_dataset = rows
    assert read.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"] < losses[0]
