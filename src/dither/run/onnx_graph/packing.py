"""Integers as onnxruntime's kernels want them: narrow, packed, in blocks."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from dither.run.integers import Integers
from dither.run.onnx_graph.graph import Graph

BLOCKS = (256, 128, 64, 32, 16)
"""Blocks that MatMulNBits and GatherBlockQuantized have kernels for."""

FLOAT, INT8 = 1, 3
"""ONNX's numbers for types."""

Codes = tuple[Tensor, Tensor | None]
"""As :meth:`Integers.codes` gives them."""


def narrow(values: Tensor, bits: int, *, signed: bool) -> np.ndarray[Any, Any]:
    """Codes in a type of so many bits: 4, 8 or, signed, 16."""
    import ml_dtypes  # comes with onnx

    kind: Any = ml_dtypes.int4 if signed else ml_dtypes.uint4
    if bits > 4:
        kind = {8: np.int8, 16: np.int16}[bits] if signed else np.uint8
    return values.numpy().astype(kind)


def least(held: Integers, *, signed: bool = False) -> tuple[int, Codes] | None:
    """The fewest bits that codes fit into, 4 or 8, and the codes; None where neither will do."""
    found = ((bits, held.codes(bits, signed=signed)) for bits in (4, 8))
    return next(((bits, codes) for bits, codes in found if codes is not None), None)


def dequantize(
    graph: Graph, name: str, held: Integers, found: tuple[int, Codes], axis: int | None = None
) -> Any:
    """The value that DequantizeLinear gives, of the shape of the codes.

    Args:
        graph: gets the nodes.
        name: of the tensor.
        held: with scales of one axis, of the tensor, or of runs in the rows of a matrix.
        found: bits and codes.
        axis: 4-bit codes are made int8 when the file is loaded, as kernels of integers want them,
            and scales are of this axis; None leaves them.
    """
    bits, (codes, zero) = found
    at, signed, grouping = graph.after_inputs(), zero is None, held.grouping
    value = graph.initializer(f"{name}.codes", narrow(codes, bits, signed=signed))
    if axis is not None and bits == 4:
        value = graph.add(at, "Cast", [value], to=INT8)
    scale = held.scale
    settings: dict[str, Any] = {}
    if grouping.group is not None:
        scale = held.scale.reshape(len(codes), -1)
        settings = {"axis": 1, "block_size": grouping.group}
    elif grouping.axis is not None:
        settings = {"axis": grouping.axis}
    else:
        scale = held.scale.reshape(())
    inputs = [value, graph.initializer(f"{name}.scale", scale.contiguous())]
    if zero is not None:
        zeros = narrow(zero.reshape(scale.shape), bits, signed=False)
        inputs.append(graph.initializer(f"{name}.zero", zeros))
    return graph.add(at, "DequantizeLinear", inputs, **settings)


def block_of(rows: Integers, bits: int) -> int | None:
    """The block that takes the fewest bytes; None where scales are not of runs in rows."""
    count, columns = rows.steps.shape

    def nbytes(block: int) -> int:
        return count * -(-columns // block) * (block * bits // 8 + 4)

    fitting = [block for block in BLOCKS if rows.by_block(rows.scale, block) is not None]
    return min(fitting, key=nbytes, default=None)


def packed(
    graph: Graph, name: str, rows: Integers, found: tuple[int, Codes], block: int
) -> list[Any]:
    """Initializers ``(rows, blocks, bytes)``, ``(rows, blocks)`` of scales and, if any, of zeros.

    A byte has its first code in its low bits. Rows are filled up to whole blocks.
    """
    bits, (values, zero) = found
    codes = values if zero is not None else values + (1 << (bits - 1))
    codes = pad(codes, (0, -codes.shape[1] % block)).to(torch.uint8).unflatten(1, (-1, block))
    parts = {
        "packed": together(codes, bits),
        "scale": cast("Tensor", rows.by_block(rows.scale, block)),
    }
    if zero is not None:
        zeros = cast("Tensor", rows.by_block(zero.expand(len(rows.scale)), block))
        parts["zero"] = together(zeros.to(torch.uint8), bits)
    return [graph.initializer(f"{name}.{part}", value) for part, value in parts.items()]


def together(codes: Tensor, bits: int) -> Tensor:
    """Bytes of codes along the last axis, the first in the low bits; the last may be half full.

    >>> together(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist()
    [[33, 3]]
    """
    if bits == 8:
        return codes.contiguous()
    codes = pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)
