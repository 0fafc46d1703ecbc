"""How activations and gradients are quantized: frozen descriptions, which a plan holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from dither.core import Described, SpecError
from dither.formats.settings import check_choice, check_count, check_flag, check_number

PER = ("tensor", "token")
RANGES = ("minmax", "running", "percentile", "mse", "crossentropy", "norms")
TRAINING = ("fixed", "hindsight", "running", "learned", "clip")


@dataclass(frozen=True)
class _Site(Described):
    """What is done at a site."""

    noun: ClassVar[str] = "site"

    def to_json(self) -> dict[str, Any]:
        """Kind of site and settings that differ from their defaults, as JSON values."""
        return {"site": self.name, **super().to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`; without the kind too.

        Raises:
            SpecError: an unknown setting, or a value that makes no sense.
        """
        if values.get("site", cls.name) != cls.name:
            raise SpecError(f"a site of the kind {cls.name!r} is not {str(dict(values))[:200]}")
        return super().from_json({k: value for k, value in values.items() if k != "site"})


@dataclass(frozen=True)
class Activation(_Site):
    """Activations on an integer grid: ``scale * (clamp(round(x / scale) + zero) - zero)``.

    Attributes:
        bits: 2 to 16.
        symmetric: codes on both sides of 0 with the zero point in their middle; by default the
            zero point is where the range puts it (Nagel et al. 2021, arXiv 2106.08295).
        per: ``"tensor"``, or ``"token"``: each index of all axes but ``axis`` has its own range,
            which is then dynamic.
        groups: ranges along ``axis``, each for as many dimensions (PEG, Bondarenko et al. 2021,
            arXiv 2109.12948); the dimensions must be a multiple.
        axis: the axis of embeddings or channels.
        permute: groups hold dimensions of similar range rather than neighbours.
        share: sites whose paths begin with the same this many names share one permutation: 4 makes
            those of ``bert.encoder.layer.3`` alike.
        dynamic: the range is that of the tensor at hand; nothing is calibrated.
        ranges: how the static range is found on calibration data. ``"minmax"``; ``"running"``: a
            moving average of the batches' extremes; ``"percentile"``: that share of the values
            lies within; ``"mse"``: least squared error; ``"crossentropy"``: least cross-entropy of
            the softmax over ``axis``, for the last logits; ``"norms"``: what batch norms say, not
            calibration data, see :func:`dither.recipes.white_paper.ranges_by_norms`.
        percentile: above 0, at most 100.
        momentum: weight of the old value in moving averages, from 0 to below 1.
        training: what ranges do in training. ``"fixed"``; ``"hindsight"``: a moving average of
            earlier steps alone (Fournarakis and Nagel 2021, arXiv 2105.04246); ``"running"``: one
            that includes the step at hand; ``"learned"``: scale and zero point are parameters
            (LSQ+); ``"clip"``: only clipped values teach the scale (PACT).
        lr: learning rate of learned ranges, for Adam.

    >>> Activation.from_json(Activation(4, groups=6).to_json())
    Activation(bits=4, groups=6)
    """

    name: ClassVar[str] = "activation"

    bits: int = 8
    symmetric: bool = False
    per: str = "tensor"
    groups: int = 1
    axis: int = -1
    permute: bool = True
    share: int | None = None
    dynamic: bool = False
    ranges: str = "minmax"
    percentile: float = 99.99
    momentum: float = 0.9
    training: str = "fixed"
    lr: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        check_count("Activation", "bits", self.bits, 2, 16)
        check_choice("Activation", "per", self.per, PER)
        check_choice("Activation", "ranges", self.ranges, RANGES)
        check_choice("Activation", "training", self.training, TRAINING)
        check_count("Activation", "groups", self.groups, 1, 1 << 16)
        check_count("Activation", "axis", self.axis, -64, 63)
        for flag in ("symmetric", "permute", "dynamic"):
            check_flag("Activation", flag, getattr(self, flag))
        if self.share is not None:
            check_count("Activation", "share", self.share, 1, 1 << 10)
        check_number("Activation", "percentile", self.percentile, 100)
        check_number("Activation", "lr", self.lr)
        _check_momentum("Activation", self.momentum)
        if self.ranges in {"crossentropy", "norms"} and self.groups > 1:
            raise SpecError(
                f"Activation(groups={self.groups}, ranges={self.ranges!r}): these are one range "
                "for the whole tensor; give groups=1"
            )
        if self.ranges == "norms" and self.is_dynamic:
            raise SpecError("ranges='norms' are static; give dynamic=False and per='tensor'")
        if self.is_dynamic and self.training in {"learned", "clip"}:
            raise SpecError(
                f"Activation(training={self.training!r}): a dynamic range, which per='token' "
                "implies, is not learned; give training='fixed'"
            )

    @property
    def is_dynamic(self) -> bool:
        """Whether each tensor brings its own range."""
        return self.dynamic or self.per == "token"

    @property
    def is_sorted(self) -> bool:
        """Whether groups need the ranges of single dimensions from calibration data."""
        return self.groups > 1 and self.permute

    def __repr__(self) -> str:
        """Only what differs from the defaults, bits always."""
        given = [
            f"{item.name}={getattr(self, item.name)!r}"
            for item in fields(self)
            if item.name == "bits" or getattr(self, item.name) != item.default
        ]
        return f"Activation({', '.join(given)})"


@dataclass(frozen=True)
class Gradient(_Site):
    """Gradients on an integer grid in back-propagation, for training at low precision.

    The range is per tensor and asymmetric, that of earlier steps (in hindsight, Fournarakis and
    Nagel 2021, arXiv 2105.04246); at the first step, that of the gradient itself.

    Attributes:
        bits: 2 to 16.
        momentum: weight of the old range, from 0 to below 1.
        stochastic: round up with the probability of the fraction, so that what is within the range
            is unbiased; else to the nearest.
        dynamic: the range is always that of the gradient at hand.
        seed: of the rounding.

    >>> Gradient.from_json(Gradient(4).to_json())
    Gradient(bits=4, momentum=0.9, stochastic=True, dynamic=False, seed=0)
    """

    name: ClassVar[str] = "gradient"

    bits: int = 8
    momentum: float = 0.9
    stochastic: bool = True
    dynamic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        check_count("Gradient", "bits", self.bits, 2, 16)
        check_count("Gradient", "seed", self.seed, 0, (1 << 63) - 1)
        check_flag("Gradient", "stochastic", self.stochastic)
        check_flag("Gradient", "dynamic", self.dynamic)
        _check_momentum("Gradient", self.momentum)


SiteSpec = Activation | Gradient


def site_from_json(values: Mapping[str, Any]) -> SiteSpec:
    """A spec from what its ``to_json`` gave.

    Raises:
        SpecError: it describes neither an activation nor a gradient.
    """
    for kind in (Activation, Gradient):
        if values.get("site") == kind.name:
            return kind.from_json(values)
    raise SpecError(f"a site is 'activation' or 'gradient', not {values.get('site')!r}")


def _check_momentum(owner: str, value: object) -> None:
    if not isinstance(value, float | int) or isinstance(value, bool) or not 0 <= value < 1:
        raise SpecError(f"{owner}(momentum={value!r}): give a number from 0 to below 1")
