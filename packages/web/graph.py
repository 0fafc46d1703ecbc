"""The graph of all-MiniLM-L6-v2 as ONNX, without its weights.

Every weight is an initializer in external data: the page decodes them into one block of memory and
hands it to the runtime, as if it were the file that the graph names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

LOCATION = "weights.bin"
HEADS, WIDTH, LAYERS = 12, 384, 6
EPSILON = 1e-12
FAR = -1e9  # what a masked token is scored: its share is 0

Layout = dict[str, tuple[int, int]]
"""Of each tensor, where its float32 numbers begin and end among all of them."""


class Graph:
    """Nodes one after the other, each with one output."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.layout: Layout = {}
        self.count = 0

    def weight(self, name: str) -> str:
        """A tensor of the archive."""
        if name in self.layout:
            return name
        shape = self.shapes[name]
        end = self.count + int(np.prod(shape))
        self.layout[name] = self.count, end
        where = {"location": LOCATION, "offset": 4 * self.count, "length": 4 * (end - self.count)}
        tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.extend(
            onnx.StringStringEntryProto(key=key, value=str(value)) for key, value in where.items()
        )
        self.initializers.append(tensor)
        self.count = end
        return name

    def constant(self, value: float | list[int], dtype: npt.DTypeLike = np.float32) -> str:
        """A small constant in the graph itself."""
        name = f"constant {len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def __call__(self, kind: str, *inputs: str, **attributes: object) -> str:
        """Add a node; returns its output."""
        output = f"{kind} {len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def linear(self, x: str, name: str) -> str:
        """A layer of torch: its weight stands transposed."""
        weight = self("Transpose", self.weight(f"{name}.weight"), perm=[1, 0])
        return self("Add", self("MatMul", x, weight), self.weight(f"{name}.bias"))

    def norm(self, x: str, name: str) -> str:
        """A layer norm over the last axis."""
        weights = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self("LayerNormalization", x, *weights, axis=-1, epsilon=EPSILON)

    def heads(self, x: str, perm: list[int]) -> str:
        """``(batch, tokens, width)`` by heads, its axes in another order."""
        shape = self.constant([0, 0, HEADS, WIDTH // HEADS], np.int64)
        return self("Transpose", self("Reshape", x, shape), perm=perm)


def _layer(g: Graph, x: str, far: str, name: str) -> str:
    q = g.heads(g.linear(x, f"{name}.attention.self.query"), [0, 2, 1, 3])
    k = g.heads(g.linear(x, f"{name}.attention.self.key"), [0, 2, 3, 1])
    v = g.heads(g.linear(x, f"{name}.attention.self.value"), [0, 2, 1, 3])
    scores = g("Mul", g("MatMul", q, k), g.constant((WIDTH // HEADS) ** -0.5))
    shares = g("Softmax", g("Add", scores, far), axis=-1)
    mixed = g("Transpose", g("MatMul", shares, v), perm=[0, 2, 1, 3])
    mixed = g("Reshape", mixed, g.constant([0, 0, WIDTH], np.int64))
    out = g.linear(mixed, f"{name}.attention.output.dense")
    x = g.norm(g("Add", x, out), f"{name}.attention.output.LayerNorm")
    h = g.linear(x, f"{name}.intermediate.dense")
    erf = g("Erf", g("Mul", h, g.constant(2**-0.5)))
    h = g("Mul", g("Mul", h, g.constant(0.5)), g("Add", erf, g.constant(1.0)))
    return g.norm(g("Add", x, g.linear(h, f"{name}.output.dense")), f"{name}.output.LayerNorm")


def sentence_encoder(shapes: Mapping[str, tuple[int, ...]]) -> tuple[bytes, Layout]:
    """The model: int64 ``ids`` and ``mask``, ``(batch, tokens)``, to unit ``embedding`` rows.

    Args:
        shapes: of the tensors of all-MiniLM-L6-v2, by name.
    """
    g = Graph(shapes)
    tokens = g("Gather", g("Shape", "ids"), g.constant([1], np.int64))
    zero, one = g.constant(0, np.int64), g.constant(1, np.int64)
    places = g("Range", zero, g("Squeeze", tokens), one)
    x = g("Gather", g.weight("embeddings.word_embeddings.weight"), "ids")
    x = g("Add", x, g("Gather", g.weight("embeddings.token_type_embeddings.weight"), zero))
    x = g("Add", x, g("Gather", g.weight("embeddings.position_embeddings.weight"), places))
    x = g.norm(x, "embeddings.LayerNorm")
    shown = g("Cast", "mask", to=TensorProto.FLOAT)
    hidden = g("Mul", g("Sub", g.constant(1.0), shown), g.constant(FAR))
    far = g("Unsqueeze", hidden, g.constant([1, 2], np.int64))
    for i in range(LAYERS):
        x = _layer(g, x, far, f"encoder.layer.{i}")
    shown = g("Unsqueeze", shown, g.constant([2], np.int64))
    total = g("ReduceSum", g("Mul", x, shown), g.constant([1], np.int64), keepdims=0)
    length = g("ReduceL2", total, axes=[1], keepdims=1)
    g.nodes.append(helper.make_node("Div", [total, length], ["embedding"]))
    shape = ["batch", "tokens"]
    graph = helper.make_graph(
        g.nodes,
        "all-MiniLM-L6-v2",
        [helper.make_tensor_value_info(n, TensorProto.INT64, shape) for n in ("ids", "mask")],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", WIDTH])],
        g.initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString(), g.layout
