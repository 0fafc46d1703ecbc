"""Means that codes move, taken back in biases and running means, by what batch norms say."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dither.archive import Archive, load_into
from dither.core import Encoded, SpecError
from dither.formats import Affine
from dither.model import duplicate, inner, refuse_attached
from dither.rewrite import expected_inputs, free_pairs
from dither.rewrite.channels import Layer, layer, responses
from dither.rewrite.graph import Graph
from dither.search.tune import fitted


@torch.inference_mode(mode=False)
def correct_means(model: nn.Module, archive: Archive, *, nbytes: int | None = None) -> Archive:
    """Give outputs of layers their original means back, without data and without further bytes.

    Batch norms say what goes into each layer on average, so that what the codes of its weight add
    to its mean outputs is known (Nagel et al. 2019, arXiv 1906.04721, section 4.2): it is taken
    from the layer's bias, or given to the running mean of the norm behind it. Where a convolution
    has few weights for each output, as in depthwise networks, that is most of what is lost at few
    bits; files made with data have their means from samples already.

    Args:
        model: the original, with batch norms; it is not changed.
        archive: made of it by :func:`dither.compress`.
        nbytes: the most the file may take; by default its present size.

    Returns:
        A new archive; or the given one, if there is nothing to correct or it would not fit.

    Raises:
        SpecError: torch.fx cannot trace the model, or the archive has a base or quantizes
            activations.

    >>> import dither
    >>> first, norm, last = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 9, 3)
    >>> model = nn.Sequential(first, norm, nn.ReLU(), last)
    >>> archive = dither.compress(model.eval(), "10x")
    >>> correct_means(model, archive).nbytes <= archive.nbytes
    True
    """
    refuse_attached(model, "correct_means")
    model = inner(model)
    if archive.base is not None or archive.sites:
        raise SpecError("means are corrected in files without a base and without activations")
    room = archive.nbytes if nbytes is None else nbytes
    small = duplicate(model)
    load_into(small, archive)
    held = {name: archive.encoded(name) for name in archive.entries}
    named = model.state_dict()
    moved = {
        name: _encoded(held[name], named[name].cpu().double() + shift.cpu())
        for name, shift in _shifts(model, small)
        if name in held and bool(shift.isfinite().all())
    }
    found = fitted(archive, held, moved, room) if moved else None
    return archive if found is None else found


def refuse_without_order(source: object) -> None:
    """Refuse what has no batch norms in an order of use, before any work is done.

    Raises:
        SpecError: it is not a model; torch.fx cannot trace it.
    """
    if not isinstance(source, nn.Module):
        raise SpecError(
            "norms=True reads batch norms in the order of use: give the model, not its tensors"
        )
    Graph(inner(source))


def _shifts(model: nn.Module, small: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """By the name of a bias or a running mean, what is to be added to it, float64."""
    norms = dict(Graph(model).pairs(Layer, _BatchNorm))
    expected = {n: p for n, p in expected_inputs(model).items() if p.mean is not None}
    for name, _ in free_pairs(model, [(name, "") for name in expected], layers=1):
        mean, module = expected[name].mean, layer(model, name)
        assert mean is not None  # noqa: S101 - for mypy
        error = layer(small, name).weight.detach().double() - module.weight.detach().double()
        shift = responses(module, mean, error)
        if module.bias is not None:
            yield f"{name}.bias", -shift
        elif name in norms and model.get_submodule(norms[name]).running_mean is not None:
            yield f"{norms[name]}.running_mean", shift


def _encoded(held: Encoded, value: Tensor) -> Encoded:
    """A vector on the grid that it was on."""
    fmt, value = held.format, value.to(held.dtype)
    if isinstance(fmt, Affine):
        return fmt.assign(value, fmt.params_of(held))
    return fmt.encode(value)
