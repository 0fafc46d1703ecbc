"""Weights in ONNX: integers where a kernel takes them, else numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import pad

from dither.core import Encoded
from dither.formats.grouping import rows_of
from dither.run.integers import Integers
from dither.run.onnx_graph.convolutions import integer_convolution
from dither.run.onnx_graph.graph import MICROSOFT, Graph, attribute
from dither.run.onnx_graph.packing import FLOAT, block_of, dequantize, least, narrow, packed
from dither.run.onnx_graph.products import fast_product, integer_product, packed_product

_WORTH_A_CAST = 256
"""Numbers of a tensor from which half of their bytes are worth a node."""

Kernel = Callable[[Graph, Any, Integers], str | None]
"""Lets what uses a weight's initializer use integers, and says how they are stored; None where it
does not fit, and nothing is changed."""


def write_weight(graph: Graph, value: Any, encoded: Encoded, kernels: str) -> str | None:
    """Store a weight as integers, and let what uses it use them.

    Args:
        graph: is changed.
        value: the weight's initializer.
        encoded: the weight.
        kernels: a key of :data:`KERNELS`.

    Returns:
        How it is stored; None where its numbers have to be.
    """
    held = Integers.of(encoded)
    if held is None:
        return None
    found = (kernel(graph, value, held) for kernel in KERNELS[kernels])
    return next((form for form in found if form is not None), None)


def write_numbers(graph: Graph, value: Any, *, half: bool) -> str:
    """Store a tensor as numbers, in float16 where that loses nothing.

    Args:
        graph: is changed.
        value: the tensor's initializer.
        half: matrices in float16 also where they are rounded by it, if none overflows.

    Returns:
        The type.
    """
    array = value.const_value.numpy()
    if array.dtype != np.float32 or array.size < _WORTH_A_CAST:
        return str(array.dtype)
    with np.errstate(over="ignore"):
        short = array.astype(np.float16)
    is_same = np.array_equal(short.astype(np.float32), array, equal_nan=True)
    fits = np.array_equal(np.isfinite(short), np.isfinite(array))
    if not is_same and not (half and fits and array.ndim > 1):
        return "float32"
    numbers = graph.initializer(f"{value.name}.float16", short)
    value.replace_all_uses_with(graph.add(graph.after_inputs(), "Cast", [numbers], to=FLOAT))
    return "float16" if is_same else "float16, rounded"


def _convolution(graph: Graph, value: Any, held: Integers) -> str | None:
    """Convolutions of integers, between quantized activations."""
    node = graph.only_user(value)
    if node is None or node.op_type != "Conv" or node.inputs[1] is not value:
        return None
    found = integer_convolution(graph, node, held)
    if found is None:
        return None
    name, folded, codes = found
    node.replace_input_with(1, dequantize(graph, name, folded, codes, axis=0))
    return f"int{codes[0]}, computed with integers"


def _table(graph: Graph, value: Any, held: Integers) -> str | None:
    """Tables, of which those rows become numbers that are read."""
    nodes = [node for node, _ in value.uses()]
    is_read = [n.op_type == "Gather" and n.inputs[0] is value for n in nodes]
    is_table = len(held.grouping.shape) == 2 and all(is_read) and bool(nodes)
    if not is_table or any(attribute(node, "axis", 0) for node in nodes):
        return None
    four, wide = held.codes(4), held.codes(8)
    block = None if four is None else block_of(held, 4)
    if four is not None and block is not None and held.steps.shape[1] % block == 0:
        parts = packed(graph, value.name, held, (4, four), block)
        return _table_in_blocks(graph, nodes, parts, block)
    if wide is None or held.grouping.group is not None or held.grouping.axis not in {None, 0}:
        return None
    stored = graph.initializer(f"{value.name}.codes", narrow(wide[0], 8, signed=wide[1] is None))
    columns = (
        [("Mul", held.scale)]
        if wide[1] is None
        else [("Sub", wide[1].float()), ("Mul", held.scale)]
    )
    for node in nodes:
        read = graph.add(node, "Gather", [stored, node.inputs[1]], axis=0)
        read = graph.add(node, "Cast", [read], to=FLOAT)
        for operator, part in columns:
            spread = part.expand(len(held.steps)).reshape(-1, 1).contiguous()
            column = graph.initializer(f"{value.name}.{operator}", spread)
            term = graph.add(node, "Gather", [column, node.inputs[1]], axis=0)
            read = graph.add(node, operator, [read, term])
        graph.replace(node, read)
    return "int8" if wide[1] is None else "uint8"


def _table_in_blocks(graph: Graph, nodes: list[Any], parts: list[Any], block: int) -> str:
    codes, *others = parts
    shape = (codes.shape[0], codes.shape[1] * codes.shape[2])
    flat = graph.initializer(f"{codes.name}.rows", codes.const_value.numpy().reshape(shape))
    settings = {"bits": 4, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    for node in nodes:
        inputs = [flat, node.inputs[1], *others]
        made = graph.add(node, "GatherBlockQuantized", inputs, MICROSOFT, **settings)
        graph.replace(node, made)
    return f"4 bits in blocks of {block}"


def _restored(graph: Graph, value: Any, held: Integers) -> str | None:
    """Anything: onnxruntime makes numbers of integers once, when it loads the file.

    It folds sums and products of constants. DequantizeLinear it would compute at every run, or
    round what is multiplied with the weight to 8 bits.
    """
    at = graph.after_inputs()
    bits, (codes, zero) = least(held) or (16, (held.steps, None))
    columns, group = rows_of(held.grouping.shape)[1], held.grouping.group
    scale = _beside(held, held.scale)
    if group is not None:  # rows filled up to whole groups, and cut again
        codes = pad(codes.reshape(-1, columns), (0, -columns % group)).unflatten(1, (-1, group))
    numbers = narrow(codes, bits, signed=zero is None)
    made = graph.add(at, "Cast", [graph.initializer(f"{value.name}.codes", numbers)], to=FLOAT)
    if zero is not None:
        zeros = graph.initializer(f"{value.name}.zero", _beside(held, zero.float()))
        made = graph.add(at, "Sub", [made, zeros])
    made = graph.add(at, "Mul", [made, graph.initializer(f"{value.name}.scale", scale)])
    if group is not None:
        made = graph.add(at, "Reshape", [made, _shape(graph, (len(codes), -1))])
        if columns % group:
            ends = [graph.constant(np.array([end])) for end in (0, columns, 1)]
            made = graph.add(at, "Slice", [made, *ends])
        made = graph.add(at, "Reshape", [made, _shape(graph, held.grouping.shape)])
    value.replace_all_uses_with(made)
    return f"{'u' * (zero is not None)}int{bits}, restored at load"


def _dequantized(graph: Graph, value: Any, held: Integers) -> str | None:
    """Anything, by DequantizeLinear."""
    bits, (codes, zero) = least(held) or (16, (held.steps, None))
    if held.grouping.group is not None:
        codes = codes.reshape(rows_of(held.grouping.shape))
    made = dequantize(graph, value.name, held, (bits, (codes, zero)))
    if held.grouping.group is not None:
        shape = _shape(graph, held.grouping.shape)
        made = graph.add(graph.after_inputs(), "Reshape", [made, shape])
    value.replace_all_uses_with(made)
    return f"{'u' * (zero is not None)}int{bits}"


def _beside(held: Integers, values: Tensor) -> Tensor:
    """One value for each scale as it broadcasts to the codes."""
    grouping = held.grouping
    values = values.expand(grouping.count)
    if grouping.group is not None:
        return values.reshape(-1, grouping.groups_per_row, 1).contiguous()
    if grouping.axis is None:
        return values.reshape(()).contiguous()
    shape = [-1 if axis == grouping.axis else 1 for axis in range(len(grouping.shape))]
    return values.reshape(shape).contiguous()


def _shape(graph: Graph, shape: tuple[int, ...]) -> Any:
    return graph.constant(np.array(shape, np.int64))


KERNELS: Mapping[str, tuple[Kernel, ...]] = MappingProxyType(
    {
        "exact": (_convolution, integer_product, packed_product, _table, _restored),
        "fast": (_convolution, integer_product, fast_product, _table, _restored),
        "standard": (_convolution, integer_product, _dequantized),
    }
)
"""What is tried for each weight, in order: with inputs as they are; with inputs of products rounded
to 8 bits as they come; with ONNX's own operators alone."""
