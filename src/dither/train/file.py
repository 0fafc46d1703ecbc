"""What the file of a run holds: encoded while it is trained, fixed when it is finished."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dither.activations import encodings_of
from dither.archive import CodedTensor, code, packed_nbytes
from dither.core import Encoded, SpecError
from dither.data import Data
from dither.formats import Raw
from dither.train.finish import Trimming, first_changed, reestimate_batch_norm, values_of
from dither.train.method import AfterTraining, begin
from dither.train.plan import Spec
from dither.train.surrogate import Surrogate, encode_now, plain, same_bits


class File:
    """Every tensor of an attached model, as a file holds it.

    Args:
        model: attached.
        surrogates: by the name of the weight.
        buffers: specs of buffers by name.
        aliases: further names of tied tensors.

    Attributes:
        is_absorbing: whether batch norm's statistics move into its weight and bias.
    """

    def __init__(
        self,
        model: nn.Module,
        surrogates: Mapping[str, Surrogate],
        buffers: Mapping[str, Spec],
        aliases: Mapping[str, str],
    ) -> None:
        self.is_absorbing = False
        self.aliases = dict(aliases)
        self._model, self._surrogates, self._buffers = model, surrogates, dict(buffers)
        self._fixed: dict[str, Encoded] | None = None
        self._sites: dict[str, Any] = {}
        self._replaced: dict[str, Tensor] = {}

    @property
    def is_fixed(self) -> bool:
        """Whether it is what evaluation reads."""
        return self._fixed is not None

    def encoded(self) -> dict[str, Encoded]:
        """Every tensor as the file would hold it now."""
        if self._fixed is not None:
            return dict(self._fixed)
        return {name: self._encode(name, value) for name, value in self._values().items()}

    def coded(self) -> tuple[dict[str, CodedTensor], int]:
        """The same with codes compressed, and bytes of the file."""
        coded = {name: code(encoded) for name, encoded in self.encoded().items()}
        return coded, packed_nbytes(coded, self.aliases, sites=self.sites())

    def sites(self) -> dict[str, Any]:
        """Encodings of activations as the file would hold them now, those that have a range."""
        return encodings_of(self._model, is_partial=True).to_json()

    def trimming(self, some: Mapping[str, Surrogate] | None = None) -> Trimming:
        """Its tensors, those that can be made coarser or finer, or some of them, and the others."""
        surrogates = {n: s for n, s in self._surrogates.items() if s.can_trim}
        surrogates = surrogates if some is None else dict(some)
        movable = {n: (s, self._model.get_parameter(n)) for n, s in surrogates.items()}
        fixed = {
            name: code(self._encode(name, value))
            for name, value in self._values().items()
            if name not in movable
        }
        return Trimming(movable, fixed, self.aliases, self.sites())

    def settle(self, nbytes: int) -> None:
        """Move what can be moved now, by one factor of all steps, towards a size."""
        movable = {n: s for n, s in self._surrogates.items() if s.nudges}
        for surrogate in movable.values():
            surrogate.trim = 0.0
        octaves = self.trimming(movable).together(nbytes)
        for surrogate in movable.values():
            surrogate.trim = 0.0
            surrogate.nudge(octaves)

    def refuse(self, budget: int) -> None:
        """Refuse a budget that nothing can reach: see :meth:`Trimming.refuse`."""
        trains = any(not self._surrogates[name].can_trim for name in self._trained())
        self.trimming().refuse(budget, trains=trains)
        for surrogate in self._surrogates.values():
            surrogate.trim = 0.0

    def fix(self, data: Data | None) -> int:
        """Encode all for good; with data, after batch norm was estimated anew. Bytes."""
        weights = {n: self._model.get_parameter(n) for n in self._trained()}
        trained = {name: self._encode(name, plain(weight)) for name, weight in weights.items()}
        for name, fixed in trained.items():
            self._surrogates[name].commit(weights[name], fixed)
        if data is not None:
            reestimate_batch_norm(self._model, data)
        state, encoded = self._model.state_dict(), dict(trained)
        for name, value in self._values().items():
            if name in trained:
                continue
            encoded[name] = self._encode(name, value)
            if name in self._surrogates:
                self._surrogates[name].commit(self._model.get_parameter(name), encoded[name])
            elif not same_bits(value, plain(state[name])) or name in self._buffers:
                self._replaced[name] = state[name].clone()
                state[name].copy_(encoded[name].decode())
        self._fixed, self._sites = encoded, self.sites()
        return packed_nbytes(encoded, self.aliases, sites=self._sites)

    def undo(self) -> None:
        """Training goes on: buffers get their own values back."""
        state = self._model.state_dict() if self._replaced else {}
        for name, value in self._replaced.items():
            state[name].copy_(value)
        self._replaced = {}
        self.forget()
        for surrogate in self._surrogates.values():
            surrogate.reset()

    def forget(self) -> None:
        """What was fixed is no longer what evaluation reads."""
        self._fixed = None

    def final(self) -> tuple[dict[str, Encoded], dict[str, Any]]:
        """What was fixed: tensors, and sites.

        Raises:
            SpecError: nothing is, or something changed since.
        """
        lost = [name for name, s in self._surrogates.items() if s.committed is None]
        if self._fixed is None or lost:
            raise SpecError(
                "the run is not finished, or was trained on since: call finish() first, so that "
                "what you evaluate is what is saved"
            )
        if self._sites != self.sites():
            raise SpecError(
                "ranges of activations changed since finish(), so that what you evaluate is not "
                "what would be saved; call finish() again"
            )
        changed = first_changed(self._model, self._fixed, set(self._surrogates))
        if changed is not None:
            raise SpecError(
                f"{changed!r} changed since finish(), so that what you evaluate is not what would "
                "be saved; call finish() again"
            )
        return self._fixed, self._sites

    def _trained(self) -> list[str]:
        return [n for n, s in self._surrogates.items() if not isinstance(s, AfterTraining)]

    def _values(self) -> dict[str, Tensor]:
        """Every tensor that the file holds, before it is encoded."""
        absorbing = self._surrogates if self.is_absorbing else {}
        return values_of(self._model, self.aliases, absorbing)

    def _encode(self, name: str, value: Tensor) -> Encoded:
        surrogate = self._surrogates.get(name) or begin(self._buffers.get(name, Raw()), value)
        return encode_now(surrogate, value)
