"""What calibration data says about one site, and the range chosen from it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from dither.activations.encodings import Encoding
from dither.activations.functions import kind_of
from dither.activations.histogram import Histogram, search
from dither.activations.integer_grid import cover, integers
from dither.activations.quantizer import Quantizer
from dither.activations.site_spec import Activation
from dither.core import SpecError


class Observer:
    """Sees every tensor that passes at a site.

    Args:
        site: its name, for errors.
        spec: which range is to be chosen.
        order: of the dimensions, where groups are sorted by range. While it is None for such a
            spec, only the ranges of single dimensions are found: see :func:`sort_dimensions`.

    Raises:
        SpecError: the range does not come from data.
    """

    def __init__(self, site: str, spec: Activation, order: Tensor | None = None) -> None:
        if spec.ranges == "norms":
            raise SpecError(
                f"{site!r}: ranges='norms' come from batch norms, not from data; take them from "
                "dither.recipes.white_paper.ranges_by_norms, or give ranges='mse'"
            )
        self.site = site
        self.spec = spec
        self.seen = 0
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self._order = order
        self._batch: tuple[Tensor, Tensor] | None = None
        self._histogram = Histogram(spec.groups)
        self._logits: list[Tensor] = []
        self._per_dimension = spec.is_sorted and order is None
        self._is_known = is_share(site, spec)
        self._quantizer = Quantizer(spec)
        if order is not None:
            self._quantizer.set_order(order)

    def see(self, values: Tensor) -> Tensor:
        """Take note of a tensor; returns it.

        Raises:
            SpecError: it is not finite, or its dimensions do not divide into the groups.
        """
        if not values.numel():
            return values
        self.seen += 1
        if self.spec.is_dynamic and not self._per_dimension:
            return values
        single = values.detach().float()
        if self._per_dimension:
            rows = single.movedim(self.spec.axis, -1).flatten(0, -2)
            low, high = rows.amin(0), rows.amax(0)
        else:
            self._quantizer.to(values.device)
            low, high = self._quantizer.extremes(single)
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise SpecError(
                f"a value at {self.site!r} is not finite; quantize another site, or mask with "
                "finite numbers"
            )
        low, high = low.cpu(), high.cpu()
        if self._batch is not None:
            low, high = torch.minimum(low, self._batch[0]), torch.maximum(high, self._batch[1])
        self._batch = (low, high)
        if not self._per_dimension:
            self._keep(single)
        return values

    def end_batch(self) -> None:
        """A batch is over: moving averages move."""
        if self._batch is None:
            return
        (low, high), self._batch = self._batch, None
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        elif self.spec.ranges == "running" and not self._per_dimension:
            old = self.spec.momentum
            self.low = low * (1 - old) + self.low * old
            self.high = high * (1 - old) + self.high * old
        else:
            self.low, self.high = torch.minimum(low, self.low), torch.maximum(high, self.high)

    def encoding(self) -> Encoding:
        """The grid chosen."""
        if not self.spec.is_dynamic:
            self._quantizer.set(*self._range())
        return Encoding.of(self._quantizer)

    def _keep(self, values: Tensor) -> None:
        if self.spec.ranges == "crossentropy":
            self._logits.append(values.movedim(self.spec.axis, -1).flatten(0, -2).cpu())
        elif self.spec.ranges in {"percentile", "mse"}:
            groups = self.spec.groups
            if groups == 1:
                self._histogram.add(values.reshape(1, -1))
                return
            rows = values.movedim(self.spec.axis, -1)
            rows = rows if self._order is None else rows[..., self._order.to(rows.device)]
            boxes = rows.unflatten(-1, (groups, -1)).movedim(-2, 0)
            self._histogram.add(boxes.reshape(groups, -1))

    def _range(self) -> tuple[Tensor, Tensor]:
        spec = self.spec
        if self._is_known:
            return torch.zeros(spec.groups), torch.ones(spec.groups)
        if spec.ranges == "percentile":
            return self._histogram.percentile(spec.percentile / 100)
        if spec.ranges == "mse":
            return self._histogram.least_squares(spec.bits, symmetric=spec.symmetric)
        if self.low is None or self.high is None:
            raise SpecError(f"nothing passed at {self.site!r}")
        if spec.ranges == "crossentropy":
            return self._least_cross_entropy(float(self.low), float(self.high))
        return self.low, self.high

    def _least_cross_entropy(self, low: float, high: float) -> tuple[Tensor, Tensor]:
        """The range that changes the softmax least (Nagel et al. 2021, section 3.1)."""
        logits = torch.cat(self._logits)
        target = logits.softmax(-1)

        def error(least: float, most: float) -> float:
            scale, zero = cover(
                torch.tensor(least), torch.tensor(most), self.spec.bits, symmetric=spec_symmetric
            )
            values = (integers(logits, scale, zero, self.spec.bits) - zero) * scale
            return float(functional.cross_entropy(values, target))

        spec_symmetric = self.spec.symmetric
        found = search(error, low, high)
        return torch.tensor([found[0]]), torch.tensor([found[1]])


def is_share(site: str, spec: Activation) -> bool:
    """Whether values are known to lie from 0 to 1: what comes out of a softmax.

    The least and greatest of the calibration data would say less. Other ``ranges`` are measured.
    """
    is_softmax = kind_of(site.rpartition("@")[2]) == "softmax"
    return is_softmax and spec.ranges == "minmax" and not spec.is_dynamic


def started(quantizer: Quantizer, site: str) -> Quantizer:
    """A new quantizer of a site, with the range that is known beforehand, if it is."""
    if is_share(site, quantizer.spec):
        groups = quantizer.spec.groups
        quantizer.set(torch.zeros(groups), torch.ones(groups))
    return quantizer


def sort_dimensions(observers: Mapping[str, Observer]) -> dict[str, Tensor]:
    """The order of the dimensions of each site by their ranges (Bondarenko et al. 2021).

    Sites that share a permutation are sorted by the largest range that a dimension has at any.

    Raises:
        SpecError: sites that share have different dimensions, or these do not divide into groups.
    """
    together: dict[tuple[str, ...], list[str]] = {}
    for site, observer in observers.items():
        if observer.low is None:
            continue
        share = observer.spec.share
        path = site.rpartition("@")[0].split(".")
        key = (site,) if share is None else ("", *path[:share])
        together.setdefault(key, []).append(site)
    orders: dict[str, Tensor] = {}
    for sites in together.values():
        ranges = [_widths(observers[site]) for site in sites]
        if len({len(r) for r in ranges}) > 1:
            raise SpecError(
                f"{sites} cannot share a permutation: they have {[len(r) for r in ranges]} "
                "dimensions; give share= to those alike only"
            )
        order = torch.stack(ranges).amax(0).sort(stable=True).indices
        orders |= dict.fromkeys(sites, order)
    return orders


def _widths(observer: Observer) -> Tensor:
    if observer.low is None or observer.high is None:
        raise SpecError(f"nothing passed at {observer.site!r}")
    return observer.high - observer.low
