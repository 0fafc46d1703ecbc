"""What is to be quantized: weights and sites, from a plan, from encodings or from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dither.activations import (
    Activation,
    Encoding,
    Encodings,
    apply,
    inputs_of_layers,
    observe,
    placed,
    remove,
)
from dither.archive import Archive
from dither.calibrate.inputs import has_vectors, outputs_axis
from dither.core import CheckpointError, Encoded, Format, SpecError
from dither.data import Data
from dither.formats import Affine
from dither.model import weights_of
from dither.report.signal_noise import Noise
from dither.train.method import begin
from dither.train.plan import Plan, Rule, as_plan

DEFAULT_BITS = 8

_SHOWN = 3


@dataclass(frozen=True)
class Targets:
    """What is quantized, and how.

    Attributes:
        weights: by name, the parameters or buffers that get the values: one, or more where a file
            ties what the model does not.
        encoded: a name to what it becomes; a file is read anew each time.
        formats: of the weights.
        sites: the grids of activations.
    """

    weights: Mapping[str, Sequence[Tensor]]
    encoded: Callable[[str], Encoded]
    formats: Mapping[str, Format]
    sites: Encodings


def targets_of(model: nn.Module, plan: Plan | Mapping[str, Any] | None, samples: Data) -> Targets:
    """The targets that a plan, encodings or an archive name.

    Raises:
        SpecError: a rule that fits nothing, or a site or tensor that the model lacks.
        CheckpointError: the archive is of another model.
    """
    if isinstance(plan, Archive):
        return _of_archive(model, plan)
    if plan is None:
        return _of_rules(model, _default_rules(model, samples), samples)
    if isinstance(plan, Mapping) and _are_encodings(plan):
        return _of_encodings(model, plan)
    return _of_rules(model, as_plan(plan), samples)


def _default_rules(model: nn.Module, samples: Data) -> Plan:
    """8 bits for matrices and kernels, and for what goes into modules that hold weights."""
    rules: dict[str, Rule] = {}
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), module)
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight.is_floating_point() and weight.ndim > 1:
            owner = owners[id(weight)]
            is_layer = has_vectors(owner) and weight.ndim == owner.get_parameter("weight").ndim
            rules[name] = Affine(DEFAULT_BITS, axis=outputs_axis(owner) if is_layer else 0)
    for site in inputs_of_layers(model, samples):
        rules[site] = Activation(DEFAULT_BITS)
    return Plan(rules)


def _of_rules(model: nn.Module, plan: Plan, samples: Data) -> Targets:
    specs = plan.resolve(model)
    sites = [(glob, spec) for glob, spec in plan if isinstance(spec, Activation)]
    if not specs and not sites:
        raise SpecError(f"the plan matches no weight and has no site: {dict(plan.rules)!r}"[:300])
    state = _state(model)
    encoded: dict[str, Encoded] = {}
    for name, spec in specs.items():
        weight = state[name].detach()
        try:
            encoded[name] = begin(spec, weight).encode(weight)
        except SpecError as error:
            raise SpecError(f"{name!r} cannot be encoded as the plan says: {error}") from error
    grids = observe(model, sites, samples) if sites else Encodings()
    return _held(state, encoded, grids)


def _are_encodings(plan: Mapping[str, Any]) -> bool:
    return bool(plan) and all(isinstance(v, Encoded | Encoding) for v in plan.values())


def _of_encodings(model: nn.Module, found: Mapping[str, Any]) -> Targets:
    state = _state(model)
    encoded = {name: item for name, item in found.items() if isinstance(item, Encoded)}
    sites = {site: item for site, item in found.items() if isinstance(item, Encoding)}
    _require(state, {name: item.shape for name, item in encoded.items()}, "these encodings")
    grids = _existing(model, Encodings(sites))
    return _held(state, encoded, grids)


def _of_archive(model: nn.Module, archive: Archive) -> Targets:
    state = _state(model)
    entries, aliases = archive.entries, archive.aliases
    _require(state, {n: entries[aliases.get(n, n)].shape for n in archive}, "the archive")
    places = {
        name: [state[name], *(state[alias] for alias, first in aliases.items() if first == name)]
        for name, entry in entries.items()
        if state[name].is_floating_point() and entry.numel
    }
    formats = {name: entries[name].format for name in places}
    grids = _existing(model, Encodings.from_json(archive.sites))
    return Targets(places, archive.encoded, formats, grids)


def _held(state: Mapping[str, Tensor], encoded: dict[str, Encoded], grids: Encodings) -> Targets:
    """Targets whose encodings are in memory."""
    formats = {name: item.format for name, item in encoded.items()}
    return Targets({n: [state[n]] for n in encoded}, encoded.__getitem__, formats, grids)


def _require(state: Mapping[str, Tensor], shapes: Mapping[str, Any], owner: str) -> None:
    unknown = [name for name in shapes if name not in state]
    other = [n for n, shape in shapes.items() if n in state and tuple(state[n].shape) != shape]
    if not (unknown or other):
        return
    first = (unknown or other)[0]
    why = "has no such tensor" if unknown else f"has shape {tuple(state[first].shape)} there"
    raise CheckpointError(
        f"{owner}: {first!r} of shape {tuple(shapes[first])}, but the model {why}; "
        f"{len(unknown) + len(other)} of {len(shapes)} names do not fit: give the model that was "
        "compressed"
    )


def _existing(model: nn.Module, grids: Encodings) -> Encodings:
    modules = dict(model.named_modules())
    missing = [site for site in grids if site.rpartition("@")[0] not in modules]
    if missing:
        raise SpecError(f"the model has no module for the sites {', '.join(missing[:_SHOWN])}")
    return grids


def _state(model: nn.Module) -> dict[str, Tensor]:
    return weights_of(model.state_dict(keep_vars=True))


# --- for a while ---------------------------------------------------------------------------------


@contextmanager
def weights_quantized(
    targets: Targets, names: Sequence[str], noises: Mapping[str, Noise]
) -> Iterator[None]:
    """These weights stand at their quantized values; then back to what they were, bit for bit."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for name in names:
            value = targets.encoded(name).decode()
            for place in targets.weights[name]:
                kept.append((place, place.detach().clone()))
                with torch.no_grad():
                    place.copy_(value)
            if name in noises:
                noises[name].add(kept[-1][1], kept[-1][0])
        yield
    finally:
        for place, before in reversed(kept):
            with torch.no_grad():
                place.copy_(before)


@contextmanager
def sites_quantized(
    model: nn.Module, targets: Targets, sites: Sequence[str], noises: Mapping[str, Noise]
) -> Iterator[None]:
    """What passes at these sites is quantized, and noted; then nothing is left of that."""
    try:
        if sites:
            apply(model, Encodings({site: targets.sites[site] for site in sites}))
        for site, quantizer in placed(model).items():
            if site in noises:
                # It goes with the quantizer.
                quantizer.register_forward_hook(partial(_note, noises[site]))
        yield
    finally:
        remove(model)


def _note(noise: Noise, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    noise.add(args[0], output)
