"""Learned widths by pseudo quantization noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dither.core import MAX_ALPHABET, Encoded, SpecError, Stats
from dither.formats import Affine, Mixed, Raw
from dither.formats.settings import check_choice, check_count
from dither.train.method import AfterTraining, Method
from dither.train.surrogate import Surrogate, plain
from dither.train.width_costs import WidthCosts, sums

NOISES = ("gaussian", "uniform")
PARAMS = ("bits", "noise")

_REFRESH = 10
"""Steps after which the estimate of coded bits is made anew."""

_CHUNK = 1 << 18
_LEVELS = 1 << 16
_MOST_BITS = 15
_UPWARDS = 6.0
_MARGIN = 0.02
"""Share of the range of widths that a start keeps from its ends, where the sigmoid is flat."""


@dataclass(frozen=True)
class DiffQ(Method):
    """Learned bits per group of weights by pseudo quantization noise (Défossez et al. 2022).

    arXiv 2104.09987. Training sees ``w + D * x`` with ``D = (max - min) / (2**b - 1)`` and noise
    ``x``, so that gradients are exact, and reach the widths ``b`` and the range through ``D``;
    files hold weights rounded at rounded widths. All groups of a tensor share its range.

    Attributes:
        group: consecutive weights of the flattened tensor that share a width; 0: all of them.
        min_bits: least width.
        max_bits: greatest.
        init_bits: width to begin with; with a budget, what the data-free search for it suggests.
        noise: ``"gaussian"``, of standard deviation ``D / 2`` (the paper's code's default), or
            ``"uniform"`` on ``-D / 2 .. D / 2``, which has that of rounding.
        param: what a sigmoid of the learned logits interpolates: the ``"bits"``, or the logarithm
            of the ``"noise"``, ``1 / (2**b - 1)``.
        extra_bits: added to the widths when weights are rounded.
        min_size: tensors of at most this many MiB in float32 stay as they are (the package: 0.01).
        lr: learning rate of the logits, for Adam.

    >>> DiffQ(group=16, max_bits=10)
    DiffQ(group=16, min_bits=2, max_bits=10, init_bits=8, noise='gaussian', param='bits', \
extra_bits=0, min_size=0, lr=0.001)
    """

    name: ClassVar[str] = "diffq"

    group: int = 8
    min_bits: float = 2
    max_bits: float = 15
    init_bits: float = 8
    noise: str = "gaussian"
    param: str = "bits"
    extra_bits: float = 0
    min_size: float = 0
    lr: float = 1e-3

    def __post_init__(self) -> None:
        check_count("DiffQ", "group", self.group, 0, MAX_ALPHABET)
        if not 1 <= self.min_bits < self.init_bits < self.max_bits <= _MOST_BITS:
            raise SpecError(
                f"DiffQ has 1 <= min_bits < init_bits < max_bits <= {_MOST_BITS}, not "
                f"{self.min_bits}, {self.init_bits} and {self.max_bits}"
            )
        check_choice("DiffQ", "noise", self.noise, NOISES)
        check_choice("DiffQ", "param", self.param, PARAMS)

    def begin(self, weight: Tensor) -> Surrogate:
        if weight.numel() == 0 or weight.numel() <= self.min_size * 2**20 // 4:
            return AfterTraining(Raw())
        return LearnedBits(self, weight)


class LearnedBits(Surrogate):
    """One weight whose groups learn their widths.

    Attributes:
        logits: ``(groups,)``, or ``(1,)`` where all weights share a width.
        numel: weights.
        group: weights of a group; the last may have fewer.
    """

    can_trim = True

    def __init__(self, spec: DiffQ, weight: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.lr = spec.lr
        self.numel = weight.numel()
        self.group = min(spec.group or self.numel, self.numel)
        bits = torch.full((-(-self.numel // self.group),), float(spec.init_bits))
        self.logits = nn.Parameter(self._logits_of(bits).to(weight.device))
        self._noise: Tensor | None = None
        self._ends: Tensor | None = None
        self._costs: WidthCosts | None = None

    def bits(self) -> Tensor:
        """Widths, real-valued and differentiable, ``(groups,)``."""
        return self.bits_of(self.logits)

    def bits_of(self, logits: Tensor) -> Tensor:
        """What a logit, which is any number, says about a width."""
        share = logits.sigmoid()
        spec = self.spec
        if spec.param == "bits":
            return share * (spec.max_bits - spec.min_bits) + spec.min_bits
        first, last = _log_noise(spec.min_bits), _log_noise(spec.max_bits)
        return torch.log1p(torch.exp(-(first + share * (last - first)))) / math.log(2)

    def widths(self, trim: float = 0.0) -> Tensor:
        """Widths as files have them, ``(groups,)``; trimming lowers some a little sooner.

        To be finer than was trained does no harm, so that trimming upwards goes further.
        A trimmed group that one bit would be left has none: the ends of the range are farther from
        most weights than 0 is.
        """
        bits = self.bits().detach() + self.spec.extra_bits
        if trim:
            number = torch.arange(len(bits), dtype=torch.float64, device=bits.device)
            trim = trim if trim > 0 else _UPWARDS * trim
            bits = bits - trim * (0.9 + 0.2 * (0.5 + number * 0.618033988749895).frac())
        widths = bits.round().clamp(1, _MOST_BITS)
        return torch.where(widths == 1, 0, widths) if trim > 0 else widths

    def noisy(self, weight: Tensor) -> Tensor:
        if self._noise is None or self._ends is None:
            return weight  # nothing was drawn yet
        if self._noise.device != weight.device:
            self._noise, self._ends = self._noise.to(weight.device), self._ends.to(weight.device)
        spec = self.spec
        ends = (spec.min_bits, spec.max_bits)
        if spec.param == "noise":
            ends = (_log_noise(spec.min_bits), _log_noise(spec.max_bits))
        values: Tensor = _Noisy.apply(  # type: ignore[no-untyped-call]
            weight, self.logits, self._noise, self._ends, self.group, spec.param, ends
        )
        return values

    def draw(self, weight: Tensor, generator: torch.Generator, step: int) -> None:
        if step % _REFRESH == 0:
            self._costs = None
        weight = plain(weight)
        if self._noise is None or self._noise.device != weight.device:
            self._noise = torch.empty(self.numel, device=weight.device)
        fill_noise(self._noise, self.spec.noise, generator)
        self._ends = _extremes(weight.reshape(-1))

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        """Nearest levels at rounded widths."""
        widths = self.widths(self.trim)
        if self.group > MAX_ALPHABET:
            return self._long(weight, widths)
        return Mixed(self.group).assign(weight, {"bits": widths})

    def _long(self, weight: Tensor, widths: Tensor) -> Encoded:
        """The same for one group that is longer than groups of files may be."""
        count = -(-self.numel // MAX_ALPHABET)
        return Mixed(MAX_ALPHABET).assign(weight, {"bits": widths.expand(count)})

    def soft_bits(self, weight: Tensor) -> Tensor:
        """Estimate of the entropy-coded bits: see :class:`~dither.train.width_costs.WidthCosts`."""
        weight = weight.float()
        bits = self.bits()
        if self._costs is None:
            with torch.no_grad():
                flat = weight.detach().reshape(-1)
                low, high = torch.aminmax(flat)
                wide = bits.detach() + self.spec.extra_bits
                self._costs = WidthCosts.of(flat, wide, self.group, low, high - low)
        return self._costs.total(weight, bits + self.spec.extra_bits)

    def start(self, encoded: Encoded) -> None:
        """Take the widths whose steps are about those that the data-free search found."""
        found = encoded.format
        if not isinstance(found, Affine) or found.bits is not None:
            return
        flat = encoded.decode().float().reshape(-1)
        steps = encoded.params["scale"].double().to(flat.device)
        if len(steps) > 1:
            steps = steps.repeat_interleave(self.numel // len(steps))[:: self.group]
        span = (flat.amax() - flat.amin()).double()
        bits = torch.log2(1 + span / steps).expand(len(self.logits))
        with torch.no_grad():
            self.logits.copy_(self._logits_of(bits.float()))

    def aside(self) -> dict[str, Any]:
        costs = self._costs
        return {"costs": None if costs is None else (costs.constant, costs.per_bit, costs.pull)}

    def load_aside(self, state: Mapping[str, Any]) -> None:
        self._costs = None if state["costs"] is None else WidthCosts(*state["costs"])

    def _logits_of(self, bits: Tensor) -> Tensor:
        spec = self.spec
        if spec.param == "bits":
            share = (bits - spec.min_bits) / (spec.max_bits - spec.min_bits)
        else:
            first, last = _log_noise(spec.min_bits), _log_noise(spec.max_bits)
            noise = -torch.log(torch.expm1(bits.double() * math.log(2)))
            share = ((noise - first) / (last - first)).to(bits.dtype)
        return share.clamp(_MARGIN, 1 - _MARGIN).logit()


def _log_noise(bits: float) -> float:
    """Natural logarithm of the step at a width, for a range of 1."""
    return -math.log(math.expm1(bits * math.log(2)))


def fill_noise(out: Tensor, kind: str, generator: torch.Generator) -> None:
    """Noise in units of the step, in place: standard deviation 1/2, or uniform on -1/2 .. 1/2.

    On CPUs a variate has 16 random bits, four from each draw: several times faster, and the
    variance is exact.

    Args:
        out: float32, ``(n,)``.
        kind: ``"gaussian"`` or ``"uniform"``.
        generator: of the device of ``out``.
    """
    if out.device.type != "cpu":
        if kind == "gaussian":
            out.normal_(0, 0.5, generator=generator)
        else:
            out.uniform_(-0.5, 0.5, generator=generator)
        return
    table = _quantiles() if kind == "gaussian" else None
    words = torch.empty(min(_CHUNK, -(-len(out) // 4) * 4) // 4, dtype=torch.int64)
    for part in out.split(_CHUNK):
        words.random_(-(2**63), None, generator=generator)
        short = words.view(torch.int16)[: len(part)]
        if table is None:
            part.copy_(short).add_(0.5).mul_(1 / _LEVELS)
        else:
            torch.index_select(table, 0, short.to(torch.int32).add_(_LEVELS // 2), out=part)


def _extremes(flat: Tensor) -> Tensor:
    """Places of the least and the greatest entry, int64 ``(2,)``."""
    if flat.device.type != "cpu" or len(flat) <= _CHUNK:
        return torch.stack([flat.argmin(), flat.argmax()])
    parts = flat.split(_CHUNK)  # finding a value is several times faster than its place
    lows, highs = (torch.stack(e) for e in zip(*(torch.aminmax(p) for p in parts), strict=True))
    low, high = int(lows.argmin()), int(highs.argmax())
    places = [low * _CHUNK + int(parts[low].argmin()), high * _CHUNK + int(parts[high].argmax())]
    return torch.tensor(places)


_TABLES: dict[str, Tensor] = {}


def _quantiles() -> Tensor:
    """Equally likely values of a normal distribution whose standard deviation is exactly 1/2."""
    if "gaussian" not in _TABLES:
        middle = (torch.arange(_LEVELS, dtype=torch.float64) + 0.5) / _LEVELS
        values = torch.special.ndtri(middle)
        _TABLES["gaussian"] = (values / (2 * values.square().mean().sqrt())).float()
    return _TABLES["gaussian"]


class _Noisy(torch.autograd.Function):
    """``w + D * x`` with gradients to weights, logits and the two weights that make the range."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        logits: Tensor,
        noise: Tensor,
        places: Tensor,
        group: int,
        param: str,
        ends: tuple[float, float],
    ) -> Tensor:
        flat = weight.reshape(-1)
        low, high = flat[places].unbind()
        share = logits.to(flat.dtype).sigmoid()
        # The step for a range of 1: 1 / (2**b - 1), or what is interpolated itself. In place,
        # because new memory is what takes time where every weight has a width.
        scale = math.log(2) if param == "bits" else 1.0
        unit = share.mul((ends[1] - ends[0]) * scale).add_(ends[0] * scale)
        unit = unit.expm1_().reciprocal_() if param == "bits" else unit.exp_()
        step = unit * (high - low)
        noise = noise.to(flat.dtype)
        full = len(flat) // group * group
        if full == len(flat):
            out = torch.addcmul(flat.view(-1, group), noise.view(-1, group), step.unsqueeze(1))
        else:
            body = torch.addcmul(
                flat[:full].view(-1, group), noise[:full].view(-1, group), step[:-1].unsqueeze(1)
            )
            tail = torch.addcmul(flat[full:], noise[full:], step[-1])
            out = torch.cat([body.view(-1), tail])
        ctx.save_for_backward(unit, share, high - low, noise, places)
        ctx.settings = (group, param, ends)
        return out.view(weight.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        unit, share, span, noise, places = ctx.saved_tensors
        group, param, ends = ctx.settings
        flat = gradient.reshape(-1)
        with torch.autocast(flat.device.type, enabled=False):  # backward may be called within one
            to_step = sums(flat * noise, group)
            to_span = torch.dot(to_step, unit)
        to_weight = None
        if ctx.needs_input_grad[0]:
            to_weight = flat.index_add(0, places, torch.stack([-to_span, to_span]))
            to_weight = to_weight.view(gradient.shape)
        to_logits = None
        if ctx.needs_input_grad[1]:
            slope = (1 - share).mul_(share).mul_(unit)
            factor = span * (ends[1] - ends[0])
            if param == "bits":
                slope.addcmul_(slope, unit)  # the slope of 1 / (2**b - 1), but for -log(2)
                factor = factor * -math.log(2)
            to_logits = slope.mul_(to_step).mul_(factor)
        return to_weight, to_logits, None, None, None, None, None
