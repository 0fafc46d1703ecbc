"""The last steps of a run: trim to the budget, and batch norm's statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dither.archive import CodedTensor, code, packed_nbytes
from dither.core import BudgetError, DitherError, Encoded, SpecError
from dither.data import Data
from dither.model import SHADOWS, weights_of
from dither.rewrite import absorbed, norms
from dither.search.size import fills
from dither.train.method import AfterTraining
from dither.train.ranks import STATISTICS, average
from dither.train.surrogate import Surrogate, encode_now, plain, same_bits

_TRIES = 14
_FARTHEST = 6.0
"""Octaves by which steps may be made coarser to fit."""
_FINEST = -0.5
"""Octaves by which steps may be made finer to use a budget up: what was trained is kept."""
_FINER = 1.0
"""Octaves by which steps may begin finer than the search found them for codes with feedback."""
_SHRINKS = 0.1
"""Share of its bytes that training might save where nothing can be made coarser."""


class Trimming:
    """What a file takes while the steps of its tensors are made coarser or finer.

    Args:
        movable: surrogates whose ``trim`` is set, and their weights.
        fixed: all other tensors of the file.
        aliases: of the file.
        sites: of the file.
    """

    def __init__(
        self,
        movable: Mapping[str, tuple[Surrogate, Tensor]],
        fixed: Mapping[str, CodedTensor],
        aliases: Mapping[str, str],
        sites: Mapping[str, Any],
    ) -> None:
        self._movable, self._coded = movable, dict(fixed)
        self._aliases, self._sites = aliases, sites

    def to(self, budget: int) -> int:
        """Choose a trim for all that can be moved, so that the file fits; its bytes.

        One for all; where sizes jump, since many weights stand midway between two grid points,
        single tensors fill what is left.

        Raises:
            BudgetError: even the coarsest does not fit.
        """
        size = self._all(0.0)
        if fills(size, budget):
            return size
        if size > budget:
            return self._fitted(budget, 0.0, _FARTHEST, self._least(budget))
        end = self._all(_FINEST)
        return end if end <= budget else self._fitted(budget, _FINEST, 0.0, size)

    def together(self, nbytes: int) -> float:
        """The trim for all at which the file is nearest to a size, at most.

        Much finer than the search made them, steps would be so where it had nothing left to gain.
        """
        size = self._all(0.0)
        low, high = (0.0, _FARTHEST) if size > nbytes else (-_FINER, 0.0)
        octaves, _ = self._bisect(self._all, nbytes, (low, high), size)
        return octaves

    def refuse(self, budget: int, *, trains: bool) -> None:
        """Refuse a budget that is out of reach, before anything is trained.

        Args:
            budget: bytes.
            trains: whether there are weights that nothing here moves, and training might.

        Raises:
            BudgetError: it is.
        """
        self._least(budget, spared=_SHRINKS if trains else 0.0)

    def _least(self, budget: int, spared: float = 0.0) -> int:
        end = self._all(_FARTHEST)
        if end * (1 - spared) <= budget:
            return end
        said = "even far coarser than trained it takes"
        advice = "ask for that or more"
        if not self._movable:
            said = "nothing in it can be made coarser, and it takes"
            advice = "use learned sizes (LSQ(bits=None), DiffQ), fewer bits, or a larger budget"
        raise BudgetError(
            f"a file of {budget} bytes is impossible with this plan: {said} {end} bytes; {advice}",
            smallest=end,
        )

    def _fitted(self, budget: int, low: float, high: float, size: int) -> int:
        """Between octaves at which it is too large, and others at which it fits."""
        best, size = self._bisect(self._all, budget, (low, high), size)
        self._all(best)
        for name in sorted(self._movable, key=lambda name: -self._coded[name].nbytes):
            if fills(size, budget):
                break
            best, size = self._bisect(partial(self._one, name), budget, (_FINEST, best), size)
            self._one(name, best)
        return size

    def _bisect(
        self, measure: Callable[[float], int], budget: int, ends: tuple[float, float], size: int
    ) -> tuple[float, int]:
        """The least octaves found at which a file fits that is too large at the first; bytes."""
        low, best = ends
        for _ in range(_TRIES):
            middle = (low + best) / 2
            found = measure(middle)
            if found <= budget:
                best, size = middle, found
                if fills(size, budget):
                    break
            else:
                low = middle
        return best, size

    def _all(self, octaves: float) -> int:
        for name in self._movable:
            self._put(name, octaves)
        return packed_nbytes(self._coded, self._aliases, sites=self._sites)

    def _one(self, name: str, octaves: float) -> int:
        self._put(name, octaves)
        return packed_nbytes(self._coded, self._aliases, sites=self._sites)

    def _put(self, name: str, octaves: float) -> None:
        surrogate, weight = self._movable[name]
        surrogate.trim = octaves
        self._coded[name] = code(encode_now(surrogate, plain(weight)))


def reestimate_batch_norm(model: nn.Module, data: Data | Iterable[Any]) -> None:
    """Batch norm's statistics, anew, with the weights as they are evaluated (Nagel et al. 2022).

    Everything else is in evaluation mode; modes and momenta are restored, and the statistics of
    before too where a batch cannot be read.

    Raises:
        SpecError: the model cannot read a batch, or statistics are not finite after it.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    before = {norm: [buffer.clone() for buffer in norm.buffers()] for norm in norms}
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average
            norm.training = True  # its surrogates stay in evaluation mode
        with torch.no_grad():
            samples = Data.of(data)
            for number, batch in enumerate(samples):
                _show(model, samples, batch, number)
            average(model)
    except BaseException:
        for norm, buffers in before.items():
            for buffer, value in zip(norm.buffers(), buffers, strict=True):
                buffer.copy_(value)
        raise
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def _show(model: nn.Module, samples: Data, batch: object, number: int) -> None:
    """Let batch norm see one batch."""
    try:
        samples.forward(model, batch)
    except DitherError:
        raise
    except Exception as error:  # whatever the parts of a model raise
        raise SpecError(
            f"the model cannot read batch {number} of the samples, a {type(batch).__name__} "
            f"({error}); give batches as in training, or Data(loader, forward=...), which says how "
            "it is called"
        ) from error
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in STATISTICS and not bool(buffer.isfinite().all()):
            raise SpecError(
                f"{name} is not finite after batch {number} of the samples: a value in it, or in "
                "what the model makes of it, is NaN or infinite; leave that batch out"
            )


def values_of(
    model: nn.Module, aliases: Mapping[str, str], absorbing: Mapping[str, Surrogate]
) -> dict[str, Tensor]:
    """Every tensor that the file holds, before it is encoded.

    Args:
        model: attached.
        aliases: names that are left out.
        absorbing: surrogates by name. A batch norm both of whose parameters are encoded at the end
            keeps two numbers for each channel instead of four.
    """
    values = {
        name: plain(value)
        for name, value in weights_of(model.state_dict()).items()
        if SHADOWS not in name.split(".") and name not in aliases
    }
    for path, norm in norms(model).items() if absorbing else ():
        mean, variance, weight, bias = (
            f"{path}.{local}" if path else local
            for local in ("running_mean", "running_var", "weight", "bias")
        )
        if all(isinstance(absorbing.get(n), AfterTraining) for n in (weight, bias)):
            values[weight], values[bias] = absorbed(norm)
            values[mean] = torch.zeros_like(values[mean])
            values[variance] = torch.ones_like(values[variance])
    return values


def first_changed(
    model: nn.Module, finished: Mapping[str, Encoded], trained: set[str]
) -> str | None:
    """The first tensor without a surrogate that is no longer what the file would hold.

    Those of surrogates are read from the file's own objects. Sharded tensors are not looked at.
    """
    for name, value in model.state_dict().items():
        if name in finished and name not in trained and not hasattr(value, "full_tensor"):
            held = finished[name].decode().to(value.device, value.dtype)
            if not same_bits(held, value):
                return name
    return None
