"""Grids of activations to try beside a file's weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from dither.activations import Activation, inputs_of_layers, observe
from dither.archive import Archive, load_into, pack, packed_nbytes
from dither.core import BudgetError, SpecError
from dither.data import Data
from dither.model import duplicate
from dither.search.trials import Bench

Sites = str | Mapping[str, Any]
"""``"int8"``, or a plan: glob to :class:`~dither.Activation`."""

_SHARE = 0.03
_NBYTES = 64


def plans_of(sites: Sites, model: nn.Module, data: Data) -> dict[str, Mapping[str, Any]]:
    """Plans to try by what they are: one's own, or those that a text such as ``"int8"`` stands for.

    These are static ranges, the extremes and those of least squared error, and a range for each
    token, found as it passes, for what goes into layers other than convolutions: transformers have
    tokens with outliers that widen the range of all (Bondarenko et al. 2021).

    Raises:
        SpecError: the text stands for nothing.
    """
    if not isinstance(sites, str):
        return {"activations": sites}
    match = re.fullmatch(r"int([2-9]|1[0-6])", sites)
    if match is None:
        raise SpecError(
            f'activations={sites!r}: give "int2" to "int16", or a plan such as '
            '{"*@in": Activation(8)}'
        )
    bits, modules = int(match[1]), dict(model.named_modules())
    found = inputs_of_layers(model, data)
    convolved = {site for site in found if isinstance(modules[site.removesuffix("@in")], _ConvNd)}
    least = Activation(bits, ranges="mse")
    plans: dict[str, Mapping[str, Any]] = {
        f"activations {sites}": dict.fromkeys(found, Activation(bits)),
        f"activations {sites}, mse": dict.fromkeys(found, least),
    }
    if len(convolved) < len(found):
        token = Activation(bits, per="token")
        by_token = {site: least if site in convolved else token for site in found}
        plans[f"activations {sites}, by token"] = by_token
    return plans


def nbytes_of(plans: Mapping[str, Mapping[str, Any]], model: nn.Module, data: Data) -> int:
    """What the grids of the largest plan take in a file, with room for other numbers in them."""
    sizes = [
        packed_nbytes({}, sites=observe(model, plan, data).to_json()) - packed_nbytes({})
        for plan in plans.values()
    ]
    return max((round(size * (1 + _SHARE)) + _NBYTES for size in sizes), default=0)


def try_plans(
    bench: Bench,
    plans: Mapping[str, Mapping[str, Any]],
    metadata: Mapping[str, Any],
    budget: int,
) -> None:
    """The best file with grids of activations, chosen with its weights in place.

    Args:
        bench: has a best file; it gets the better ones.
        plans: to be tried, at least one; one is kept.
        metadata: of the file.
        budget: bytes for weights and grids.

    Raises:
        BudgetError: no grids fit beside the weights.
    """
    best, model = bench.winner(), duplicate(bench.model)
    load_into(model, best)
    tensors = {name: best.encoded(name) for name in best.entries}
    is_first = True
    for stage, plan in plans.items():

        def make(plan: Mapping[str, Any] = plan) -> Archive | None:
            found = observe(model, plan, bench.data)
            archive = pack(tensors, best.aliases, metadata, found.to_json())
            return archive if archive.nbytes <= budget else None

        is_first = not bench.attempt(stage, make, keep=is_first) and is_first
    if is_first:
        raise BudgetError(f"encodings of activations do not fit into {budget} bytes beside weights")
