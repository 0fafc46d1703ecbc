"""Weights as onnxruntime reads them: each format behind each kind of node, against its decoder."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dither import Affine, Codebook, Raw, Trellis
from dither.core import Encoded, Format
from dither.run.integers import Integers
from dither.run.onnx_graph.graph import Graph
from dither.run.onnx_graph.weights import write_numbers, write_weight

onnx = pytest.importorskip("onnx", reason='pip install "dither[onnx]"')
ort = pytest.importorskip("onnxruntime", reason='pip install "dither[onnx]"')

HALF = torch.float16
GRIDS: list[Format] = [
    Affine(8),
    Affine(8, axis=0),
    Affine(8, axis=1),
    Affine(8, axis=0, grid="asymmetric"),
    Affine(8, group=24, scale_dtype=HALF),
    Affine(4),
    Affine(4, axis=0),
    Affine(4, axis=0, grid="asymmetric"),
    Affine(4, group=16, grid="asymmetric"),
    Affine(4, group=32),
    Affine(4, group=20),
    Affine(3, group=64, scale_dtype=HALF),
    Affine(1, axis=0),
    Affine(None, axis=0),
    Affine(12, axis=0),
    Affine(14, group=24),
    Trellis(axis=0),
    Trellis(),
]
SHAPES = [(8, 64), (5, 33), (7, 1)]
USES: dict[str, list[Any]] = {
    "rows": [("Transpose", ["w"], ["t"]), ("MatMul", ["x", "t"], ["y"])],
    "columns": [("MatMul", ["x", "w"], ["y"])],
    "affine": [("Gemm", ["x", "w", "b"], ["y"], {"transB": 1})],
    "table": [("Gather", ["w", "i"], ["y"])],
    "tied": [
        ("Gather", ["w", "i"], ["g"]),
        ("Transpose", ["w"], ["t"]),
        ("MatMul", ["x", "t"], ["m"]),
        ("Concat", ["g", "m"], ["y"], {"axis": 0}),
    ],
    "anything": [("Neg", ["w"], ["n"]), ("Neg", ["n"], ["y"])],
}


def weight_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def graph_of(use: str, weight: Tensor) -> tuple[Graph, dict[str, np.ndarray[Any, Any]], Tensor]:
    """A graph that gives a weight back, with what goes in; and what should come out."""
    rows, columns = weight.shape
    inner = rows if use == "columns" else columns
    fed: dict[str, np.ndarray[Any, Any]] = {"x": np.eye(inner, dtype=np.float32)}
    expected = {"rows": weight.T, "affine": weight.T}.get(use, weight)
    index = torch.arange(rows).flip(0)
    if use in {"table", "tied"}:
        fed["i"], expected = index.numpy(), weight[index]
    if use == "tied":
        fed["x"] = np.zeros((1, columns), np.float32)
        fed["x"][0, 0] = 1
    return _made(use, weight, fed), fed, expected


def _made(use: str, weight: Tensor, fed: dict[str, np.ndarray[Any, Any]]) -> Graph:
    helper, kinds = onnx.helper, {"x": onnx.TensorProto.FLOAT, "i": onnx.TensorProto.INT64}
    nodes = [
        helper.make_node(operator, inputs, outputs, **dict(*rest))
        for operator, inputs, outputs, *rest in USES[use]
    ]
    read = {name for node in nodes for name in node.input}
    for name in [name for name in fed if name not in read]:
        del fed[name]
    inputs = [
        helper.make_tensor_value_info(n, kinds[n], [f"{n}{k}" for k in range(v.ndim)])
        for n, v in fed.items()
    ]
    bias = np.zeros(len(weight), np.float32)
    held = [onnx.numpy_helper.from_array(weight.numpy(), "w")]
    held += [onnx.numpy_helper.from_array(bias, "b")] if "b" in read else []
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    made = helper.make_graph(nodes, "graph", inputs, [output], held)
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    import onnx_ir

    return Graph(onnx_ir.from_proto(proto))


def outputs(graph: Graph, fed: dict[str, np.ndarray[Any, Any]]) -> Tensor:
    graph.tidy()
    data = graph.ir.to_proto(graph.model).SerializeToString()
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, fed)[0])


def written(use: str, encoded: Encoded, kernels: str) -> tuple[str | None, Graph, Tensor, Tensor]:
    decoded = encoded.decode()
    graph, fed, expected = graph_of(use, decoded)
    form = write_weight(graph, graph.weights()["w"], encoded, kernels)
    return form, graph, outputs(graph, fed), expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("use", [use for use in USES if use != "tied"])
@pytest.mark.parametrize("fmt", GRIDS, ids=repr)
def test_what_is_read_is_the_decoders_number(fmt: Format, use: str, shape: tuple[int, int]) -> None:
    encoded = fmt.encode(weight_of(shape))
    form, graph, made, expected = written(use, encoded, "exact")
    assert form is not None
    assert "w" not in graph.weights()
    if "blocks" in form and use != "table":  # kernels take zeros from sums of products
        torch.testing.assert_close(made, expected, rtol=2e-6, atol=2e-6)
    else:
        assert torch.equal(made, expected)


@pytest.mark.parametrize("fmt", GRIDS, ids=repr)
@pytest.mark.parametrize("use", ["table", "anything"])
def test_operators_of_onnx_alone_say_the_same(fmt: Format, use: str) -> None:
    form, graph, made, expected = written(use, fmt.encode(weight_of((6, 50))), "standard")
    assert form is not None
    domains = {node.domain for node in graph}
    operators = {node.op_type for node in graph}
    assert torch.equal(made, expected)
    assert domains == {""}
    assert "DequantizeLinear" in operators


@pytest.mark.parametrize("fmt", [Affine(8, axis=0), Affine(4, group=32), Trellis(axis=0)], ids=repr)
def test_fast_kernels_round_inputs_but_not_weights(fmt: Format) -> None:
    encoded = fmt.encode(weight_of((16, 64)))
    form, graph, made, expected = written("rows", encoded, "fast")
    assert form is not None
    assert form.endswith(("in blocks of 64", "in blocks of 32"))
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-6)  # ones are exact in 8 bits
    assert "MatMulNBits" in {node.op_type for node in graph}


def test_a_table_that_is_a_head_too_is_stored_once() -> None:
    weight = weight_of((32, 32))
    encoded = Affine(4, axis=0).encode(weight)
    form, graph, made, _ = written("tied", encoded, "exact")
    decoded = encoded.decode()
    assert torch.equal(made[:32], decoded.flip(0))
    assert torch.equal(made[32], decoded[:, 0])
    stored = sum(value.const_value.nbytes for value in graph.weights().values())
    assert form == "int4, restored at load"
    assert stored == 32 * 32 // 2 + 4 * 32


@pytest.mark.parametrize(
    "encoded",
    [
        Codebook(16).encode(weight_of((32, 32))),
        Affine(8, grid="endpoint").encode(weight_of((32, 32))),
        Affine(8).encode(weight_of((32, 32)).to(torch.bfloat16)),
        Affine(None).assign(weight_of((32, 32)), {"scale": torch.tensor([3e-5])}),
        Raw().encode(weight_of((32, 32))),
    ],
    ids=["codebook", "no zero", "bfloat16", "too many steps", "raw"],
)
def test_other_formats_are_numbers(encoded: Encoded) -> None:
    value = encoded.decode().float()
    graph, fed, expected = graph_of("rows", value)
    held = graph.weights()["w"]
    assert write_weight(graph, held, encoded, "exact") is None
    form = write_numbers(graph, held, half=True)
    assert form in {"float16", "float16, rounded"}
    made = outputs(graph, fed)
    assert torch.equal(made, expected.half().float())
    assert torch.equal(made, expected) == (form == "float16")


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (torch.full((32, 32), 1e6), "float32"),  # beyond float16
        (torch.rand(8, 8), "float32"),  # too small to be worth a node
        (torch.full((32, 32), torch.inf), "float16"),
    ],
)
def test_numbers_go_to_half_only_where_they_fit(value: Tensor, form: str) -> None:
    graph, fed, expected = graph_of("anything", value)
    assert write_numbers(graph, graph.weights()["w"], half=True) == form
    assert torch.equal(outputs(graph, fed), expected)


def test_integers_times_scales_are_the_tensor() -> None:
    for fmt in GRIDS:
        encoded = fmt.encode(weight_of((6, 40)))
        held = Integers.of(encoded)
        assert held is not None
        for bits in (4, 8):
            found = held.codes(bits)
            if found is None:
                continue
            codes, zero = found
            made, made_zero = codes.float(), torch.zeros(len(held.scale))
            made_zero = made_zero if zero is None else zero.float()
            assert int(codes.max() - codes.min()) < 1 << bits
            for (box,), (scale, shift) in held.grouping.walk([made], [held.scale, made_zero]):
                box.sub_(shift).mul_(scale)
            assert torch.equal(made, encoded.decode())


def test_negative_scales_are_signs_of_steps() -> None:
    encoded = Affine(4, axis=0).assign(
        weight_of((4, 8)), {"scale": torch.tensor([-0.25, 0.25, -0.5, 0.5])}
    )
    held = Integers.of(encoded)
    assert held is not None
    assert bool((held.scale > 0).all())
    assert torch.equal(held.steps * held.scale[:, None], encoded.decode())
