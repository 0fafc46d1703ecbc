"""What a plan holds: frozen descriptions that become surrogates, and their JSON."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from dither.core import Described, Encoded, Encoder, Format, SpecError, Stats, on_cpu
from dither.formats import format_from_json, format_to_json
from dither.train.ramp import Ramp
from dither.train.surrogate import Surrogate

METHODS: dict[str, type[Method]] = {}
"""Every training method by the name that JSON uses."""


@dataclass(frozen=True)
class Method(Described, ABC):
    """A frozen, JSON-able description whose :meth:`begin` makes a surrogate.

    Subclasses are frozen dataclasses with a ``name``; settings are numbers, strings, torch types,
    formats and ramps.
    """

    noun: ClassVar[str] = "method"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            METHODS[cls.name] = cls

    @abstractmethod
    def begin(self, weight: Tensor) -> Surrogate:
        """A surrogate for ``weight``, which it must not keep."""

    def to_json(self) -> dict[str, Any]:
        """Name and settings that differ from their defaults, as JSON values."""
        return {"method": self.name, **super().to_json()}

    def _written(self, value: object) -> object:
        if isinstance(value, Ramp):
            return {"ramp": asdict(value)}
        if isinstance(value, Format | Method):
            return spec_to_json(value)
        return super()._written(value)

    @classmethod
    def _read(cls, value: object) -> object:
        if isinstance(value, Mapping) and set(value) == {"ramp"}:
            return Ramp(**value["ramp"])
        return spec_from_json(value) if isinstance(value, Mapping) else value


def spec_to_json(spec: Encoder | Method) -> dict[str, Any]:
    """A spec as JSON values: ``{"format": ...}`` or ``{"method": ...}`` with its settings.

    >>> from dither.formats import Affine
    >>> spec_to_json(Affine(4))
    {'format': 'affine', 'version': 1, 'bits': 4}
    """
    if isinstance(spec, Method):
        return spec.to_json()
    if isinstance(spec, Format):
        return format_to_json(spec)
    raise SpecError(
        f"{spec!r} has no JSON: only formats and training methods do; encode with it after "
        "training instead"
    )


def spec_from_json(values: Mapping[str, Any]) -> Format | Method:
    """The inverse of :func:`spec_to_json`.

    Raises:
        SpecError: an unknown format, method or setting.
    """
    if "method" not in values:
        return format_from_json(values)
    settings = dict(values)
    kind = METHODS.get(settings.pop("method"))
    if kind is None:
        raise SpecError(
            f"there is no training method {values['method']!r}; known are "
            f"{', '.join(sorted(METHODS))}"
        )
    return kind.from_json(settings)


class AfterTraining(Surrogate):
    """A weight that trains as it is and is encoded at the end: any encoder as a surrogate."""

    is_still = True

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def noisy(self, weight: Tensor) -> Tensor:
        return weight

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        return self.encoder.encode(*on_cpu(weight, stats))  # no step of training: as search does


def begin(spec: Encoder | Method, weight: Tensor) -> Surrogate:
    """The surrogate that a spec makes for a weight.

    Raises:
        SpecError: it is neither an encoder nor a training method, or refuses this weight.
    """
    if isinstance(spec, Method):
        return spec.begin(weight)
    if isinstance(spec, Encoder):
        return AfterTraining(spec)
    raise SpecError(
        f"a plan holds formats, encoders and training methods, not {spec!r}; write "
        "{'*.weight': LSQ(4)}, for example"
    )
