"""Learned widths of 0, 2, 4, 8 or 16 bits by gates on nested grids."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dither.core import MAX_ALPHABET, Encoded, SpecError, Stats
from dither.formats import Affine, Mixed, Raw
from dither.formats.mixed import WIDEST
from dither.train.attached import Attached
from dither.train.method import AfterTraining, Method
from dither.train.ramp import Ramp, value_at
from dither.train.surrogate import Surrogate
from dither.train.width_costs import BINS, cells_of, sums, tables

_REFRESH = 10
"""Steps after which the estimate of coded bits is made anew."""

_BETA, _GAMMA, _ZETA = 2 / 3, -0.1, 1.1
_CLOSED = _BETA * math.log(-_GAMMA / _ZETA)
_THRESHOLD = 0.34
_ON, _OFF = 6.0, -6.0
_CLIP = 1 - 1e-7


@dataclass(frozen=True)
class BayesianBits(Method):
    """Gates decide how many bits a tensor has (van Baalen et al. 2020, arXiv 2005.07093).

    ``w = z2 * (w2 + z4 * (e4 + z8 * (e8 + z16 * e16)))``: ``w2`` is the weight on a grid of 2 bits,
    and each ``e`` what is left over on a grid that is finer by ``2**b + 1``. The gates ``z`` are
    hard-concrete (Louizos et al. 2018): 0 or 1 with positive probability, drawn once a step. Files
    hold the tensor at the width up to which all gates are open, by the paper's threshold.

    The released code takes a gate whose logit is at most -2, and all above it, out of training for
    good; here gates stay, since with probability 0.4 such a gate is still open.

    Attributes:
        max_bits: 2, 4, 8 or 16.
        prune: also a gate ``z2`` for each index of the first axis, which may leave it 0 bits.
        lr: learning rate of gates and range, for Adam.

    >>> weight = torch.tensor([[-0.8, -0.31, 0.02, 0.7]])
    >>> BayesianBits().begin(weight).encode(weight).decode()  # all gates are open at first
    tensor([[-0.8000, -0.3100,  0.0200,  0.7000]])
    """

    name: ClassVar[str] = "bayesian_bits"

    max_bits: int = 16
    prune: bool = False
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.max_bits not in {2, 4, 8, 16}:
            raise SpecError(f"BayesianBits has at most 2, 4, 8 or 16 bits, not {self.max_bits}")

    def begin(self, weight: Tensor) -> Surrogate:
        return GatedBits(self, weight) if weight.numel() else AfterTraining(Raw())


class GatedBits(Surrogate):
    """One weight behind gates.

    Attributes:
        logits: of the gates of 4, 8 and 16 bits, as far as there are any.
        keep: logits of the gates of channels, ``(channels,)``, or None.
        log_range: natural logarithm of where weights are clipped, ``(1,)``.
        group: weights of a channel, or of the tensor.
    """

    can_trim = True

    def __init__(self, spec: BayesianBits, weight: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.lr = spec.lr
        self.numel = weight.numel()
        channels = weight.shape[0] if spec.prune and weight.ndim > 1 else 1
        self.group = self.numel // channels
        gates = spec.max_bits.bit_length() - 2
        self.logits = nn.Parameter(torch.full((gates,), _ON, device=weight.device))
        self.keep = (
            nn.Parameter(torch.full((channels,), _ON, device=weight.device)) if spec.prune else None
        )
        largest = weight.float().abs().amax().reshape(1)
        self.log_range = nn.Parameter(torch.where(largest > 0, largest, 1.0).log())
        self._uniform: Tensor | None = None
        self._costs: tuple[Tensor, Tensor, Tensor] | None = None

    # --- gates -----------------------------------------------------------------------------------

    def gates(self) -> tuple[Tensor, Tensor]:
        """Gates of this step, for widths and for channels, with gradients to their logits."""
        logits = self._all()
        if self._uniform is None:
            gates = is_open(logits).to(logits.dtype)
        else:
            gates = hard_concrete(logits, self._uniform.to(logits.device))
        if self.keep is None:
            return gates, torch.ones_like(self.log_range)
        return gates[: len(self.logits)], gates[len(self.logits) :]

    def open_shares(self) -> tuple[Tensor, Tensor]:
        """Probabilities that gates are not 0, for widths and for channels."""
        kept = torch.ones_like(self.log_range) if self.keep is None else open_share(self.keep)
        return open_share(self.logits), kept

    def widths(self) -> Tensor:
        """Bits of each channel as the file would have them now, ``(channels,)``."""
        with torch.no_grad():
            opened = is_open(self.logits).to(torch.int64)
            bits = 2 ** (1 + opened.cumprod(0).sum())
            kept = torch.ones(1, device=bits.device) if self.keep is None else is_open(self.keep)
            return torch.where(kept > 0, bits, 0)

    # --- the surrogate ---------------------------------------------------------------------------

    def noisy(self, weight: Tensor) -> Tensor:
        values: Tensor = _Gated.apply(  # type: ignore[no-untyped-call]
            weight, self.log_range, *self.gates(), self.group
        )
        return values

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        """Nearest levels at the widths whose gates are open; trimming widens the range."""
        largest = self.log_range.detach().exp()
        weight = torch.clamp(weight, *(float(end * _CLIP) for end in (-largest, largest)))
        bits, group = self.widths(), min(self.group, MAX_ALPHABET)
        if group < self.group:
            bits = bits.expand(-(-self.numel // group))
        params = {"bits": bits, "range": largest * 2.0**self.trim}
        return Mixed(group, grid="symmetric").assign(weight, params)

    def draw(self, weight: Tensor, generator: torch.Generator, step: int) -> None:
        if step % _REFRESH == 0:
            self._costs = None
        if self._uniform is None or self._uniform.device != weight.device:
            self._uniform = torch.empty_like(self._all())
        self._uniform.uniform_(1e-6, 1 - 1e-6, generator=generator)

    def start(self, encoded: Encoded) -> None:
        """Take the step that was found, at the fewest bits that reach the largest weight."""
        found = encoded.format
        if not isinstance(found, Affine) or found.bits is not None:
            return
        step = float(encoded.params["scale"].float().log().mean().exp())
        largest = float(encoded.decode().abs().amax())
        widths = [2, 4, 8, 16][: len(self.logits) + 1]
        bits = next((b for b in widths if step * (2**b - 1) / 2 >= largest), widths[-1])
        with torch.no_grad():
            self.log_range.fill_(math.log(step * (2**bits - 1) / 2))
            for number, width in enumerate(widths[1:]):
                self.logits[number] = _ON if width <= bits else _OFF

    def gate_penalty(self) -> Tensor:
        """The paper's regulariser of one tensor, ``2 q2 + 4 q2 q4 + 8 q2 q4 q8 + ...``."""
        shares, kept = self.open_shares()
        chain = torch.cat([torch.ones_like(shares[:1]), shares]).cumprod(0)
        bits = 2.0 ** torch.arange(1, len(chain) + 1, device=chain.device)
        return (bits * chain).sum() * kept.mean()

    def soft_bits(self, weight: Tensor) -> Tensor:
        """Expected entropy-coded bits over the gates; the slope in a weight is that of its code."""
        weight = weight.float()
        if self._costs is None:
            with torch.no_grad():
                self._costs = self._count(weight.detach().reshape(-1))
        costs, heads, pulls = self._costs
        shares, kept = self.open_shares()
        one = torch.ones_like(shares[:1])
        # The chance that a width is the last whose gate is open.
        chances = torch.cat([one, shares]).cumprod(0) * torch.cat([1 - shares, one])
        bits = (chances @ costs * kept).sum() + (chances * heads).sum()
        pulled: Tensor = _Pulled.apply(  # type: ignore[no-untyped-call]
            weight, self.log_range, chances.detach(), kept.detach(), pulls, self.group
        )
        return bits + pulled

    def aside(self) -> dict[str, Any]:
        return {"costs": self._costs}

    def load_aside(self, state: Mapping[str, Any]) -> None:
        self._costs = state["costs"]

    def _all(self) -> Tensor:
        return self.logits if self.keep is None else torch.cat([self.logits, self.keep])

    def _count(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bits of channels by width, of tables by width, and slopes by width and cell."""
        largest = self.log_range.exp().squeeze(0)
        cells = cells_of(flat, -largest, BINS / (2 * largest))
        counts = torch.zeros(WIDEST + 1, BINS, dtype=torch.int64, device=flat.device)
        widths = [2**n for n in range(1, len(self.logits) + 2)]
        counts[widths] = torch.bincount(cells, minlength=BINS)
        lengths, slopes, heads = tables(counts.cpu().numpy(), first=0.5)
        by_cell = torch.from_numpy(lengths[widths]).to(flat)
        costs = [sums(table.index_select(0, cells), self.group) for table in by_cell]
        pulls = torch.from_numpy(slopes[widths]).to(flat) / (2 * largest)
        return torch.stack(costs), torch.from_numpy(heads[widths]).to(flat), pulls


def hard_concrete(logits: Tensor, uniform: Tensor) -> Tensor:
    """Gates from logits and uniform numbers (Louizos et al. 2018, arXiv 1712.01312)."""
    stretched = torch.sigmoid((torch.logit(uniform) + logits) / _BETA) * (_ZETA - _GAMMA) + _GAMMA
    return stretched.clamp(0, 1)


def open_share(logits: Tensor) -> Tensor:
    """The probability that a gate is not 0."""
    return torch.sigmoid(logits - _CLOSED)


def is_open(logits: Tensor) -> Tensor:
    """Gates as they are after training: open if the chance of 0 is below 0.34."""
    return torch.sigmoid(_CLOSED - logits) < _THRESHOLD


@dataclass(frozen=True)
class GatePenalty:
    """The paper's regulariser: expected bits of each tensor's gates, times a weight.

    Attributes:
        weight: the factor (mu), or a ramp.
        macs: multiplications that each weight takes part in, by name, of which the share of the
            largest counts; without, all tensors count alike.
    """

    weight: float | Ramp
    macs: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, run: Attached) -> Tensor:
        gated = {n: s for n, s in run.surrogates.items() if isinstance(s, GatedBits)}
        if not gated:
            raise SpecError("GatePenalty finds no weight under BayesianBits; name some in the plan")
        if self.macs and (lost := sorted(set(gated) - set(self.macs))):
            raise SpecError(f"GatePenalty has macs, but none for {lost[0]!r}; give one for each")
        most = max(self.macs.values(), default=1.0)
        terms = [s.gate_penalty() * (self.macs.get(n, most) / most) for n, s in gated.items()]
        return torch.stack(terms).sum() * value_at(self.weight, run.progress)


def _leftovers(inside: Tensor, largest: Tensor, count: int) -> list[Tensor]:
    """The weight on 2 bits, and what each finer grid adds."""
    step = largest * (2 / 3)
    parts = [(inside / step).round_().mul_(step)]
    rest = inside - parts[0]
    for number in range(1, count):
        step = step / (2 ** (2**number) + 1)
        parts.append((rest / step).round_().mul_(step))
        rest = rest - parts[-1]
    return parts


class _Gated(torch.autograd.Function):
    """The gated sum; rounding passes gradients straight through, clipping does not."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, log_range: Tensor, gates: Tensor, kept: Tensor, group: int
    ) -> Tensor:
        largest = log_range.exp()
        limit = largest * _CLIP
        inside = torch.maximum(torch.minimum(weight.reshape(-1), limit), -limit)
        parts = _leftovers(inside, largest, len(gates) + 1)
        total = parts[-1]
        for number in range(len(gates) - 1, -1, -1):
            total = parts[number] + gates[number] * total
        ctx.save_for_backward(weight, log_range, gates, kept)
        ctx.group = group
        return (total.view(-1, group) * kept.unsqueeze(1)).view(weight.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, log_range, gates, kept = ctx.saved_tensors
        flat, largest = weight.reshape(-1), log_range.exp()
        limit = largest * _CLIP
        inside = torch.maximum(torch.minimum(flat, limit), -limit)
        parts = _leftovers(inside, largest, len(gates) + 1)
        upstream = gradient.reshape(-1, ctx.group)
        within = (upstream * kept.unsqueeze(1)).view(-1)
        total, to_gates = parts[-1], []
        for number in range(len(gates) - 1, -1, -1):
            outer = gates[:number].prod()
            to_gates.append((within * total).sum() * outer)
            total = parts[number] + gates[number] * total
        to_kept = (upstream * total.view(-1, ctx.group)).sum(1)
        passed = within * (flat.abs() <= limit)
        to_range = (within * total).sum() - (passed * flat).sum()
        gates_out = torch.stack(to_gates[::-1]) if to_gates else torch.zeros_like(gates)
        return passed.view(weight.shape), to_range.reshape(1), gates_out, to_kept, None


class _Pulled(torch.autograd.Function):
    """Zero, with the slopes of coded bits to weights and range."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        log_range: Tensor,
        chances: Tensor,
        kept: Tensor,
        pulls: Tensor,
        group: int,
    ) -> Tensor:
        ctx.save_for_backward(weight, log_range, chances @ pulls, kept)
        ctx.group = group
        return weight.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, log_range, table, kept = ctx.saved_tensors
        flat, largest = weight.reshape(-1), log_range.exp().squeeze(0)
        cells = cells_of(flat, -largest, BINS / (2 * largest))
        slope = table.index_select(0, cells).view(-1, ctx.group) * (kept.unsqueeze(1) * gradient)
        slope = slope.view(-1) * (flat.abs() <= largest)
        # Codes depend on weights relative to the range.
        to_range = -(slope * flat).sum().reshape(1)
        return slope.view(weight.shape), to_range, None, None, None, None
