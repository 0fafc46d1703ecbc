"""The data that passes between the stages: formats, encoded tensors, statistics and errors.

A *format* fixes how numbers are rebuilt from integer codes; everything that chooses codes is an
*encoder*. Both meet in :class:`Encoded`, so packing, exact sizes, the file, its checks and loading
are written once for each format and never once for each method.

This module imports torch and, of ours, `terminal` alone.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from dither.terminal import some_names

MAX_ALPHABET = 1 << 24
"""The largest alphabet of a code part: integers up to 2**24 are exact in float32."""

STACKED = -2
"""``Stats.outputs`` of a stack of matrices, as all experts of a layer are in one tensor."""

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        name: getattr(torch, name)
        for name in (
            "float64",
            "float32",
            "float16",
            "bfloat16",
            "float8_e4m3fn",
            "float8_e5m2",
            "complex64",
            "complex128",
            "int64",
            "int32",
            "int16",
            "int8",
            "uint8",
            "uint16",
            "uint32",
            "uint64",
            "bool",
        )
    }
)
"""The tensor types that an archive can hold, by the names that files use."""


class DitherError(Exception):
    """Any error that dither raises on purpose; its message says what to do."""


class SpecError(DitherError, ValueError):
    """Settings that are invalid, or do not fit the tensor or model they are applied to."""


class CheckpointError(DitherError, ValueError):
    """A checkpoint that cannot be read, or does not fit the model it is loaded into."""


class BudgetError(DitherError, ValueError):
    """A size that cannot be understood or cannot be reached.

    ``smallest`` is the least number of bytes that can be reached, where that is known.
    """

    def __init__(self, message: str, smallest: int | None = None) -> None:
        super().__init__(message)
        self.smallest = smallest


class ArchiveError(DitherError, ValueError):
    """A file that is not an archive, is damaged, or needs more memory than allowed."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a tensor type in files: ``torch.float16`` is ``"float16"``."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise SpecError(f"tensors of type {dtype} are not supported; known are {', '.join(DTYPES)}")
    return name


def is_extra_state(name: object, value: object) -> bool:
    """Whether an entry of a state dict is extra state of a module, and no tensor."""
    return str(name).rpartition(".")[2] == "_extra_state" and not isinstance(value, Tensor)


def without_extra_state(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """A state dict without the extra state of modules that is no tensor; a warning names it."""
    extra = [str(name) for name, value in state.items() if is_extra_state(name, value)]
    if extra:
        warnings.warn(
            f"left out, because it is no tensor: {some_names(extra)}; save it beside the file if "
            "the model needs it",
            stacklevel=3,
        )
    return {name: value for name, value in state.items() if name not in extra}


def code_dtype(alphabet: int) -> torch.dtype:
    """The smallest common integer type that holds the codes ``0 .. alphabet - 1``."""
    if alphabet <= 1 << 8:
        return torch.uint8
    return torch.int16 if alphabet <= 1 << 15 else torch.int32


def code_width(alphabet: int) -> int:
    """Bits of one fixed-width code from an alphabet: 0 for one symbol, 8 for 129 to 256."""
    return (alphabet - 1).bit_length()


@dataclass(frozen=True, eq=False)
class Codes:
    """Integers ``0 .. alphabet - 1`` of any shape.

    The shape is a hint to the coder, which may treat rows (first axis) and columns (the others)
    differently. ``values`` is kept in the smallest type that holds the alphabet.
    """

    values: Tensor
    alphabet: int

    def __post_init__(self) -> None:
        if not 1 <= self.alphabet <= MAX_ALPHABET:
            raise SpecError(f"an alphabet has 1 to {MAX_ALPHABET} symbols, not {self.alphabet}")
        dtype = code_dtype(self.alphabet)
        if self.values.dtype != dtype:
            object.__setattr__(self, "values", self.values.to(dtype))

    @property
    def bits(self) -> int:
        """Exact payload in bits at fixed width."""
        return self.values.numel() * code_width(self.alphabet)


@dataclass(frozen=True, eq=False)
class Stats:
    """What data says about one weight; encoders use what is there.

    The *inputs* of a weight are what its columns multiply: all axes but the one of the outputs.

    Attributes:
        importance: weight of each squared error, broadcastable to the weight's shape (a diagonal
            Fisher, a Hessian diagonal, token counts); no unit, only ratios matter.
        gram: second moments of the inputs, ``(inputs, inputs)``, or, of a smaller number of
            inputs, for each group of as many. With three axes one matrix for each of ``n`` equal
            groups: of the outputs where a matrix covers all inputs, else of the inputs.
        outputs: the weight's axis that counts outputs: 0, but 1 for transposed convolutions and
            GPT-2's Conv1D, and :data:`STACKED` for stacks of matrices ``(..., outputs, inputs)``.
        mean: first moments of the inputs, ``(inputs,)``, or ``(n, inputs)`` where ``gram`` has n.
        cross: second moments of what the inputs should be with what they are, as ``gram``: where
            layers before are quantized already.
        counts: how often each row of a table was read, ``(rows,)``.
        low: the least input seen.
        high: the greatest input seen.
        samples: input vectors seen.
    """

    importance: Tensor | None = None
    gram: Tensor | None = None
    outputs: int = 0
    mean: Tensor | None = None
    cross: Tensor | None = None
    counts: Tensor | None = None
    low: float | None = None
    high: float | None = None
    samples: int = 0

    def to(self, device: torch.device | str) -> Stats:
        """The same with its tensors on a device."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def on_cpu(weight: Tensor, stats: Stats | None = None) -> tuple[Tensor, Stats | None]:
    """The door of everything that encodes: a weight and its statistics as the CPU holds them.

    Encoders and search compute on the CPU alone, so that a file is the same wherever the model is.
    What is there already is not copied.
    """
    return weight.cpu(), None if stats is None else stats.to("cpu")


@dataclass(frozen=True, eq=False)
class Encoded:
    """One tensor in a format: the only data that passes between the stages.

    Attributes:
        format: how to rebuild the numbers.
        shape: shape of the tensor.
        dtype: type to restore the tensor to.
        codes: named integer parts.
        params: named parts of numbers: scales, centroids, raw values.
    """

    format: Format
    shape: tuple[int, ...]
    dtype: torch.dtype
    codes: Mapping[str, Codes] = field(default_factory=dict)
    params: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        dtype_name(self.dtype)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "codes", MappingProxyType(dict(self.codes)))
        object.__setattr__(self, "params", MappingProxyType(dict(self.params)))
        self.format.check(self)

    def __reduce__(self) -> tuple[object, ...]:
        """Copies and pickles are made anew: read-only mappings know neither."""
        parts = (dict(self.codes), dict(self.params))
        return (type(self), (self.format, self.shape, self.dtype, *parts))

    def decode(self) -> Tensor:
        """The tensor: computed in float32 in a stated order, restored to ``dtype``."""
        return self.format.decode(self)

    def to(self, device: torch.device | str) -> Encoded:
        """The same with its parts on a device, where :meth:`decode` then computes."""
        codes = {
            name: Codes(part.values.to(device), part.alphabet) for name, part in self.codes.items()
        }
        params = {name: part.to(device) for name, part in self.params.items()}
        return replace(self, codes=codes, params=params)

    @property
    def numel(self) -> int:
        """Number of values of the tensor."""
        count = 1
        for n in self.shape:
            count *= n
        return count

    @property
    def bits(self) -> int:
        """Exact payload in bits, every part at fixed width; headers not included."""
        coded = sum(part.bits for part in self.codes.values())
        return coded + sum(8 * part.numel() * part.element_size() for part in self.params.values())


@runtime_checkable
class Encoder(Protocol):
    """Anything that turns a weight into an :class:`Encoded`."""

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        """Choose codes and parameters for ``weight``."""
        ...


@dataclass(frozen=True)
class Described:
    """A frozen dataclass whose settings survive JSON: formats, training methods, activations."""

    noun: ClassVar[str]
    """What it is, for errors."""

    name: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """Settings that differ from their defaults, as JSON values."""
        values: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.default is MISSING or value != item.default:
                values[item.name] = self._written(value)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`; unknown settings and wrong types are refused."""
        known = {item.name: item for item in fields(cls)}
        settings: dict[str, Any] = {}
        for name, value in values.items():
            if name not in known:
                raise SpecError(
                    f"{cls.noun} {cls.name!r} has no setting {name!r}; known are {', '.join(known)}"
                )
            is_dtype = "dtype" in str(known[name].type) and isinstance(value, str)
            settings[name] = DTYPES.get(value, value) if is_dtype else cls._read(value)
        try:
            return cls(**settings)
        except TypeError as error:
            raise SpecError(f"{cls.noun} {cls.name!r} refuses {dict(values)!r}: {error}") from error

    def _written(self, value: object) -> object:
        """One setting as a JSON value."""
        return dtype_name(value) if isinstance(value, torch.dtype) else value

    @classmethod
    def _read(cls, value: object) -> object:
        """The inverse of :meth:`_written`, but for types of tensors."""
        return value


@dataclass(frozen=True)
class Format(Described, ABC):
    """How numbers are rebuilt from codes: a frozen dataclass whose settings are JSON.

    ``name`` and ``version`` are permanent, because files carry them. Subclasses say which parts
    they have (:meth:`check`), choose parameters (:meth:`fit`), choose codes for given parameters
    (:meth:`assign`) and rebuild the tensor (:meth:`decode`).
    """

    noun: ClassVar[str] = "format"
    version: ClassVar[int] = 1

    @abstractmethod
    def fit(self, weight: Tensor, stats: Stats | None = None) -> dict[str, Tensor]:
        """Parameters chosen from the weight alone: scales, zero points, centroids, by part name."""

    @abstractmethod
    def assign(self, weight: Tensor, params: Mapping[str, Tensor]) -> Encoded:
        """Nearest codes with the parameters held fixed.

        Law: ``assign(assign(w, params).decode(), params)`` decodes to the same values.
        """

    @abstractmethod
    def decode(self, encoded: Encoded) -> Tensor:
        """Rebuild the tensor: float32 multiply and add in a stated order, no fused operations."""

    @abstractmethod
    def check(self, encoded: Encoded) -> None:
        """Raise :class:`SpecError` where the parts do not fit the shape and these settings."""

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        """Nearest codes, with the parameters chosen from the weight."""
        return self.assign(weight, self.fit(weight, stats))

    def machine(self, part: str) -> tuple[int, int] | None:
        """Polynomials of a machine along all axes but the last of a code part, if it has one.

        Driven by the parities of codes (:mod:`dither.formats.parity_machine`), it is a hint to the
        coder.
        """
        del part
        return None

    def multiplications(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Multiplications that decoding takes beyond a few for each value, by the parts' shapes.

        Of memory every format takes the tensor and its parts, and a few megabytes: it decodes a box
        at a time.
        """
        del shapes
        return 0

    def params_of(self, encoded: Encoded) -> dict[str, Tensor]:
        """What :meth:`assign` takes to encode again with the parameters of ``encoded`` held fixed.

        Formats whose parameters include integer parts (zero points, widths) add those.
        """
        return dict(encoded.params)


def expect_parts(encoded: Encoded, codes: set[str], params: set[str]) -> None:
    """Raise :class:`SpecError` unless the parts are exactly those named."""
    for kind, given, expected in (
        ("code", set(encoded.codes), codes),
        ("parameter", set(encoded.params), params),
    ):
        if given != expected:
            raise SpecError(
                f"format {encoded.format.name!r} has the {kind} parts {sorted(expected)}, "
                f"not {sorted(given)}"
            )


def expect_codes(encoded: Encoded, name: str, shape: tuple[int, ...], alphabet: int | None) -> None:
    """Raise :class:`SpecError` unless a code part has this shape and, if given, alphabet."""
    part = encoded.codes[name]
    if tuple(part.values.shape) != shape or (alphabet is not None and part.alphabet != alphabet):
        raise SpecError(
            f"part {name!r} of format {encoded.format.name!r} has shape "
            f"{tuple(part.values.shape)} over {part.alphabet} symbols; expected {shape} over "
            f"{'any number of' if alphabet is None else alphabet} symbols"
        )


def expect_param(encoded: Encoded, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise :class:`SpecError` unless a parameter part has this shape and type."""
    part = encoded.params[name]
    if tuple(part.shape) != shape or part.dtype != dtype:
        raise SpecError(
            f"part {name!r} of format {encoded.format.name!r} has shape {tuple(part.shape)} and "
            f"type {part.dtype}; expected {shape} and {dtype}"
        )
