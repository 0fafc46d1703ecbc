"""Lightning: a callback that trains an attached model, or a part of a module, to its file."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from dither.core import SpecError
from dither.integrations.loop import add_penalty, begin, withhold_extras
from dither.train import Run

__all__ = ["DitherCallback"]


class DitherCallback(Callback):  # type: ignore[misc]
    """A run in Lightning's ``Trainer``: penalty, steps, logs, checkpoints, and the file.

    Attach to the module, or to the part of it that is to be compressed, before ``fit``. Validation
    is computed with what the file would hold; ``fit(ckpt_path=...)`` resumes exactly. Optimization
    is automatic: with an optimizer of your own, step the run yourself.

    Args:
        run: of the module or of a part of it.
        path: where the finished file goes; None leaves it to you.
        data: training batches for batch norm's statistics: see ``Run.finish``.
    """

    def __init__(
        self, run: Run, path: str | os.PathLike[str] | None = None, data: Any = None
    ) -> None:
        self.run = run
        self.nbytes: int | None = None
        self._path, self._data = path, data
        self._withheld = [p for p in run.extras.parameters() if p.requires_grad]
        self._restored: dict[str, Any] | None = None
        self._stepped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before optimizers are configured and processes wrapped."""
        if not any(module is self.run.model for module in pl_module.modules()):
            raise SpecError("the callback's run is of no part of the module that is trained")
        if stage == "fit":
            if not pl_module.automatic_optimization:
                raise SpecError(
                    "the module optimizes by hand: add run.penalty() to its loss and call "
                    "run.step() behind its optimizer's step, without this callback"
                )
            withhold_extras(self.run)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Optimizers are configured, and not yet restored."""
        steps = int(trainer.estimated_stepping_batches)
        begin(self.run, steps, self._withheld, list(trainer.optimizers))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module's and the optimizers' states are restored."""
        if self._restored is not None:
            self.run.load_state_dict(self._restored)
            self._restored = None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Gradients are complete and unscaled; they are clipped afterwards."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        add_penalty(self.run, 1.0 if scaler is None else scaler.get_scale())
        self._stepped = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: object, **__: object
    ) -> None:
        """Gradients are still there; checkpoints of this step are written afterwards."""
        if self._stepped:
            self._stepped = False
            self.run.step()
        if trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self.run.metrics())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last checkpoint is written."""
        self.nbytes = self.run.finish(self._data)
        if self._path is not None and trainer.is_global_zero:
            self.run.save(self._path)

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints."""
        return self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoints; it is used once optimizers are restored, too."""
        self._restored = state_dict
