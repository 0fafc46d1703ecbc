"""Write a model with an archive's numbers as an ONNX file, and compare what it computes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dither.activations import apply, placed
from dither.archive import Archive, atomic_write, describe, load_into
from dither.core import SpecError
from dither.data import arguments, call
from dither.model import duplicate, evaluating, inner, memory_of, refuse_attached, weights_of
from dither.run.onnx_graph.graph import Graph, onnx_ir
from dither.run.onnx_graph.sites import write_sites
from dither.run.onnx_graph.trace import Shapes, replace_sites, trace
from dither.run.onnx_graph.weights import KERNELS, write_numbers, write_weight
from dither.terminal import some_names

_LARGEST_MESSAGE = (1 << 31) - (1 << 24)
"""Bytes that a file of ONNX can hold itself; what is more goes beside it."""


@dataclass(frozen=True)
class StoredTensor:
    """How one tensor of an archive stands in an ONNX file.

    Attributes:
        name: of the tensor.
        format: that the archive has it in.
        form: that the file has it in.
        nbytes: in the file.
        archive_nbytes: in the archive.
        decoded: whether its format has no form of small integers, so that numbers are stored.
    """

    name: str
    format: str
    form: str
    nbytes: int
    archive_nbytes: int
    decoded: bool


@dataclass(frozen=True)
class Exported:
    """What :func:`to_onnx` wrote.

    Attributes:
        path: the file.
        nbytes: of the file, and of what stands beside it if it is larger than 2 GB.
        archive_nbytes: of the archive.
        tensors: all that the file holds of the archive, each tied one once.
        sites: where activations are quantized, and whether as integers.
        difference: the greatest between an output of the file in onnxruntime and of the model,
            on the sample; None where onnxruntime is not installed.
        largest: the greatest magnitude of the model's outputs there.
    """

    path: Path
    nbytes: int
    archive_nbytes: int
    tensors: tuple[StoredTensor, ...]
    sites: Mapping[str, bool]
    difference: float | None
    largest: float

    @property
    def decoded(self) -> tuple[StoredTensor, ...]:
        """What the archive has in a format without a form of small integers, but for raw."""
        return tuple(one for one in self.tensors if one.decoded)

    def __str__(self) -> str:
        """Bytes, forms, what had to be decoded and what that costs, and what the check found."""
        lines = [f"{self.nbytes:,} bytes, for {self.archive_nbytes:,} of the archive"]
        forms: dict[str, list[StoredTensor]] = {}
        for one in self.tensors:
            forms.setdefault(one.form, []).append(one)
        for form, held in sorted(forms.items(), key=lambda item: -sum(o.nbytes for o in item[1])):
            size = sum(one.nbytes for one in held)
            lines.append(f"{form}: {some_names([one.name for one in held])}, {size:,} bytes")
        if self.decoded:
            cost = sum(one.nbytes - one.archive_nbytes for one in self.decoded)
            kinds = ", ".join(sorted({one.format.partition("(")[0] for one in self.decoded}))
            names = some_names([one.name for one in self.decoded])
            why = f"having no form of integers ({kinds})"
            lines.append(f"decoded, {why}: {names}, {cost:,} bytes more")
        if floating := [site for site, whole in self.sites.items() if not whole]:
            lines.append(f"activations rounded in floating point: {some_names(floating)}")
        found = "not compared with the model: onnxruntime is not installed"
        if self.difference is not None:
            found = f"outputs differ by at most {self.difference:.3g} from the model's, of up to "
            found += f"{self.largest:.3g}"
        return "\n".join([*lines, found])


def to_onnx(
    model: nn.Module,
    archive: Archive,
    sample: Any,
    path: str | os.PathLike[str],
    *,
    kernels: str = "exact",
    half: bool = True,
    dynamic_shapes: Shapes = None,
) -> Exported:
    """Write a model with the numbers of an archive as an ONNX file for onnxruntime.

    Weights on grids and trellises stay integers of 4 or 8 bits; of tables, only rows that are read
    become numbers. Activations that the archive quantizes with one static range are pairs of
    QuantizeLinear and DequantizeLinear, and what stands between such pairs onnxruntime computes
    with integers: products with a weight, and convolutions whose output, too, is quantized (a batch
    normalization goes into the weight's scales). Tensors in other formats are decoded, and the
    report says which. The model is left as it was.

    Args:
        model: as it was compressed; its weights are not read.
        archive: its numbers, and grids of activations.
        sample: a batch as a loader gives it, see :func:`dither.data.call`.
        path: of the file.
        kernels: ``"exact"``: what the archive says, in float32 but between quantized activations;
            ``"fast"``: onnxruntime rounds what goes into products with a weight to 8 bits as it
            comes, which no evaluation has seen; ``"standard"``: operators of ONNX's own alone,
            for other runtimes, with every weight behind DequantizeLinear.
        half: matrices that are stored as numbers are rounded to float16, unless one overflows.
        dynamic_shapes: as ``torch.onnx.export`` takes them; by default the first axis of each
            input may vary.

    Returns:
        What was written, and how far outputs on the sample are from the model's.

    Raises:
        SpecError: ``kernels`` is none of the three, or the model is attached to a run.
        CheckpointError: the archive does not fit the model.
        DitherError: a package is missing, or torch cannot export the model.
    """
    if kernels not in KERNELS:
        raise SpecError(f"kernels={kernels!r}: give one of {', '.join(map(repr, KERNELS))}")
    onnx_ir()
    evaluated = _evaluated(model, archive)
    with evaluating(evaluated), torch.no_grad():
        output = call(evaluated, sample)
    traced = duplicate(evaluated)
    sites = replace_sites(traced)
    graph = Graph(trace(traced, sample, dynamic_shapes, _names(output)))
    graph.fold()
    write_sites(graph)
    tensors = _write_tensors(graph, evaluated, archive, kernels, half=half)
    graph.tidy()
    nbytes = _save(graph, Path(path))
    difference = _difference(Path(path), arguments(evaluated, sample), output)
    largest = max(float(leaf.abs().max()) for leaf in _tensors(output))
    return Exported(Path(path), nbytes, archive.nbytes, tensors, sites, difference, largest)


def _evaluated(model: nn.Module, archive: Archive) -> nn.Module:
    """A copy of a model with what the archive says of it."""
    refuse_attached(model, "to_onnx")
    made = duplicate(inner(model)).cpu().eval()
    if archive.sites and not placed(made):
        apply(made, archive.sites)
    load_into(made, archive)
    return made


def _write_tensors(
    graph: Graph, model: nn.Module, archive: Archive, kernels: str, *, half: bool
) -> tuple[StoredTensor, ...]:
    """Store what the archive has; convolutions first, which read what stands behind them."""
    state = weights_of(model.state_dict(keep_vars=True))
    own = {memory_of(state[name]): name for name in archive.entries if name in state}
    found: list[StoredTensor] = []
    for key, value in sorted(graph.weights().items(), key=lambda item: -len(item[1].shape)):
        name = own.get(memory_of(state[key])) if key in state else None
        if name is None or not value.uses():
            continue
        entry, before = archive.entries[name], graph.weights()
        form = write_weight(graph, value, archive.encoded(name), kernels)
        is_decoded = form is None and entry.format.name != "raw"
        form = form or write_numbers(graph, value, half=half)
        new = [one for key, one in graph.weights().items() if key not in before and one.uses()]
        nbytes = sum(one.const_value.nbytes for one in new or [value])
        one = StoredTensor(name, describe(entry), form, nbytes, entry.nbytes, is_decoded)
        found.append(one)
    return tuple(found)


def _names(output: object) -> list[str]:
    """Of the outputs, where the model names them."""
    if isinstance(output, Mapping):
        return [name for name, part in output.items() if isinstance(part, Tensor)]
    count = len(_tensors(output))
    return ["output"] if count == 1 else [f"output_{number}" for number in range(count)]


def _tensors(output: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _save(graph: Graph, path: Path) -> int:
    """Write the file, whole or not at all; numbers beside it where it cannot hold them."""
    total = sum(value.const_value.nbytes for value in graph.weights().values())
    if total > _LARGEST_MESSAGE:
        beside = path.with_name(f"{path.name}.data")
        graph.ir.save(graph.model, path, external_data=beside.name)
        return path.stat().st_size + beside.stat().st_size
    with atomic_write(path) as file:
        file.write(graph.ir.to_proto(graph.model).SerializeToString())
    return path.stat().st_size


def _difference(
    path: Path, given: tuple[tuple[Any, ...], dict[str, Any]], output: object
) -> float | None:
    """The greatest between outputs of a file in onnxruntime and those of the model."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    names = [one.name for one in session.get_inputs()]
    made = session.run(None, {n: v.numpy() for n, v in zip(names, inputs, strict=True)})
    pairs = zip(made, _tensors(output), strict=True)
    return max(float((torch.from_numpy(a).double() - b.double()).abs().max()) for a, b in pairs)
