"""Products with a weight: of integers, or with a weight that stays packed in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dither.run.integers import Integers
from dither.run.onnx_graph.graph import MICROSOFT, Graph, attribute
from dither.run.onnx_graph.packing import block_of, dequantize, least, packed
from dither.run.onnx_graph.sites import input_grid

_INPUTS_AS_THEY_ARE, _INPUTS_IN_INT8 = 1, 4
"""In which precision MatMulNBits takes its inputs."""


@dataclass(frozen=True)
class _Product:
    """``data @ weight`` or, if ``by_rows``, with the weight transposed; MatMul or Gemm."""

    node: Any
    by_rows: bool


def integer_product(graph: Graph, value: Any, held: Integers) -> str | None:
    """Products of integers, where activations are quantized."""
    uses = _products(value)
    rows = _by_rows(uses, held)
    if rows is None or rows.grouping.axis not in {None, 0} or rows.grouping.group is not None:
        return None
    columns = rows.turned()
    if columns is None or not all(input_grid(graph, use.node.inputs[0]) for use in uses):
        return None
    found = least(columns, signed=True)
    if found is None:
        return None
    made = dequantize(graph, value.name, columns, found, axis=1)
    for use in uses:
        product = graph.add(use.node, "MatMul", [use.node.inputs[0], made])
        _put(graph, use, product, is_whole=True)
    return f"int{found[0]}, computed with integers"


def packed_product(graph: Graph, value: Any, held: Integers) -> str | None:
    """Products with blocks of 4 bits, by kernels that take inputs as they are."""
    return _in_blocks(graph, value, held, 4)


def fast_product(graph: Graph, value: Any, held: Integers) -> str | None:
    """Products with blocks of 4 or 8 bits, by kernels that round inputs to 8 bits as they come."""
    return _in_blocks(graph, value, held, 8)


def _in_blocks(graph: Graph, value: Any, held: Integers, most: int) -> str | None:
    uses = _products(value)
    rows = _by_rows(uses, held)
    found = None if rows is None else least(rows)
    if rows is None or found is None or found[0] > most:
        return None
    bits = found[0]
    block = block_of(rows, bits)
    if block is None:
        return None
    inputs = packed(graph, value.name, rows, found, block)
    settings = {
        "N": rows.steps.shape[0],
        "K": rows.steps.shape[1],
        "bits": bits,
        "block_size": block,
        "accuracy_level": _INPUTS_AS_THEY_ARE if most == 4 else _INPUTS_IN_INT8,
    }
    for use in uses:
        given = [use.node.inputs[0], *inputs]
        _put(graph, use, graph.add(use.node, "MatMulNBits", given, MICROSOFT, **settings))
    return f"{bits} bits in blocks of {block}"


def _products(value: Any) -> list[_Product]:
    """All uses of a matrix, if they are products of one kind; else none."""
    found = []
    for node, index in value.uses():
        if node.op_type == "Transpose" and tuple(attribute(node, "perm", (1, 0))) == (1, 0):
            uses = list(node.outputs[0].uses())
            if not all(user.op_type == "MatMul" and place == 1 for user, place in uses):
                return []
            found += [_Product(user, by_rows=True) for user, _ in uses]
        elif node.op_type == "MatMul" and index == 1:
            found.append(_Product(node, by_rows=False))
        elif node.op_type == "Gemm" and index == 1 and _is_plain(node):
            found.append(_Product(node, by_rows=bool(attribute(node, "transB", 0))))
        else:
            return []
    is_one_kind = len({use.by_rows for use in found}) == 1
    return found if is_one_kind and len(value.shape) == 2 else []


def _is_plain(node: Any) -> bool:
    factors = [attribute(node, name, 1.0) for name in ("alpha", "beta")]
    return factors == [1.0, 1.0] and not attribute(node, "transA", 0)


def _by_rows(uses: list[_Product], held: Integers) -> Integers | None:
    """The weight as ``(outputs, inputs)``; None where it has no such uses, or cannot be turned."""
    if not uses:
        return None
    return held if uses[0].by_rows else held.turned()


def _put(graph: Graph, use: _Product, product: Any, *, is_whole: bool = False) -> None:
    """Put a product in the place of one, with its bias.

    onnxruntime makes one Gemm of a product of matrices and a sum, and has none of integers: of what
    shall be computed with integers, the bias with the other sign is subtracted.
    """
    bias = use.node.inputs[2] if len(use.node.inputs) > 2 else None
    if bias is not None and is_whole:
        product = graph.add(use.node, "Sub", [product, graph.add(use.node, "Neg", [bias])])
    elif bias is not None:
        product = graph.add(use.node, "Add", [product, bias])
    graph.replace(use.node, product)
