"""Quantized activations in ONNX: pairs of QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from typing import Any

import numpy as np

from dither.run.onnx_graph.graph import Graph, attribute
from dither.run.onnx_graph.trace import ROUNDED

_PASSING = {"Relu", "Clip"}
_MOVING = {"Identity", "Reshape", "Transpose", "Flatten", "MaxPool", "Squeeze", "Unsqueeze"}
"""What takes numbers from one place to another, and changes none."""


def write_sites(graph: Graph) -> None:
    """Write nodes of activations on a grid in ONNX's own operators.

    Codes of up to 8 bits become uint8, others uint16; what fewer bits do not reach is clipped
    before. A Relu or Clip that the ends of the grid make superfluous is left out, so that what
    stands before it can give integers at once.
    """
    domain, _, operator = ROUNDED.partition("::")
    for node in graph:
        if node.op_type == operator and node.domain == domain:
            _write(graph, node)


def _write(graph: Graph, node: Any) -> None:
    scale, zero = np.float32(attribute(node, "scale")), int(attribute(node, "zero"))
    bits = int(attribute(node, "bits"))
    kind: Any = np.uint8 if bits <= 8 else np.uint16
    top, value, idle = (1 << bits) - 1, node.inputs[0], []
    while True:
        before = value.producer()
        is_alone = graph.only_user(value) is not None
        if not is_alone or before is None or not _is_idle(graph, before, float(scale), zero, top):
            break
        value = before.inputs[0]
        idle.append(before)
    if top < np.iinfo(kind).max:
        ends = [graph.constant(np.asarray((end - zero) * scale, np.float32)) for end in (0, top)]
        value = graph.add(node, "Clip", [value, *ends])
    grid = [graph.constant(np.asarray(scale)), graph.constant(np.asarray(kind(zero)))]
    codes = graph.add(node, "QuantizeLinear", [value, *grid])
    graph.replace(node, graph.add(node, "DequantizeLinear", [codes, *grid]))
    for each in idle:
        graph.remove(each)


def _is_idle(graph: Graph, node: Any, scale: float, zero: int, top: int) -> bool:
    """Whether a Relu or Clip changes no code: all that it cuts off lies beyond the grid's ends."""
    if node.op_type not in _PASSING or node.domain:
        return False
    low: Any = 0.0
    high: Any = None
    if node.op_type == "Clip":
        given = (*node.inputs[1:], None, None)[:2]
        low, high = (graph.array(value) for value in given)
        if (low is None) != (given[0] is None) or (high is None) != (given[1] is None):
            return False
    cuts_low = low is not None and round(float(low) / scale) + zero > 0
    cuts_high = high is not None and round(float(high) / scale) + zero < top
    return not (cuts_low or cuts_high)


def input_grid(graph: Graph, value: Any) -> tuple[np.ndarray[Any, Any], Any] | None:
    """Scale and node of the DequantizeLinear of uint8 that a value comes from; None of others."""
    node = value.producer()
    while node is not None and node.op_type in _MOVING and not node.domain:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0].producer() is None:
        return None
    zero, scale = graph.array(node.inputs[2]), graph.array(node.inputs[1])
    if zero is None or scale is None or zero.dtype != np.uint8:
        return None
    return scale, node
