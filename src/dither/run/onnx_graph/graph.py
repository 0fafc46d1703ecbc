"""Edit graphs of ONNX: add nodes, read constants, find what uses a value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dither.core import DitherError

MICROSOFT = "com.microsoft"
"""The domain of onnxruntime's own operators."""


def onnx_ir() -> Any:
    """The package that graphs are edited with.

    Raises:
        DitherError: it, or what the exporter of torch needs, is missing.
    """
    try:
        import onnx
        import onnx_ir
        import onnxscript
    except ImportError as error:
        raise DitherError(f'ONNX needs {error.name}; run: pip install "dither[onnx]"') from error
    del onnx, onnxscript
    return onnx_ir


class Graph:
    """The main graph of an ``onnx_ir.Model``; values and nodes are those of onnx_ir."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.ir = onnx_ir()
        self._graph = model.graph
        self._constants: dict[tuple[Any, ...], Any] = {}

    def __iter__(self) -> Iterator[Any]:
        """Nodes, in their order; the graph may be changed on the way."""
        return iter(list(self._graph))

    def weights(self) -> dict[str, Any]:
        """Initializers by name."""
        return dict(self._graph.initializers)

    def initializer(self, name: str, values: np.ndarray[Any, Any] | Tensor) -> Any:
        """A new constant of the file. One that was given before, under its name, stays."""
        held = self._graph.initializers.get(name)
        if held is not None:
            return held
        value = self.ir.val(name, const_value=self.ir.tensor(_array(values), name=name))
        self._graph.register_initializer(value)
        return value

    def constant(self, values: np.ndarray[Any, Any] | Tensor) -> Any:
        """A small constant, once for all places that need it."""
        array = _array(values)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self.initializer(name, array)
        return self._constants[key]

    def add(
        self, at: Any, operator: str, inputs: Sequence[Any], domain: str = "", **attributes: Any
    ) -> Any:
        """The value of a new node, which stands before the node ``at``."""
        node = self.ir.node(operator, inputs, attributes=attributes, domain=domain)
        node.outputs[0].name = f"{operator}_{id(node)}"
        self._graph.insert_before(at, node)
        if domain:
            self._graph.opset_imports.setdefault(domain, 1)
        return node.outputs[0]

    def after_inputs(self) -> Any:
        """The first node: what stands before it needs constants alone."""
        return next(iter(self._graph))

    def replace(self, node: Any, value: Any) -> None:
        """Put a value in the place of a node's, and take the node away."""
        old = node.outputs[0]
        if old.is_graph_output():
            old.name, value.name = f"{old.name}_before", old.name
            value.shape, value.type = old.shape, old.type
            outputs = self._graph.outputs
            outputs[list(outputs).index(old)] = value
        old.replace_all_uses_with(value)
        self.remove(node)

    def remove(self, node: Any) -> None:
        """Take away a node whose values nothing uses."""
        self._graph.remove(node, safe=True)

    def array(self, value: Any) -> np.ndarray[Any, Any] | None:
        """The numbers of a constant; None of what is none."""
        if value is None:
            return None
        if value.const_value is not None:
            found: np.ndarray[Any, Any] = value.const_value.numpy()
            return found
        tensor = self.ir.convenience.get_const_tensor(value)
        return None if tensor is None else np.asarray(tensor.numpy())

    def only_user(self, value: Any) -> Any:
        """The one node that uses a value; None where several do, or the caller gets it."""
        uses = list(value.uses())
        return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None

    def fold(self) -> None:
        """Compute what is made of constants that are no weights; of those, shapes alone."""
        from onnxscript.optimizer import fold_constants

        weights = set(self.weights())

        def decide(node: Any) -> bool | None:
            reads = any(value is not None and value.name in weights for value in node.inputs)
            return False if reads and node.op_type != "Shape" else None

        fold_constants(self.model, should_fold=decide)

    def tidy(self) -> None:
        """Take away what nothing uses, and put nodes behind what they need."""
        self._graph.sort()
        for node in self._graph:  # the exporter says of each where in the program it comes from
            node.metadata_props.clear()
        self.ir.passes.common.RemoveUnusedNodesPass()(self.model)
        for name in list(self._graph.opset_imports):
            if name and not any(node.domain == name for node in self._graph):
                del self._graph.opset_imports[name]
        for value in list(self._graph.initializers.values()):
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[value.name]


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """An attribute's value."""
    held = node.attributes.get(name)
    return default if held is None else held.value


def _array(values: np.ndarray[Any, Any] | Tensor) -> np.ndarray[Any, Any]:
    return values.numpy() if isinstance(values, Tensor) else values
