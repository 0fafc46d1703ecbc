"""Lightning's Trainer, with a callback: bytes, resuming, accumulation, types, logs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import dither
from dither import LSQ
from dither.core import SpecError
from dither.testing import same_bits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that it imports
    pl: Any = pytest.importorskip("lightning.pytorch", reason="NEEDS lightning")
    from dither.integrations.lightning import DitherCallback

STEPS = 12
pytestmark = pytest.mark.filterwarnings("ignore")  # of the library, about workers, loggers, paths


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(288, 10)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(images))
        return found


class Module(pl.LightningModule):  # type: ignore[misc]
    def __init__(self, scheduled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()
        self.scheduled = scheduled

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("score", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - what Lightning takes
        optimizer = torch.optim.AdamW(self.parameters(), 3e-3, weight_decay=0.1)
        if not self.scheduled:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def batches(count: int = 6) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8 * count, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (8 * count,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=8)


def trainer_of(callbacks: list[Any], place: Path, **more: Any) -> Any:  # noqa: ANN401
    settings = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": place,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(callbacks=callbacks, **(settings | more))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("part", ["net", "module"])
def test_a_module_or_a_part_is_trained_to_its_bytes(
    part: str, scheduled: bool, place: Path
) -> None:
    module = Module(scheduled)
    model = module.net if part == "net" else module
    run = dither.attach(model, budget="1500", steps=STEPS)
    before = {n: v.clone() for n, v in model.state_dict().items() if n.endswith("log_step")}
    callback = DitherCallback(run, place / "net.dither", data=[images for images, _ in batches()])
    if part == "module":
        callback = DitherCallback(run, place / "net.dither")
    trainer_of([callback], place).fit(module, batches())
    assert run.done == STEPS
    assert before
    assert any(not torch.equal(v, model.state_dict()[n]) for n, v in before.items())
    assert callback.nbytes == (place / "net.dither").stat().st_size <= 1500
    fresh = Module()
    dither.load_into(fresh.net if part == "net" else fresh, place / "net.dither")
    images = torch.randn(4, 1, 8, 8)
    assert same_bits(fresh.eval().net(images), module.eval().net(images))


@pytest.mark.parametrize("scheduled", [False, True])
def test_resuming_ends_where_training_on_would_have(scheduled: bool, place: Path) -> None:
    """Weights, learned steps, lambda and the count of steps: the same file to the last byte."""

    def train(begun: Path | None) -> dither.Run:
        module = Module(scheduled)
        run = dither.attach(module.net, budget="1500", steps=STEPS)
        keep = pl.callbacks.ModelCheckpoint(
            place / "kept", filename="{step}", every_n_epochs=1, save_top_k=-1
        )
        trainer = trainer_of([keep, DitherCallback(run)], place, enable_checkpointing=True)
        trainer.fit(module, batches(), ckpt_path=begun)
        return run

    whole = train(None)
    resumed = train(place / "kept" / "step=6.ckpt")
    assert resumed.done == whole.done == STEPS
    assert resumed.archive.to_bytes() == whole.archive.to_bytes()
    assert resumed.history == whole.history


def test_accumulated_batches_are_one_step(place: Path) -> None:
    module = Module()
    run = dither.attach(module.net, budget="1500", steps=4)
    trainer_of([DitherCallback(run)], place, accumulate_grad_batches=3).fit(module, batches())
    assert run.done == 4


def test_mixed_precision_and_clipping(place: Path) -> None:
    module = Module()
    run = dither.attach(module.net, budget="1500", steps=STEPS)
    callback = DitherCallback(run)
    more = {"precision": "bf16-mixed", "gradient_clip_val": 0.5}
    trainer_of([callback], place, **more).fit(module, batches())
    assert callback.nbytes is not None
    assert callback.nbytes <= 1500
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_loggers_get_bytes_lambda_and_the_score_of_the_file(place: Path) -> None:
    module = Module()
    run = dither.attach(module.net, budget="1500", steps=STEPS)
    logger = pl.loggers.CSVLogger(place, name="logs", version=0)
    trainer = trainer_of([DitherCallback(run)], place, logger=logger)
    trainer.fit(module, batches(), batches(2))
    lines = (place / "logs" / "version_0" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert {"predicted_nbytes", "lambda", "score"} <= set(lines[0].split(","))
    column = lines[0].split(",").index("predicted_nbytes")
    told = [float(row.split(",")[column]) for row in lines[1:] if row.split(",")[column]]
    assert len(told) == STEPS
    assert all(0 < value < 20_000 for value in told)


def test_what_does_not_go_together_is_said(place: Path) -> None:
    run = dither.attach(Net(), {"*.weight": LSQ(4)})
    with pytest.raises(SpecError, match="no part of the module"):
        trainer_of([DitherCallback(run)], place).fit(Module(), batches())
    module = Module()
    run = dither.attach(module.net, {"*.weight": LSQ(4)})
    module.automatic_optimization = False
    with pytest.raises(SpecError, match="by hand"):
        trainer_of([DitherCallback(run)], place).fit(module, batches())
    module = Module()
    run = dither.attach(module.net, budget="1500", steps=5)
    with pytest.raises(SpecError, match=f"steps={STEPS}"):
        trainer_of([DitherCallback(run)], place).fit(module, batches())
