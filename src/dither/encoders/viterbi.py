"""Trellis search: the path of codes with the least error, and what it costs, in every row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dither.coding import code_lengths
from dither.core import Encoded, SpecError, Stats
from dither.encoders import viterbi_twin
from dither.encoders.coded_grid import BySettings, grid_steps, in_steps, refitted
from dither.encoders.gptq import feedback
from dither.encoders.outputs import prepared
from dither.formats import Trellis
from dither.formats.grouping import rows_of
from dither.formats.parity_machine import predecessors
from dither.formats.trellis import CLASSES, MOST_CODES, cheapest

BLOCK = 64
"""Inputs after which the best path is settled, so that its errors can be passed on."""

_SEARCHED = 1 << 20
_SAMPLE = 1 << 17
_PASSES = 4
"""Times that the lengths of codes follow the path, which follows them; at a bit for each weight the
first lengths take 0.03 bits too many."""
_MOST_TABLED = 1 << 12
"""Codes beyond this, which are coded at a fixed width, all count as equally long."""


@dataclass(frozen=True, eq=False)
class Viterbi(BySettings):
    """Dependent quantization with error feedback: codes of :class:`~dither.formats.Trellis`.

    Without a Gram matrix the path of each row has the least squared error plus ``strength`` times
    coded bits (Marcellin, Fischer 1990; Fischer, Wang 1992). With one, every surviving path has
    passed its own errors on to the inputs behind, as GPTQ does (Frantar et al. 2022), and what is
    least is the output error; after each block of inputs the best path is settled.

    Attributes:
        step: the step of the trellis, or one for each output (1-D): half that of a grid of the
            same rate.
        strength: lambda, in squared steps for each coded bit; 0 looks at errors alone.
        states: of the trellis: 4, 8, 16, 32, 64, 128 or 256.
        damping: added to the diagonal of the Gram matrix, as a share of its mean.
        refit: store the steps of least error for the codes that were found, which costs no bytes.
            Codes of a coarse step are too large on average: at one bit for each weight, scaling
            them saves 0.1 bits or more (0.02 with a ``strength``).

    >>> weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    >>> gram = 0.9 * torch.eye(64) + 0.1  # inputs with a mean
    >>> def loss(encoded):
    ...     error = encoded.decode() - weight
    ...     return float((error @ gram * error).sum())
    >>> plain, fed = (Viterbi(0.25).encode(weight, s) for s in (None, Stats(gram=gram)))
    >>> loss(fed) < loss(plain)
    True
    """

    step: float | Tensor
    strength: float = 0.0
    states: int = 8
    damping: float = 0.0
    refit: bool = False

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        """Codes in :class:`~dither.formats.Trellis`.

        Args:
            weight: floating point, finite.
            stats: ``gram``, ``(inputs, inputs)``; a smaller one holds for each group of as many
                consecutive inputs.

        Raises:
            SpecError: the step or the Gram matrix does not fit, or a weight is not finite.
        """
        weight, stats = prepared(weight, stats)
        steps = grid_steps(self.step)
        shape = tuple(weight.shape)
        fmt = Trellis(self.states, 0 if len(steps) > 1 else None, steps.dtype)
        rows, columns = rows_of(shape)
        inputs = in_steps(weight, steps).reshape(rows, columns).T.contiguous()
        largest = _largest(weight, inputs)
        if (largest + 2 * CLASSES) * float(steps.max()) > torch.finfo(torch.float32).max:
            # Only the format's own search knows which multiples are beyond float32.
            return fmt.assign(weight, {"scale": steps})
        gram = None if stats is None else stats.gram
        if gram is not None and (gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not len(gram)):
            raise SpecError(f"a Gram matrix is (inputs, inputs), not of shape {tuple(gram.shape)}")
        lengths = None
        if self.strength > 0 and inputs.numel():
            part = inputs[:, : max(1, _SAMPLE // max(columns, 1))]
            for _ in range(_PASSES):
                lengths = _lengths(self._path(part.clone(), gram, lengths)) * self.strength
        aim = inputs.clone() if self.refit and gram is not None else inputs
        path = self._path(inputs, gram, lengths)
        if self.refit:
            steps = refitted(steps, aim.T, path.T.float(), gram)
        return fmt.encoded(path, shape, weight.dtype, steps)

    def _path(self, inputs: Tensor, gram: Tensor | None, lengths: Tensor | None) -> Tensor:
        """Multiples of the step, int32, for ``(inputs, outputs)`` in steps, overwritten if fed."""
        found = torch.empty(inputs.shape, dtype=torch.int32)
        if gram is None:
            size = max(1, _SEARCHED // max(1, len(inputs)))
            for start in range(0, inputs.shape[1], size):
                part = slice(start, start + size)
                found[:, part] = _separate(inputs[:, part], lengths, self.states)
            return found
        total = None
        spread, worth = _spread(gram, gram._version, self.damping)  # noqa: SLF001
        for start in range(0, len(inputs), len(gram)):
            group = inputs[start : start + len(gram)]
            if len(group) < len(gram):  # of a part of the inputs, not a part of the spread
                corner = gram[: len(group), : len(group)]
                spread, worth = _spread(corner, 0, self.damping)
            out = found[start : start + len(gram)]
            total = _fed(group, out, spread, worth, lengths, total, self.states)
        return found


def _largest(weight: Tensor, inputs: Tensor) -> float:
    """The largest magnitude in steps.

    Raises:
        SpecError: no multiple of the step can be near to it.
    """
    if not inputs.numel():
        return 0.0
    largest = float(inputs.abs().max())
    if not largest < MOST_CODES:
        if not bool(weight.detach().float().isfinite().all()):
            raise SpecError(
                "a weight is not finite, or is beyond float32; repair it, or store the tensor "
                "with Raw()"
            )
        raise SpecError(
            f"a step is too small for values of {largest:.0f} steps; at most {MOST_CODES} are "
            "possible: take a larger step, or store the tensor with Raw()"
        )
    return largest


@lru_cache(maxsize=4)
def _spread(gram: Tensor, version: int, damping: float) -> tuple[Tensor, Tensor]:
    """As :func:`feedback`, and what the squared error of each input then costs, mean 1."""
    del version
    spread = feedback(gram, damping)
    unit = spread + torch.eye(len(spread), dtype=spread.dtype)
    damped = gram.float() + damping * gram.diagonal().float().mean() * torch.eye(
        len(gram), dtype=torch.float32
    )
    worth = (unit * damped.T).sum(1).clamp_(min=0.0)  # 0, but for rounding, in no direction
    return spread, worth / worth.mean()


def _lengths(path: Tensor) -> Tensor:
    """Bits of codes from each quantizer, ``(2, codes)``; code 0 is in the middle."""
    codes = (path >> 1).long()
    reach = min(max(1, int(codes.abs().max()) + 2), _MOST_TABLED)
    codes = codes.clamp_(-reach, reach) + reach
    found = [torch.bincount(codes[(path & 1) == z], minlength=2 * reach + 1) for z in (0, 1)]
    return torch.stack([torch.from_numpy(code_lengths(part.numpy())).float() for part in found])


def _bits(multiples: Tensor, lengths: Tensor, quantizer: int) -> Tensor:
    reach = lengths.shape[1] // 2
    codes = ((multiples - quantizer) / 2).long().clamp_(-reach, reach) + reach
    return lengths[quantizer][codes]


def _separate(inputs: Tensor, lengths: Tensor | None, states: int) -> Tensor:
    """The best path in each row by itself, ``(inputs, outputs)`` int32."""
    multiples = torch.empty(CLASSES, *inputs.shape, dtype=torch.float32)
    costs = torch.empty(CLASSES, *inputs.shape, dtype=torch.float32)
    for index in range(CLASSES):
        multiples[index] = _nearest(inputs, index)
        costs[index] = (multiples[index] - inputs).square_()
        if lengths is not None:
            costs[index] += _bits(multiples[index], lengths, index & 1)
    return multiples.gather(0, cheapest(costs, states)[None])[0].to(torch.int32)


def _nearest(values: Tensor, index: int) -> Tensor:
    """The nearest multiple of a class."""
    return ((values - index) / CLASSES).round_().mul_(CLASSES).add_(index)


def _fed(
    inputs: Tensor,
    found: Tensor,
    spread: Tensor,
    worth: Tensor,
    lengths: Tensor | None,
    total: Tensor | None,
    states: int,
) -> Tensor:
    """Paths through a group of inputs that pass errors on to those behind, within the group.

    Args:
        inputs: ``(inputs, outputs)``, in steps; overwritten.
        found: likewise, receives the multiples.
        spread: from :func:`feedback`.
        worth: of the squared error of each input.
        lengths: cost of each code, or None.
        total: what each state has cost before, ``(states, outputs)``, None at the beginning.
        states: of the trellis.

    Returns:
        The same after the last input.
    """
    if total is None:
        total = torch.full((states, inputs.shape[1]), torch.inf, dtype=torch.float32)
        total[0] = 0
    for start in range(0, len(inputs), BLOCK):
        part = slice(start, start + BLOCK)
        search = _Search(inputs[part], spread[part, part], worth[part], lengths, total)
        found[part], errors, total = search.run(states)
        inputs[start + BLOCK :].addmm_(spread[part, start + BLOCK :].T, errors)
    return total


@dataclass(frozen=True, eq=False)
class _Search:
    """One block of inputs: ``block`` is ``(inputs, outputs)``, the rest as in :func:`_fed`."""

    block: Tensor
    within: Tensor
    worth: Tensor
    lengths: Tensor | None
    total: Tensor

    def run(self, states: int) -> tuple[Tensor, Tensor, Tensor]:
        """Multiples and errors, ``(inputs, outputs)``, of the best path, and the states' costs."""
        count, outputs = self.block.shape
        compiled = viterbi_twin.SEARCH.chosen(count * count * states * outputs * 1e-9)
        if compiled is not None:
            return self._compiled(compiled, states)
        before = predecessors(states)
        total = self.total
        # What the path that survives in each state passes on to each input, summed in the order of
        # the inputs, product by product.
        passed = torch.zeros(count, states, outputs, dtype=torch.float32)
        errors = torch.empty(count, states, outputs, dtype=torch.float32)
        multiples = torch.empty(count, states, outputs, dtype=torch.float32)
        parities = torch.empty(count, states, outputs, dtype=torch.bool)
        for i in range(count):
            aim = self.block[i] + passed[i]
            choices = [self._choose(i, aim, total, parity) for parity in (0, 1)]
            (even, one, lost), (odd, other, missed) = (
                [part[before[parity]] for part in choices[parity]] for parity in (0, 1)
            )
            parity = torch.lt(odd, even, out=parities[i])
            total = torch.minimum(even, odd)
            torch.where(parity, other, one, out=multiples[i])
            torch.where(parity, missed, lost, out=errors[i])
            kept, moved = (passed[i + 1 :, before[p]] for p in (0, 1))
            torch.where(parity, moved, kept, out=passed[i + 1 :])
            passed[i + 1 :] += self.within[i, i + 1 :, None, None] * errors[i]
        best = total.argmin(0)
        settled = torch.full_like(total, torch.inf)
        settled[best, torch.arange(outputs)] = 0
        state, path = best, torch.empty(2, count, outputs, dtype=torch.float32)
        for i in range(count - 1, -1, -1):
            path[0, i] = multiples[i].gather(0, state[None])[0]
            path[1, i] = errors[i].gather(0, state[None])[0]
            state = before[parities[i].gather(0, state[None])[0].long(), state]
        return path[0].to(torch.int32), path[1], settled

    def _compiled(self, search: Callable[..., None], states: int) -> tuple[Tensor, Tensor, Tensor]:
        lengths = torch.zeros(2, 0) if self.lengths is None else self.lengths
        parts = (self.block, self.within, self.worth, lengths, self.total.clone())
        path = torch.empty(2, *self.block.shape, dtype=torch.float32)
        held = [part.contiguous().numpy() for part in (*parts, predecessors(states), path)]
        search(*held, (0, self.block.shape[1]))
        return path[0].to(torch.int32), path[1], torch.from_numpy(held[4])

    def _choose(self, i: int, aim: Tensor, total: Tensor, parity: int) -> tuple[Tensor, ...]:
        """Cost, multiple and error where each state takes a code of this parity."""
        offset = (torch.arange(len(aim)) & 1)[:, None].float() + 2.0 * parity
        multiple = ((aim - offset) / CLASSES).round_().mul_(CLASSES).add_(offset)
        error = multiple - aim
        cost = error.square().mul_(self.worth[i]).add_(total)
        if self.lengths is not None:
            for quantizer in (0, 1):
                bits = _bits(multiple[quantizer::2], self.lengths, quantizer)
                cost[quantizer::2] += bits
        return cost, multiple, error
