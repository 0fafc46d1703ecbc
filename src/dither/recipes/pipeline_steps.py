"""Steps of the white paper's pipelines, each reported; see :mod:`dither.recipes.white_paper`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dither.activations import Activation, Encoding, Encodings, apply, inputs_of_layers, observe
from dither.archive import Archive, pack
from dither.calibrate import in_sequence
from dither.core import Encoded, Encoder, SpecError
from dither.data import Data
from dither.encoders import AdaRound, Ranges
from dither.formats import Affine, Raw
from dither.model import collect, duplicate, evaluating
from dither.recipes.model_layers import layers
from dither.rewrite import (
    Channels,
    Passing,
    absorb_biases,
    chains,
    correct_biases,
    correct_biases_by_norms,
    equalize,
    expected_inputs,
    fold_batch_norm,
    free_pairs,
    replace_relu6,
)


@dataclass(frozen=True)
class Step:
    """One step of a pipeline.

    Attributes:
        name: of the step.
        said: what it did, or why it was left out.
        distance: of outputs from the original model's, mean of the batches.
        seconds: it took.
    """

    name: str
    said: str
    distance: float
    seconds: float


@dataclass
class Quantized:
    """A model after a pipeline.

    Attributes:
        model: a changed copy, which computes with the values on their grids.
        steps: what was done to it, in order.
        encoded: weights by name.
        sites: grids of activations.
    """

    model: nn.Module
    steps: list[Step] = field(default_factory=list)
    encoded: dict[str, Encoded] = field(default_factory=dict)
    sites: Encodings = field(default_factory=lambda: Encodings({}))

    def archive(self, metadata: Mapping[str, Any] | None = None) -> Archive:
        """A file that is this model; it loads into one of this structure, with norms folded."""
        tensors = collect(self.model)
        found = {
            name: self.encoded[name] if name in self.encoded else Raw().encode(value)
            for name, value in tensors.values.items()
        }
        return pack(found, tensors.aliases, metadata or {}, self.sites.to_json())

    def __str__(self) -> str:
        """A line for each step."""
        rows = [f"{s.name:22} {s.distance:<10.4g} {s.seconds:6.1f} s  {s.said}" for s in self.steps]
        return "\n".join([f"{'step':22} {'distance':10} {'time':>8}", *rows])


def ranges_by_norms(spec: Activation, expected: Mapping[str, Passing]) -> Encodings:
    """Grids for what goes into layers without data: ``min(b - 6 g)`` to ``max(b + 6 g)``.

    ``b`` and ``g`` are the biases and weights of batch norms (section 3.1 of the white paper), and
    ends pass through what stands between a norm and the layer. The paper's figures for MobileNetV2
    at 8, 6 and 4 bits are 71.32, 65.20 and 0.66 % (least squared error: 71.35, 67.55, 13.57).

    Args:
        spec: with ``ranges="norms"``.
        expected: from :func:`dither.rewrite.expected_inputs`, whose ``deviations`` are the 6.

    Returns:
        By site; of layers whose norms say nothing there is none.

    >>> net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU6(), nn.Conv2d(3, 4, 1)).eval()
    >>> found = ranges_by_norms(Activation(8, ranges="norms"), expected_inputs(net))
    >>> {site: round(255 * grid.scale[0], 6) for site, grid in found.items()}
    {'2@in': 6.0}
    """
    return Encodings(
        {
            f"{name}@in": Encoding.covering(spec, float(p.low.min()), float(p.high.max()))
            for name, p in expected.items()
            if p.low is not None and p.high is not None
        }
    )


class Pipeline:
    """A model under way; the steps are in the order of the white paper."""

    def __init__(self, model: nn.Module, data: Data | Iterable[Any], form: Affine) -> None:
        self.data, self.format = Data.of(data).held(), form
        self.found = Quantized(duplicate(model).eval())
        with evaluating(model), torch.no_grad():
            self._wanted = [self.data.output(model, batch) for batch in self.data]
        self._channels: dict[str, Channels] = {}
        self._before: dict[str, Tensor] = {}
        self._began = time.monotonic()

    def fold(self) -> None:
        """Batch norms into the layers before them."""
        try:
            self._channels = fold_batch_norm(self.found.model)
        except SpecError as error:
            self._note("fold batch norms", f"left out: {error}")
        else:
            self._note("fold batch norms", f"{len(self._channels)} layers")

    def equalize(self, wanted: bool | None) -> None:  # noqa: FBT001 - three-valued
        """Like ranges on both sides of channels, and high biases absorbed."""
        name = "equalize"
        if wanted is False or (wanted is None and not self._may_help()):
            self._note(name, "left out")
            return
        changed = duplicate(self.found.model)
        try:
            swapped = replace_relu6(changed)
            pairs = free_pairs(changed, chains(changed), say=False)
            factors = equalize(changed, pairs)
            channels = {
                n: c.scaled(factors[n]) if n in factors else c for n, c in self._channels.items()
            }
            absorbed = absorb_biases(changed, channels, pairs)
        except SpecError as error:
            self._note(name, f"left out: {error}")
            return
        said = f"{len(factors)} pairs, {len(swapped)} ReLU6 to ReLU, {len(absorbed)} absorbed"
        if wanted is None and self._rounded(changed) >= self._rounded(self.found.model):
            self._note(name, f"left out, since it does not help: {said}")
            return
        for n, taken in absorbed.items():
            channels[n] = Channels(channels[n].mean - taken, channels[n].deviation)
        self.found.model, self._channels = changed, channels
        self._note(name, said)

    def nearest(self) -> None:
        """Nearest codes, in ranges of the least squared error."""
        encoder = Ranges(self.format)
        self._place({n: encoder.encode(w.detach()) for n, w in self._weights().items()})
        self._note("weights, nearest", f"{len(self.found.encoded)} tensors, {self.format!r}")

    def round(self, encoder: AdaRound) -> None:
        """AdaRound in the order of use; what no sample reaches gets nearest codes."""
        weights = self._weights()
        chosen: dict[str, Encoder] = dict.fromkeys(weights, encoder)
        made = in_sequence(self.found.model, self.data, chosen)
        rest = {n: Ranges(self.format).encode(w.detach()) for n, w in weights.items()}
        self._place(rest | made)
        self._note("weights, AdaRound", f"{len(made)} of {len(rest)} tensors, {self.format!r}")

    def correct(self, rounding: str) -> None:
        """Mean outputs of layers as they were, by biases."""
        if not rounding.startswith("correct"):
            return
        original = duplicate(self.found.model)
        with torch.no_grad():
            for name, weight in self._before.items():
                original.get_parameter(name).copy_(weight)
        if rounding == "correct biases":
            shifts = correct_biases(self.found.model, original, self.data)
        else:
            shifts = correct_biases_by_norms(self.found.model, original, self._expected())
        self._note(rounding, f"{len(shifts)} of {len(self._before)} layers")

    def activate(self, spec: Activation) -> None:
        """Grids for what goes into layers."""
        model = self.found.model
        sites, said = inputs_of_layers(model, self.data), f"{spec!r}"
        known: dict[str, Encoding] = {}
        if spec.ranges == "norms":
            known = {s: e for s, e in ranges_by_norms(spec, self._expected()).items() if s in sites}
            spec = replace(spec, ranges="mse")
            said += f", {len(known)} by norms"
        rest = dict.fromkeys((site for site in sites if site not in known), spec)
        if rest:
            known |= observe(model, rest, self.data)
        self.found.sites = Encodings(known)
        apply(model, self.found.sites)
        self._note("activations", f"{len(known)} sites, {said}")

    def _expected(self) -> dict[str, Passing]:
        """What norms say of inputs; nothing of a model that cannot be traced."""
        try:
            return expected_inputs(self.found.model, self._channels)
        except SpecError:
            return {}

    def _may_help(self) -> bool:
        modules = self.found.model.modules()
        return self.format.axis is None or any(
            isinstance(m, _ConvNd) and m.groups > 1 for m in modules
        )

    def _weights(self) -> dict[str, nn.Parameter]:
        model = self.found.model
        return {layer.name: model.get_parameter(layer.name) for layer in layers(model)}

    def _place(self, encoded: Mapping[str, Encoded]) -> None:
        weights = self._weights()
        self._before = {name: weight.detach().clone() for name, weight in weights.items()}
        self.found.encoded = dict(encoded)
        with torch.no_grad():
            for name, value in encoded.items():
                weights[name].copy_(value.decode())

    def _rounded(self, model: nn.Module) -> float:
        """The distance of outputs with nearest codes."""
        changed = duplicate(model)
        with torch.no_grad():
            for layer in layers(changed):
                weight = changed.get_parameter(layer.name)
                weight.copy_(Ranges(self.format).encode(weight.detach()).decode())
        return self._distance(changed)

    def _distance(self, model: nn.Module) -> float:
        with evaluating(model), torch.no_grad():
            pairs = zip(self.data, self._wanted, strict=True)
            made = [float(self.data.distance(self.data.output(model, b), w)) for b, w in pairs]
        return sum(made) / len(made)

    def _note(self, name: str, said: str) -> None:
        distance, now = self._distance(self.found.model), time.monotonic()
        self.found.steps.append(Step(name, said, distance, now - self._began))
        self._began = now
