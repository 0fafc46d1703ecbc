"""Convolutions between quantized activations: as onnxruntime computes them with integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dither.run.integers import Integers
from dither.run.onnx_graph.graph import Graph, attribute
from dither.run.onnx_graph.packing import Codes, least
from dither.run.onnx_graph.sites import input_grid


def integer_convolution(
    graph: Graph, node: Any, held: Integers
) -> tuple[str, Integers, tuple[int, Codes]] | None:
    """Prepare a convolution for integers: the name of its weight, itself, and its codes.

    onnxruntime computes with integers where input and output are quantized, the weight has no zero
    points, and the bias is int32 in steps of input and weight. A batch normalization behind it
    goes into the scales of the rows. None where this does not fit; nothing is changed then.
    """
    before = input_grid(graph, _before_padding(graph, node).inputs[0])
    if before is None or held.grouping.group is not None or held.grouping.axis not in {None, 0}:
        return None
    norm = graph.only_user(node.outputs[0])
    factor = shift = None
    behind = norm
    if norm is not None and norm.op_type == "BatchNormalization":
        found = _normalization(graph, norm)
        if found is None:
            return None
        (factor, shift), behind = found, graph.only_user(norm.outputs[0])
    if behind is None or behind.op_type != "QuantizeLinear":
        return None
    bias = graph.array(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is None and len(node.inputs) > 2 and node.inputs[2] is not None:
        return None
    folded = held.by_row()
    total = np.zeros(len(folded.scale)) if bias is None else bias.astype(np.float64)
    if factor is not None and shift is not None:
        folded = folded.scaled(torch.from_numpy(factor.astype(np.float32)))
        total = total * factor + shift
    codes = least(folded, signed=True)
    if codes is None:
        return None
    name = node.inputs[1].name
    _take_padding(graph, node)
    if factor is not None:
        name = f"{name}.normalized"
        graph.replace(norm, node.outputs[0])
    _set_bias(graph, node, name, total, before[0] * folded.scale.numpy())
    return name, folded, codes


def _before_padding(graph: Graph, node: Any) -> Any:
    """A convolution, or the Pad with zeros before it that its own padding can do."""
    pad = node.inputs[0].producer()
    if pad is None or pad.op_type != "Pad" or attribute(pad, "mode", "constant") != "constant":
        return node
    parts = [graph.array(value) for value in pad.inputs[1:]]
    sides, fill = (*parts, None)[:2]
    is_zero = len(parts) < 2 or pad.inputs[2] is None or (fill is not None and not fill.any())
    if sides is None or not is_zero or len(parts) > 2 or attribute(node, "auto_pad") != "NOTSET":
        return node
    outer = [*sides[:2], *sides[len(sides) // 2 :][:2]]
    is_ours = graph.only_user(pad.outputs[0]) is node and not any(outer) and min(sides) >= 0
    return pad if is_ours else node


def _take_padding(graph: Graph, node: Any) -> None:
    """Let a convolution do the padding before it: of quantized activations nothing else would."""
    pad = _before_padding(graph, node)
    if pad is node:
        return
    sides = graph.array(pad.inputs[1])
    assert sides is not None  # noqa: S101 - as _before_padding found
    half = len(sides) // 2
    more = [*sides[2:half], *sides[half + 2 :]]
    own = attribute(node, "pads") or [0] * len(more)
    total = [int(a) + int(b) for a, b in zip(own, more, strict=True)]
    node.attributes["pads"] = graph.ir.AttrInt64s("pads", total)
    node.replace_input_with(0, pad.inputs[0])


def _normalization(
    graph: Graph, node: Any
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
    """Factor and shift of each channel, float64."""
    parts = [graph.array(value) for value in node.inputs[1:5]]
    if any(part is None for part in parts):
        return None
    weight, bias, mean, variance = (np.asarray(part, np.float64) for part in parts)
    factor = weight / np.sqrt(variance + float(attribute(node, "epsilon", 1e-5)))
    return factor, bias - mean * factor


def _set_bias(
    graph: Graph, node: Any, name: str, bias: np.ndarray[Any, Any], steps: np.ndarray[Any, Any]
) -> None:
    """Give a convolution its bias in steps of the products that it is added to."""
    steps = steps.astype(np.float32)
    whole = np.clip(np.rint(bias / steps.astype(np.float64)), -(2**31), 2**31 - 1).astype(np.int32)
    path = name.removesuffix(".normalized")
    made = graph.add(
        node,
        "DequantizeLinear",
        [
            graph.initializer(f"{path}.bias_codes", whole),
            graph.initializer(f"{path}.bias_scale", steps),
        ],
        axis=0,
    )
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, made)
