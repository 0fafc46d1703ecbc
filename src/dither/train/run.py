"""One attached model on its way to a file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dither.activations import Quantizer, placed
from dither.activations import step as step_sites
from dither.archive import Archive, pack, write
from dither.core import BudgetError, Encoded, SpecError
from dither.data import Data, moved
from dither.search.size import SLACK_NBYTES, fills
from dither.train.controller import Controller, looks_at, measures_at
from dither.train.file import File
from dither.train.habits import Habits
from dither.train.intact import Intact
from dither.train.learned_extras import Extras
from dither.train.method import AfterTraining
from dither.train.noise import Noise
from dither.train.penalties import Penalty
from dither.train.plan import Plan, Spec
from dither.train.ranks import take_first
from dither.train.schedules import Schedule
from dither.train.shadow import unshadow
from dither.train.surrogate import Surrogate, estimated_bits, plain, whole

_ATTEMPTS = 3
"""To finish within the budget: batch norm's new statistics take other bytes than the old ones."""


class Run:
    """A model in training whose weights are read through surrogates; made by :func:`dither.attach`.

    Attributes:
        model: the user's model, with its parameters where they were.
        plan: what is done to which weight.
        surrogates: by the name of the weight; a tied weight has one.
        steps: optimizer steps in total, if known.
        done: optimizer steps so far.
        controller: steers the size to the budget, if there is one.
        history: measurements: the step, the bytes that the file would have taken, and lambda.

    >>> import dither
    >>> model = nn.Linear(64, 64)
    >>> optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    >>> run = dither.attach(model, budget="2kB", steps=3, optimizer=optimizer)
    >>> for _ in range(run.steps):
    ...     (model(torch.ones(8, 64)).square().mean() + run.penalty()).backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     run.step()
    >>> run.finish() <= 2000
    True
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        surrogates: Mapping[str, Surrogate],
        buffers: Mapping[str, Spec],
        *,
        steps: int | None,
        noise: Noise,
        aliases: Mapping[str, str],
    ) -> None:
        self.model = model
        self.plan = plan
        self.surrogates = dict(surrogates)
        self._intact = Intact.of(model, surrogates)
        self.steps = steps
        self.done = 0
        self.controller: Controller | None = None
        self.penalties: list[Penalty] = []
        self.schedules: list[Schedule] = []
        self.history: list[dict[str, float]] = []
        learning = {
            site: quantizer
            for site, quantizer in placed(model).items()
            if isinstance(quantizer, Quantizer)
        }
        self.extras = Extras({**self.surrogates, **learning})
        self._held = File(model, self.surrogates, buffers, aliases)
        self._noise = noise
        self._habits = Habits(model)
        self._bits: Tensor | None = None
        self._ratio, self._rest = 1.0, 0.0
        self._draw()

    # --- while training --------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Share of the steps that is done, 0 to 1; 1 where no number of steps was given."""
        return 1.0 if not self.steps else min(self.done / self.steps, 1.0)

    def weights(self) -> Iterator[tuple[str, Surrogate, Tensor]]:
        """Name, surrogate and parameter of every weight that is trained with noise."""
        for name, surrogate in self.surrogates.items():
            if not isinstance(surrogate, AfterTraining):
                yield name, surrogate, self.parameter(name)

    def soft_bits(self) -> Tensor:
        """Differentiable estimate of the coded size in bits of all weights with noise, a scalar."""
        parts = [estimated_bits(surrogate, weight) for _, surrogate, weight in self.weights()]
        total = torch.stack(parts).sum() if parts else torch.zeros(())
        self._bits = total.detach()
        return total

    def penalty(self) -> Tensor:
        """What to add to the loss, a scalar; 0 where nothing is penalised."""
        terms = [penalty(self) for penalty in self.penalties]
        if self.controller is not None:
            terms.append(self.soft_bits() * self.controller.per_bit)
        self._habits.is_penalised = True
        if not terms:
            return torch.zeros((), device=next(self.model.parameters()).device)
        return torch.stack(terms).sum()

    def step(self) -> None:
        """Say that an optimizer step is done: schedules act, and new noise is drawn.

        Raises:
            SpecError: a weight is no longer finite, or no longer the one that was attached.
        """
        self._file.undo()
        self.extras.step()
        step_sites(self.model)
        self.done += 1
        take_first(self.model)
        self._intact.check(self.model, self.done)
        for schedule in self.schedules:
            schedule(self, self.done)
        self._draw()
        if self.controller is not None:
            self._steer(self.controller)
        self.extras.note()
        if self.controller is not None or self.penalties:
            self._habits.expect_penalty(self.done)

    def metrics(self) -> dict[str, float]:
        """What is worth a curve in a logger: bytes that the file would take, what they cost."""
        found = {"predicted_nbytes": self.predicted_nbytes()}
        if self.controller is not None:
            found["lambda"] = self.controller.weight
        return found

    def __repr__(self) -> str:
        """Where training stands, in a line."""
        steps = "" if self.steps is None else f" of {self.steps:,}"
        state = "finished" if self._file.is_fixed else f"step {self.done:,}{steps}"
        size = f", about {self.predicted_nbytes():,.0f} bytes" if self.history else ""
        if self.controller is not None:
            size += f" for {self.controller.nbytes:,}, lambda {self.controller.weight:.3g}"
        what = type(self.model).__name__
        return f"<Run of {what}: {state}, {len(self.surrogates)} tensors trained{size}>"

    def predicted_nbytes(self) -> float:
        """Bytes of the file, by the last estimate of its size and the last measurement."""
        bits = self._bits
        if bits is None:
            with torch.no_grad():
                bits = self.soft_bits()
        return self._ratio * float(bits) / 8 + self._rest

    def look(self) -> float:
        """The estimated coded size in bits of all weights with noise, as they are now."""
        for _, surrogate, _ in self.weights():
            surrogate.renew()
        with torch.no_grad():
            return float(self.soft_bits())

    def measure(self) -> int:
        """Bytes that the file would take now: everything is encoded and coded."""
        trained = {name for name, _, _ in self.weights()}
        coded, nbytes = self._file.coded()
        bits = self.look()
        variable = sum(part.nbytes for name, part in coded.items() if name in trained)
        self._ratio = variable / (bits / 8) if bits else 1.0
        self._rest = float(nbytes - variable)
        weight = self.controller.weight if self.controller else 0.0
        self.history.append({"step": self.done, "nbytes": nbytes, "lambda": weight})
        return nbytes

    def settle(self, nbytes: int) -> None:
        """Let all steps begin where the file, nearest codes, takes about so many bytes.

        The search found them for codes that make up for each other's errors, which take more.

        Raises:
            BudgetError: the budget is out of reach.
        """
        assert self.controller is not None  # noqa: S101 - there is something to settle on
        size = self._file.coded()[1]
        if size > self.controller.nbytes:
            self._file.refuse(self.controller.nbytes)
        if not fills(size, nbytes) and any(s.nudges for s in self.surrogates.values()):
            self._file.settle(nbytes)
        self.extras.note()
        self.measure()

    def join(self, optimizer: Optimizer) -> None:
        """Let an optimizer train the learned extras, in a group of their own without weight decay.

        An optimizer without Adam's normalised steps, or whose learning rate a scheduler already
        steers, cannot serve them: the run then trains them itself, with Adam, in :meth:`step`.
        """
        self.extras.join(optimizer)

    # --- the file --------------------------------------------------------------------------------

    def encode(self) -> dict[str, Encoded]:
        """Every tensor as the file would hold it now; what the plan does not name is raw.

        After :meth:`finish`, the very objects that evaluation reads.
        """
        return self._file.encoded()

    def finish(self, data: Data | Iterable[Any] | None = None, batches: int = 50) -> int:
        """Trim to the budget, fix what the file holds, and re-estimate batch norm.

        From here on, evaluation and :meth:`save` read the same objects. Training again un-does it.

        Args:
            data: training batches for batch norm's statistics, a loader or :class:`~dither.Data`.
                Without, the statistics stay those of training.
            batches: how many batches to use at most.

        Returns:
            Bytes of the file, without further metadata.

        Raises:
            BudgetError: the budget cannot be met.
            SpecError: the loader gives no batch; a weight is no longer finite, or no longer the
                one that was attached.
        """
        self._intact.check(self.model, self.done)
        samples = None if data is None else Data.of(data).first(batches).held()
        self._file.undo()
        self._habits.expect_steps(self.done)
        for name, surrogate in self.surrogates.items():
            surrogate.trim = 0.0
            surrogate.commit(self.parameter(name), None)
        goal = math.inf if self.controller is None else self.controller.nbytes
        for attempt in range(_ATTEMPTS):
            self._file.undo()
            if self.controller is not None:
                self._file.trimming().to(self.controller.nbytes - attempt * SLACK_NBYTES)
            nbytes = self._file.fix(samples)
            if nbytes <= goal:
                self._habits.expect_arrival(self.surrogates, self.done, self.steps)
                return nbytes
        raise BudgetError(
            f"a file of {goal} bytes was missed {_ATTEMPTS} times: with the new statistics of "
            f"batch norm it takes {nbytes} bytes; ask for that or more, or finish without data",
            smallest=nbytes,
        )

    @property
    def archive(self) -> Archive:
        """The file in memory.

        Raises:
            SpecError: the run is not finished.
        """
        encoded, sites = self._file.final()
        return pack(encoded, self._file.aliases, sites=sites)

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> int:
        """Write the file, which holds exactly what evaluation computes with; returns its bytes.

        Raises:
            SpecError: the run is not finished, or was trained on since.
        """
        encoded, sites = self._file.final()
        return write(path, encoded, self._file.aliases, metadata, sites)

    def sites(self) -> dict[str, Any]:
        """Encodings of activations as the file would hold them now, those that have a range."""
        return self._file.sites()

    def detach(self, *, commit: bool | None = None) -> nn.Module:
        """Give the model its plain classes back; ``dither.activations.remove`` does activations'.

        Args:
            commit: copy the file's values into the parameters; by default if the run is finished.

        Returns:
            The model.
        """
        finished = self._file.is_fixed
        if commit and not finished:
            raise SpecError("there is nothing to commit yet: call finish() before detach()")
        if any(hasattr(p, "full_tensor") for p in self.model.parameters()):
            raise SpecError(
                "a sharded model cannot be detached: save the run, and load_into a model that is "
                "not sharded"
            )
        for name, surrogate in self.surrogates.items():
            parameter = self.parameter(name)
            if (commit or commit is None) and finished and surrogate.committed is not None:
                with torch.no_grad():
                    parameter.copy_(surrogate.committed.decode().to(parameter.device))
        for module in list(self.model.modules()):
            unshadow(module)
        self.extras.release()
        return self.model

    # --- resuming --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the model's and the optimizer's own state dicts do not hold."""
        return {
            "done": self.done,
            "controller": self.controller.state_dict() if self.controller else None,
            "extras": self.extras.state_dict(),
            "surrogates": {name: s.aside() for name, s in self.surrogates.items()},
            "active": {name: s.active for name, s in self.surrogates.items()},
            "predicting": (self._ratio, self._rest),
            "history": [dict(row) for row in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse; load the model's and the optimizer's own state dicts before it.

        Raises:
            SpecError: it comes from a run with another plan.
        """
        if set(state["surrogates"]) != set(self.surrogates):
            raise SpecError(
                "this state is of a run with another plan: it has surrogates for "
                f"{sorted(set(state['surrogates']) ^ set(self.surrogates))[:5]} more or less; "
                "attach with the same plan first"
            )
        self.done = state["done"]
        self._ratio, self._rest = state["predicting"]
        self.history = [dict(row) for row in state["history"]]
        self.extras.load_state_dict(state["extras"])
        if self.controller is not None and state["controller"] is not None:
            self.controller.load_state_dict(state["controller"])
        for name, aside in state["surrogates"].items():
            placed: Any = moved(aside, self.parameter(name).device)
            self.surrogates[name].load_aside(placed)
            self.surrogates[name].active = state["active"][name]
            self.surrogates[name].reset()
        self._file.forget()
        self._bits = None
        for schedule in self.schedules:
            schedule(self, self.done)
        self._draw()

    # --- inside ----------------------------------------------------------------------------------

    def parameter(self, name: str) -> nn.Parameter:
        """The model's own parameter of a name."""
        return self.model.get_parameter(name)

    @property
    def _file(self) -> File:
        """What the file holds: with a budget, batch norms take half."""
        self._held.is_absorbing = self.controller is not None
        return self._held

    def _steer(self, controller: Controller) -> None:
        """After a step: look at the size now and then, adjust lambda, and mend the error."""
        if measures_at(self.done, self.steps):
            self.measure()
        elif looks_at(self.done, self.steps):
            self.look()
        else:
            return
        octaves = controller.update(self.predicted_nbytes(), self.progress)
        for _, surrogate, _ in self.weights():
            surrogate.nudge(octaves)

    def _draw(self) -> None:
        with torch.no_grad():
            for name, surrogate, weight in self.weights():
                generator = self._noise.generator(self.done, name, weight.device)
                surrogate.progress = self.progress
                with whole(surrogate, weight.device):
                    surrogate.draw(plain(weight), generator, self.done)
