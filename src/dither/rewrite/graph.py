"""Which layers follow which, by tracing a model with torch.fx."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn

from dither.core import SpecError
from dither.rewrite.channels import Layer

HOMOGENEOUS: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
)
"""Modules for which ``f(s x) = s f(x)`` holds channel by channel, for ``s > 0``."""

_FUNCTIONS: set[Callable[..., object]] = {torch.relu, nn.functional.relu, torch.flatten}
_FUNCTIONS |= {nn.functional.leaky_relu, nn.functional.max_pool2d, nn.functional.avg_pool2d}
_FUNCTIONS |= {nn.functional.adaptive_avg_pool2d, nn.functional.dropout}
_METHODS = {"relu", "relu_", "flatten", "contiguous"}


class Graph:
    """The calls of a model's modules.

    Attributes:
        nodes: of the trace, in the order of execution.

    Raises:
        SpecError: torch.fx cannot trace the model: its calls depend on values.
    """

    def __init__(self, model: nn.Module) -> None:
        try:
            graph = _Tracer().trace(model)
        except Exception as error:
            raise SpecError(
                f"torch.fx cannot trace this {type(model).__name__} ({error}); give the names of "
                "the layers that follow each other"
            ) from error
        self._modules = dict(model.named_modules())
        self.nodes = list(graph.nodes)
        self._calls: dict[str, int] = {}
        for node in self.nodes:
            if node.op == "call_module":
                self._calls[str(node.target)] = self._calls.get(str(node.target), 0) + 1
        self._read = {str(n.target) for n in self.nodes if n.op == "get_attr"}

    def pairs(
        self,
        first: type | object,
        second: type | object,
        between: bool = False,  # noqa: FBT001, FBT002
    ) -> list[tuple[str, str]]:
        """Names of modules of which the second alone reads what the first gives.

        Args:
            first: kind of the first module.
            second: kind of the second.
            between: whether positively homogeneous activations and pooling may stand between.
        """
        found = []
        for node in self.nodes:
            if not self._is(node, first):
                continue
            reader = self._reader(node)
            while between and reader is not None and self._is_homogeneous(reader):
                reader = self._reader(reader)
            if reader is not None and self._is(reader, second):
                found.append((str(node.target), str(reader.target)))
        return found

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        module: nn.Module = self._modules[str(node.target)]
        return module

    def is_called_once(self, node: fx.Node) -> bool:
        """Whether no other node calls the module of this one, or reads its parameters."""
        name = str(node.target)
        return self._calls[name] == 1 and not any(r.startswith(f"{name}.") for r in self._read)

    def _reader(self, node: fx.Node) -> fx.Node | None:
        """The only node that reads this one."""
        users = list(node.users)
        return users[0] if len(users) == 1 else None

    def _is(self, node: fx.Node, kind: type | object) -> bool:
        if node.op != "call_module" or not self.is_called_once(node):
            return False
        return isinstance(self.module(node), kind)  # type: ignore[arg-type]

    def _is_homogeneous(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._modules[str(node.target)], HOMOGENEOUS)
        if node.op == "call_function":
            return node.target in _FUNCTIONS
        return node.op == "call_method" and node.target in _METHODS


class _Tracer(fx.Tracer):
    """Layers of ours are leaves, whatever class stands in for them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Layer) or super().is_leaf_module(m, module_qualified_name)
