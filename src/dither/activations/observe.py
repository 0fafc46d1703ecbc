"""Observe, apply, train and remove the quantization of activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dither.activations.encodings import Encoding, Encodings
from dither.activations.functions import (
    KINDS,
    Change,
    Find,
    asks_function,
    is_function,
    kind_of,
    watching,
)
from dither.activations.gradients import GradientQuantizer
from dither.activations.observers import Observer, sort_dimensions, started
from dither.activations.quantizer import Quantizer
from dither.activations.site_spec import Activation
from dither.activations.sites import Rules, displace, on_input, on_output, place, placed, resolve
from dither.core import SpecError
from dither.data import Data, Forward
from dither.model import evaluating


def observe(model: nn.Module, plan: Rules, data: Data | Iterable[Any]) -> Encodings:
    """Choose a grid for every site of a plan by what passes there.

    The model runs in evaluation mode without gradients, as it is: with its weights quantized or
    not, and without quantized activations. It is left as it was. Sites at which no floating-point
    tensor passes are left out, unless a rule names them exactly. Functions, for rules such as
    ``"*@add*"``, are those that the first batch calls.

    Args:
        model: any module.
        plan: ``glob -> Activation``; rules about weights and gradients are passed over.
        data: a loader of batches, or :class:`~dither.Data`; labels are not needed. They are kept
            in memory where two passes are needed (groups sorted by range).

    Returns:
        The encodings, for :func:`apply` and the file.

    Raises:
        SpecError: a rule that matches nothing, an empty loader, values that are not finite, or
            dimensions that do not divide into groups.

    >>> layer = nn.Linear(2, 2)
    >>> found = observe(layer, {"@in": Activation(8)}, [torch.tensor([[0.0, 2.55]])])
    >>> found["@in"]
    Encoding(spec=Activation(bits=8), scale=(0.009999999776482582,), zero=(0,), order=())
    """
    if placed(model):
        raise SpecError("this model's activations are quantized already; call remove(model) first")
    rules = list(plan.items() if isinstance(plan, Mapping) else plan)
    samples = Data.of(data)
    specs, read = _resolved(model, rules, iter(samples), samples.forward)
    sites = {site: spec for site, spec in specs.items() if isinstance(spec, Activation)}
    is_twofold = any(spec.is_sorted for spec in sites.values())
    batches = list(read) if is_twofold else read
    orders: dict[str, Tensor] = {}
    if is_twofold:
        widths = {site: Observer(site, spec) for site, spec in sites.items() if spec.is_sorted}
        _run(model, widths, batches, samples.forward)
        orders = sort_dimensions(widths)
    observers = {site: Observer(site, spec, orders.get(site)) for site, spec in sites.items()}
    _run(model, observers, batches, samples.forward)
    named = {glob for glob, _ in rules}
    silent = [site for site, observer in observers.items() if not observer.seen]
    if missed := [site for site in silent if site in named]:
        raise SpecError(
            f"no floating-point tensor passed at {missed[0]!r}: the module was not called (its "
            "owner may read its weights directly), it takes integers, or it calls no such "
            "function; name another site"
        )
    return Encodings({s: o.encoding() for s, o in observers.items() if s not in silent})


def _resolved(
    model: nn.Module, rules: list[tuple[str, Any]], read: Iterator[Any], forward: Forward
) -> tuple[dict[str, Any], Iterator[Any]]:
    """The specs of sites, and the batches, of which functions take a look at the first."""
    called: list[str] = []
    if any(asks_function(glob) for glob, _ in rules):
        batch = next(read)
        called = functions(model, Data([batch], forward))
        read = chain([batch], read)
    return dict(resolve(model, rules, called)), read


def functions(model: nn.Module, data: Data | Iterable[Any]) -> list[str]:
    """Sites of functions that the first batch reaches, in the order in which it does.

    ``path@add`` are sums of two tensors, ``@matmul`` products, ``@scores`` what goes into a
    softmax, ``@softmax`` what comes out: all that the module's own `forward` computes, its
    children's apart. The second of a kind in a call is ``path@add.1``, and so on. Attention in one
    function (``scaled_dot_product_attention``) is computed step by step for this.

    Args:
        model: any module; it runs in evaluation mode, and is left as it was.
        data: a loader, or :class:`~dither.Data`; its first batch is run.

    >>> class Residual(nn.Module):
    ...     def forward(self, x):
    ...         return x + x.softmax(-1)
    >>> functions(nn.Sequential(Residual()), [torch.ones(1, 2)])
    ['0@scores', '0@softmax', '0@add']
    """
    found: dict[str, None] = {}
    samples = Data.of(data)

    def table(path: str) -> tuple[Find, Iterable[str]]:
        def note(end: str) -> None:
            found[f"{path}@{end}"] = None

        return note, KINDS

    with watching(model, table), evaluating(model), torch.no_grad():
        samples.forward(model, next(iter(samples)))
    return list(found)


def apply(model: nn.Module, encodings: Encodings | Mapping[str, Any]) -> Encodings:
    """Quantize activations from here on: the integers that the encodings say, in floating point.

    In place: parameters and their names stay; call it before the model is compiled or wrapped.
    Sites that are quantized already get the new grid.

    Args:
        model: any module.
        encodings: from :func:`observe`, or their JSON (``archive.sites``).

    Returns:
        The encodings.

    Raises:
        SpecError: the model lacks a site, or an encoding is damaged; nothing is changed then.
    """
    _refuse_wrapped(model)
    table = encodings if isinstance(encodings, Encodings) else Encodings.from_json(encodings)
    quantizers = {site: encoding.quantizer() for site, encoding in table.items()}
    names = dict(model.named_modules())
    for site in quantizers:
        path, at, end = site.rpartition("@")
        if path not in names or not at or not (end in {"in", "out"} or is_function(end)):
            raise SpecError(
                f"the model has no site {site!r}: it has no module {path!r}; use the model that "
                "the encodings are of"
            )
    for site, quantizer in quantizers.items():
        place(model, site, quantizer)
    return table


def begin(model: nn.Module, plan: Rules) -> list[str]:
    """Quantize activations and gradients whose ranges come from training itself.

    A site's first step uses the extremes of the tensor at hand; call :func:`step` after each
    optimizer step (a :class:`dither.Run` does). Sites that are quantized already stay as they are,
    so :func:`apply` may go before.

    Args:
        model: any module.
        plan: ``glob -> Activation or Gradient``; rules about weights are passed over.

    Returns:
        The sites of the plan.

    Raises:
        SpecError: a rule that matches nothing, or groups that need calibration data.
    """
    _refuse_wrapped(model)
    there = placed(model)
    specs = resolve(model, plan)
    for site, spec in specs.items():
        if site not in there and isinstance(spec, Activation) and spec.is_sorted:
            raise SpecError(
                f"{site!r} has groups sorted by range, which need calibration data: observe and "
                "apply first, or give permute=False"
            )
    for site, spec in specs.items():
        if site in there:
            continue
        if isinstance(spec, Activation):
            place(model, site, started(Quantizer(spec), site))
        else:
            place(model, site, GradientQuantizer(spec, site))
    return list(specs)


def step(model: nn.Module) -> None:
    """Say that an optimizer step is done: ranges move to what was seen."""
    for quantizer in placed(model).values():
        quantizer.step()


def encodings_of(model: nn.Module, *, is_partial: bool = False) -> Encodings:
    """The grids that a model's activations are on in evaluation.

    Args:
        model: any module.
        is_partial: leave out sites that have no range yet.

    Raises:
        SpecError: a site has no range yet.
    """
    quantizers = {s: q for s, q in placed(model).items() if isinstance(q, Quantizer)}
    return Encodings(
        {s: Encoding.of(q) for s, q in quantizers.items() if q.has_range or not is_partial}
    )


def remove(model: nn.Module) -> None:
    """Take all quantization of activations and gradients away; weights stay as they are."""
    for module in list(model.modules()):
        displace(module)


def _refuse_wrapped(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod") or isinstance(
        model, nn.DataParallel | nn.parallel.DistributedDataParallel
    ):
        raise SpecError(
            f"this {type(model).__name__} is wrapped already; quantize the activations of the "
            "plain model, and then give it to DDP or torch.compile"
        )


def _run(
    model: nn.Module, observers: Mapping[str, Observer], batches: Iterable[Any], forward: Forward
) -> None:
    """Let observers see what passes."""
    handles = []
    tables: dict[str, dict[str, Change]] = {}
    try:
        for site, observer in observers.items():
            path, _, end = site.rpartition("@")
            module = model.get_submodule(path)
            if is_function(end):
                tables.setdefault(path, {})[end] = observer.see
            elif end == "in":
                handles.append(
                    module.register_forward_pre_hook(_input_hook(observer), with_kwargs=True)
                )
            else:
                handles.append(module.register_forward_hook(_output_hook(observer)))
        with _watching(model, tables), evaluating(model), torch.no_grad():
            for batch in batches:
                forward(model, batch)
                for observer in observers.values():
                    observer.end_batch()
    finally:
        for handle in handles:
            handle.remove()


def _watching(
    model: nn.Module, tables: Mapping[str, Mapping[str, Change]]
) -> AbstractContextManager[None]:
    """See functions, where there are any to see."""
    if not tables:
        return nullcontext()

    def table(path: str) -> tuple[Find, set[str]] | None:
        changes = tables.get(path)
        return None if changes is None else (changes.get, set(map(kind_of, changes)))

    return watching(model, table)


def _input_hook(observer: Observer) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        on_input(observer.see, args, kwargs)

    return hook


def _output_hook(observer: Observer) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        on_output(observer.see, output)

    return hook
