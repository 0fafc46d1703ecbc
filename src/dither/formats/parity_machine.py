"""Which of two quantizers a code belongs to: a linear machine driven by the parities of codes.

The machine is linear over the integers modulo 2: with ``z(t)`` the quantizer and ``p(t)`` the
parity of the code at step ``t``, ``sum(a[i] * z(t - i)) = sum(b[i] * p(t - i))``, and everything
before the first step is 0. The polynomials are those of Ungerboeck's amplitude modulation codes
(IEEE Trans. Inf. Theory 28, 1982, table I), as trellis coded quantization uses them (Marcellin,
Fischer 1990).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

POLYNOMIALS: Mapping[int, tuple[int, int]] = MappingProxyType(
    {
        4: (0o5, 0o2),
        8: (0o13, 0o4),
        16: (0o23, 0o4),
        32: (0o45, 0o10),
        64: (0o103, 0o24),
        128: (0o235, 0o126),
        256: (0o515, 0o362),
    }
)
"""By number of states: bit ``i`` of the first is ``a[i]``, of the second ``b[i]``."""

REACH = 8
"""The highest degree: so many steps before a step say what it is."""


def quantizers(
    parities: Tensor, states: int, before: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The quantizer, 0 or 1, of every code, by the parities of all of them.

    Dividing by a polynomial ``a`` takes no loop over steps: modulo 2, ``a(D) ** (2**m)`` is
    ``a(D ** (2**m))``, which is 1 for as many steps as there are, so that ``1 / a`` is the product
    of ``a(D ** (2**j))`` for ``j < m``.

    Args:
        parities: ``(steps, ...)``, 0 or 1, of any integer type; machines run along the first axis.
        states: of the machine, a key of :data:`POLYNOMIALS`.
        before: quantizers and parities of the :data:`REACH` steps before, ``(REACH, ...)`` each, as
            :func:`last_steps` gives them; none at the first step.

    >>> quantizers(torch.tensor([1, 0, 0, 0, 0, 0, 0]), 8).tolist()
    [0, 0, 1, 1, 1, 0, 1]
    """
    divisor, factor = POLYNOMIALS[states]
    steps = len(parities)
    past = [parities.new_zeros(REACH, *parities.shape[1:])] * 2 if before is None else before
    seen = torch.cat([past[1], parities])
    found = torch.zeros_like(parities)
    for delay in range(1, factor.bit_length()):
        if factor >> delay & 1:
            found ^= seen[REACH - delay : REACH - delay + steps]
    for delay in range(1, divisor.bit_length()):
        if divisor >> delay & 1:  # quantizers before the first step are inputs like parities
            found[:delay] ^= past[0][REACH - delay :][:steps]
    stride = 1
    while stride < steps:
        shifted = found.clone()
        for power in range(1, divisor.bit_length()):
            delay = power * stride
            if divisor >> power & 1 and delay < steps:
                found[delay:] ^= shifted[:-delay]
        stride *= 2
    return found


def last_steps(
    found: Tensor, parities: Tensor, before: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """What :func:`quantizers` takes as ``before`` for the steps that follow."""
    past = [found.new_zeros(REACH, *found.shape[1:])] * 2 if before is None else before
    return torch.cat([past[0], found])[-REACH:], torch.cat([past[1], parities])[-REACH:]


def predecessors(states: int) -> Tensor:
    """The state before each state, by the parity that led to it, ``(2, states)`` int64.

    A state is a number whose lowest bit is the quantizer; the first one is 0. With the parity
    ``p``, state ``s`` is followed by ``s >> 1 ^ (s & 1) * (a >> 1) ^ p * (b >> 1)``.
    """
    divisor, factor = POLYNOMIALS[states]
    state = torch.arange(states)
    before = torch.empty(2, states, dtype=torch.int64)
    for parity in (0, 1):
        after = (state >> 1) ^ ((state & 1) * (divisor >> 1)) ^ (parity * (factor >> 1))
        before[parity, after] = state
    return before
