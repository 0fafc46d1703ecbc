"""Statistics of every weight, from one pass over a loader."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from dither.calibrate.backward import Loss, squared_gradients
from dither.calibrate.inputs import (
    attention_vectors,
    cell_vectors,
    fits,
    has_vectors,
    input_vectors,
    outputs_axis,
    recurrent_vectors,
)
from dither.calibrate.moments import MOST_INPUTS, Moments, Vectors
from dither.calibrate.stack_inputs import StackInputs
from dither.core import STACKED, Stats
from dither.data import Data
from dither.disk import home_of
from dither.model import evaluating, own_class, parameters_of, stacks_of
from dither.progress import report


def collect(
    model: nn.Module,
    data: Data | Iterable[Any],
    *,
    loss: Loss | None = None,
    most_inputs: int = MOST_INPUTS,
) -> dict[str, Stats]:
    """Collect what data says about each weight of a model.

    Second and first moments and the range of inputs for Linear, convolutions (also transposed),
    GPT-2's Conv1D, MultiheadAttention, RNN, LSTM, GRU and their cells, and for each matrix in a
    stack, as experts are; token counts for Embedding and EmbeddingBag; with a loss, the mean
    squared gradient of every parameter. The model runs in evaluation mode and is left as it was:
    modes, running statistics, gradients, no hooks.

    Weights are seen where modules of these kinds are called, stacks where their owner multiplies by
    them. Positions that ``Data.mask`` hides do
    not count in layers that have these positions.

    Args:
        model: runs on its own device; attached models run as they are.
        data: a loader of batches, or :class:`~dither.Data`; labels are not needed.
        loss: of an output and its batch, for ``Stats.importance``: the squared gradient of each
            batch, averaged (the empirical Fisher information, with batches of one example).
        most_inputs: a weight with more has a block-diagonal Gram matrix.

    Returns:
        By the (first) name of the parameter, on the CPU, where encoders compute. What was never
        called and has no gradient is missing.
        Without a loss, token counts are the importance of a table's rows.

    Raises:
        SpecError: the loader is empty, or the loss has no gradient.

    >>> layer = nn.Linear(2, 3)
    >>> stats = collect(layer, [torch.tensor([[1.0, 2.0]])])
    >>> stats["weight"].gram
    tensor([[1., 2.],
            [2., 4.]])
    """
    samples, watch = Data.of(data), Watch(model, most_inputs)
    squares = _Sums()
    count, total = 0, samples.count or math.inf
    with evaluating(model), watch.hooks():
        for count, batch in enumerate(samples, 1):
            report("reading samples", min((count - 1) / total, 1.0))
            watch.mask = samples.shown(batch)
            if loss is None:
                with torch.no_grad():
                    samples.forward(model, batch)
            else:
                squared_gradients(model, batch, loss, samples.forward, squares.add)
    fisher = {name: total / count for name, total in squares.items()}
    return {
        name: watch.stats(name, fisher.get(name)).to("cpu")
        for name in parameters_of(model).values()
        if name in watch.moments or name in watch.counts or name in fisher
    }


class _Sums(dict[str, Tensor]):
    """Tensors by name, to which others are added."""

    def add(self, name: str, value: Tensor) -> None:
        self[name] = self[name] + value if name in self else value


class Here(threading.local):
    """What a watch knows of the forward pass that runs in this thread.

    Attributes:
        mask: of its batch.
        open: owners of stacks that are being called, and what is seen in them.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.open: list[tuple[nn.Module, StackInputs]] = []


class Watch:
    """Hooks that see the inputs of a model's weights.

    Args:
        model: the model.
        most_inputs: of one Gram matrix.
        only: names of the weights to watch, or all.

    Attributes:
        mask: positions that count, bool ``(batch, positions)``, or None for all; for the batch at
            hand.
        stacks: names of parameters that are stacks of matrices, see
            :func:`~dither.model.stacks_of`. Their vectors are one group for each matrix.
    """

    def __init__(
        self, model: nn.Module, most_inputs: int = MOST_INPUTS, only: Iterable[str] | None = None
    ) -> None:
        self.here = Here()
        self.moments: dict[str, Moments] = {}
        self.counts: dict[str, Tensor] = {}
        self.outputs: dict[str, int] = {}
        self._model = model
        self._names = parameters_of(model)
        self.stacks = stacks_of(dict(model.named_parameters()), model)
        self._only = None if only is None else set(only)
        self._most, self._disk = most_inputs, home_of(model)

    @property
    def mask(self) -> Tensor | None:
        """See the attribute."""
        return self.here.mask

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        self.here.mask = mask

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Watch for a while; the hooks go, whatever happens."""
        handles: list[RemovableHandle] = []
        try:
            for module in self._model.modules():
                if any(self._name(module, path) for path, _ in module.named_parameters()):
                    see = module.register_forward_pre_hook(self._see, with_kwargs=True)
                    handles.append(see)
                if isinstance(module, nn.Embedding) and not _is_plain(module):
                    handles.append(module.register_forward_hook(self._look_back, with_kwargs=True))
                if any(self._stacks_in(module)):
                    handles.append(module.register_forward_pre_hook(self._enter))
                    handles.append(module.register_forward_hook(self._leave))
            yield
        finally:
            self._close(None)  # whatever a forward that did not end left open
            for handle in handles:
                handle.remove()

    def names(self) -> list[str]:
        """Of the model's floating-point parameters, each once."""
        return list(self._names.values())

    def stats(self, name: str, importance: Tensor | None = None) -> Stats:
        """What was seen of one weight."""
        seen, counts = self.moments.get(name), self.counts.get(name)
        if importance is None and counts is not None:
            rows = counts.float().clamp(min=0.5)  # never seen is not never read
            importance = rows.unsqueeze(1)
        if seen is None:
            return Stats(importance, counts=counts)
        return Stats(
            importance,
            seen.gram() if name not in self.stacks else seen.joined_gram(),
            self.outputs.get(name, 0),
            seen.mean(),
            seen.cross(),
            counts,
            seen.low,
            seen.high,
            seen.samples,
        )

    def note(self, name: str, vectors: Vectors) -> None:
        """Count input vectors of a weight, ``(groups, vectors, inputs)``."""
        if name not in self.moments:
            self.moments[name] = Moments(self._most, self._disk)
        self.moments[name].add(vectors)

    def _name(self, module: nn.Module, path: str) -> str | None:
        """The first name of a module's parameter, where it is watched."""
        owner, _, local = path.rpartition(".")
        parameter = module.get_submodule(owner)._parameters.get(local)  # noqa: SLF001 - as placed
        name = self._names.get(id(parameter))
        return name if self._only is None or name in self._only else None

    def _add(self, module: nn.Module, path: str, vectors: Vectors, outputs: int = 0) -> None:
        name = self._name(module, path)
        if name is not None:
            self.note(name, vectors)
            self.outputs[name] = outputs

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            given = _by_name(module, args, kwargs)
            first = next(iter(given.values()), None)
            if isinstance(module, nn.MultiheadAttention):
                for path, groups in attention_vectors(module, given, self.mask):
                    self._add(module, path, groups)
            elif isinstance(module, nn.RNNBase) and isinstance(first, Tensor | PackedSequence):
                state = given.get("hx")
                for path, vectors in recurrent_vectors(module, first, state, self.mask):
                    self._add(module, path, vectors)
            elif not isinstance(first, Tensor):
                return
            elif isinstance(module, nn.RNNCellBase):
                for path, vectors in cell_vectors(module, first, given.get("hx")):
                    self._add(module, path, vectors)
            elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
                if _is_plain(module):
                    self._count(module, first)
            elif has_vectors(module) and self._name(module, "weight") and fits(module, first):
                for vectors in input_vectors(module, first, self.mask):
                    self._add(module, "weight", vectors, outputs_axis(module))

    def _stacks_in(self, module: nn.Module) -> dict[str, Tensor]:
        """A module's own parameters that are watched stacks, by their local name."""
        named = {
            path: self._name(module, path) for path, _ in module.named_parameters("", recurse=False)
        }
        return {p: module.get_parameter(p) for p, name in named.items() if name in self.stacks}

    def _enter(self, module: nn.Module, _: tuple[Any, ...]) -> None:
        seen = StackInputs(self._stacks_in(module))
        seen.__enter__()  # type: ignore[no-untyped-call]
        self.here.open.append((module, seen))

    def _leave(self, module: nn.Module, _: tuple[Any, ...], __: object) -> None:
        seen = self._close(module)
        with torch.no_grad():
            for path, vectors in () if seen is None else seen.vectors():
                self._add(module, path, vectors, STACKED)

    def _close(self, module: nn.Module | None) -> StackInputs | None:
        """Stop watching in a module and in those that it called, or in all."""
        while self.here.open:
            owner, seen = self.here.open.pop()
            seen.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if owner is module:
                return seen
        return None

    def _look_back(
        self, module: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
    ) -> None:
        """Count the rows of a table whose class has a forward of its own, if that read them."""
        first = next(iter(_by_name(module, args, kwargs).values()), None)
        if (
            isinstance(first, Tensor)
            and isinstance(output, Tensor)
            and _reads(module, first, output)
        ):
            self._count(module, first)

    def _count(self, module: nn.Embedding | nn.EmbeddingBag, indices: Tensor) -> None:
        name = self._name(module, "weight")
        if name is None:
            return
        size, mask = module.num_embeddings, self.mask
        if mask is not None and indices.shape in (mask.shape, mask.T.shape):
            indices = indices[(mask if indices.shape == mask.shape else mask.T).to(indices.device)]
        counts = torch.bincount(indices.reshape(-1), minlength=size)[:size]  # torch refuses others
        if module.padding_idx is not None and isinstance(module, nn.EmbeddingBag):
            counts[module.padding_idx] = 0  # a bag leaves padding out
        self.counts[name] = self.counts[name] + counts if name in self.counts else counts


def _is_plain(module: nn.Embedding | nn.EmbeddingBag) -> bool:
    """Whether a table is read by torch's own forward, so that what goes into it are rows."""
    return own_class(module).forward in (nn.Embedding.forward, nn.EmbeddingBag.forward)


def _reads(module: nn.Embedding, indices: Tensor, output: Tensor) -> bool:
    """Whether an output is the rows at some indices, but for a factor.

    Tables of positions in OPT, BART or Whisper are given masks, shapes or tokens, not positions.
    """
    whole = not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
    if not whole or output.shape != (*indices.shape, module.embedding_dim) or not output.numel():
        return False
    if not 0 <= int(indices.min()) <= int(indices.max()) < module.num_embeddings:
        return False
    rows = module.weight.detach()[indices].double()
    found = output.detach().double()
    factor = (rows * found).sum() / rows.square().sum().clamp(min=1e-30)
    return float((found - factor * rows).square().sum()) <= 1e-3 * float(found.square().sum())


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if not kwargs:
        names = ["query", "key", "value"] if isinstance(module, nn.MultiheadAttention) else []
        names = (
            ["input", "hx"][: len(args)]
            if isinstance(module, nn.RNNBase | nn.RNNCellBase)
            else names
        )
        if len(args) == len(names) or not names:
            return dict(zip(names or ["input"], args, strict=False))
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
