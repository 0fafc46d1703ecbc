"""Take channels that are always zero out of a model, and all that made or read them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dither.model import evaluating, refuse_attached
from dither.rewrite.channels import Conv, ConvTransposed, Layer, output_channels, why_fixed
from dither.rewrite.graph import Graph

_BY_ELEMENT: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardtanh, nn.ELU),
    *(nn.Sigmoid, nn.Tanh, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d),
)
_POOLS: tuple[type[nn.Module], ...] = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
)
_FUNCTIONS: dict[object, Callable[[Tensor], Tensor]] = {
    torch.relu: torch.relu,
    nn.functional.relu: torch.relu,
    nn.functional.relu6: nn.functional.relu6,
    nn.functional.gelu: nn.functional.gelu,
    nn.functional.silu: nn.functional.silu,
    "relu": torch.relu,
    "relu_": torch.relu,
    "contiguous": lambda values: values,
}
_SUMS = {operator.add, operator.iadd, torch.add}


@dataclass
class _Group:
    """Channels that go together: what makes, changes or reads them is cut alike.

    Attributes:
        size: how many.
        makers: layers whose outputs they are.
        along: batch norms and depthwise convolutions on the way.
        readers: layers whose inputs they are.
        unused: where each reader sees 0, ``(size,)``.
        fixed: why nothing can be taken out; empty if it can.
    """

    size: int
    makers: list[str] = field(default_factory=list)
    along: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    unused: Tensor | None = None
    fixed: str = ""

    def read(self, name: str, constants: Tensor) -> None:
        """Note a reader, and what it sees."""
        self.readers.append(name)
        is_zero = constants == 0
        self.unused = is_zero if self.unused is None else self.unused & is_zero


@dataclass(frozen=True)
class _Value:
    """A value in the graph: its channels, and what each is where that does not depend on inputs.

    Attributes:
        group: number of its group.
        constants: ``(channels,)`` float64, NaN where it depends on the input.
        axis: of the channels: 1 behind a convolution, -1 behind a linear layer or flattened.
    """

    group: int
    constants: Tensor
    axis: int


def remove_channels(model: nn.Module) -> dict[str, int]:
    """Take out channels of which the model's evaluation shows that they are always zero, in place.

    A channel goes where all that read it see 0, whatever the input: its rows in the layers that
    make it, in batch norms and depthwise convolutions on the way, and its columns in the layers
    that read it. Where branches are added, as around residual blocks, it goes if the sum is always
    zero, and from all branches. What remains computes what it did, but for the rounding of shorter
    sums.

    Left alone is what cannot be proven: channels that reach the model's output or an operation that
    is not known here, grouped convolutions other than depthwise, layers that are called twice,
    tied, parametrized or hooked. Of each group one channel remains.

    Args:
        model: linear layers, convolutions, batch norms, activations, pooling and sums, such that
            torch.fx can trace it. Optimizers must be made anew: parameters are new ones.

    Returns:
        By layer, how many of its outputs went.

    Raises:
        SpecError: torch.fx cannot trace the model.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> _ = model[0].weight.data[2:5].zero_(), model[0].bias.data[2:5].zero_()
    >>> remove_channels(model)
    {'0': 3}
    >>> model[2].weight.shape
    torch.Size([2, 5])
    """
    refuse_attached(model, "remove_channels")
    with evaluating(model), torch.no_grad():
        groups = _Walk(model).groups()
        removed: dict[str, int] = {}
        for group in groups:
            if group.fixed or group.unused is None or not group.makers:
                continue
            keep = ~group.unused
            if bool(keep.all()):
                continue
            if not bool(keep.any()):
                keep[0] = True
            for name in group.makers:
                removed[name] = int((~keep).sum())
            _cut(model, group, keep.nonzero().flatten())
    return removed


class _Walk:
    """Follows channels through a traced model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._graph = Graph(model)
        self._groups: list[_Group] = []
        self._into: list[int] = []  # groups are merged into others
        self._values: dict[fx.Node, _Value] = {}

    def groups(self) -> list[_Group]:
        """All of them."""
        for node in self._graph.nodes:
            value = self._visit(node)
            if value is None:
                for given in node.all_input_nodes:
                    self._fix(given, f"{node.op} {node.target} reads it")
            else:
                self._values[node] = value
        return [group for number, group in enumerate(self._groups) if self._into[number] == number]

    def _visit(self, node: fx.Node) -> _Value | None:
        """What a node gives; None where that is not known."""
        given = [self._values[n] for n in node.all_input_nodes if n in self._values]
        if len(given) != len(node.all_input_nodes) or not given:
            return self._begin(node) if node.op == "call_module" and not given else None
        if node.op == "call_module":
            return self._module(node, given[0]) if len(given) == 1 else None
        if node.op not in {"call_function", "call_method"}:
            return None
        if node.target in _SUMS and len(given) == 2:
            return self._sum(*given) if len(node.args) == 2 and not node.kwargs else None
        if len(given) != 1 or node.args[0] is not node.all_input_nodes[0]:
            return None
        return self._function(node, given[0])

    def _function(self, node: fx.Node, given: _Value) -> _Value | None:
        settings = (*node.args[1:], *node.kwargs.values())
        if node.target in _FUNCTIONS and settings in {(), (False,), (True,)}:
            return _Value(given.group, _FUNCTIONS[node.target](given.constants), given.axis)
        if node.target in {torch.flatten, "flatten"} and given.axis == 1 and settings == (1,):
            return _Value(given.group, given.constants, -1)
        if node.target in {torch.mean, "mean"} and given.axis == 1:
            dims = settings[0] if settings else None
            whole = isinstance(dims, tuple | list) and set(dims) in ({2, 3}, {-1, -2})
            if whole and len(settings) == 1:
                return _Value(given.group, given.constants, -1)
        return None

    def _begin(self, node: fx.Node) -> _Value | None:
        """A layer that reads what is not followed, such as the model's input."""
        module = self._graph.module(node)
        return self._made(node, module) if isinstance(module, Layer) else None

    def _module(self, node: fx.Node, given: _Value) -> _Value | None:
        module, name = self._graph.module(node), str(node.target)
        if isinstance(module, _BY_ELEMENT):
            constants: Tensor = module(given.constants)
            return _Value(given.group, constants, given.axis)
        if isinstance(module, _POOLS) and given.axis == 1:
            zeros = given.constants.where(given.constants == 0, torch.nan)
            return _Value(given.group, zeros, 1)
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return _Value(given.group, given.constants, -1)
        if isinstance(module, _BatchNorm):
            return self._norm(node, module, given)
        if not isinstance(module, Layer):
            return None
        self._check(node, given)
        if _is_depthwise(module):
            self._own(given).along.append(name)
            idle = (module.weight.double().flatten(1) == 0).all(1) | (given.constants == 0)
            constants = _bias(module).where(idle, torch.nan)
            return _Value(given.group, constants, 1)
        if isinstance(module, nn.Linear) != (given.axis == -1) or getattr(module, "groups", 1) > 1:
            self._own(given).fixed = f"{name} reads it in groups or along another axis"
        self._own(given).read(name, given.constants)
        return self._made(node, module)

    def _norm(self, node: fx.Node, module: _BatchNorm, given: _Value) -> _Value | None:
        mean, variance = module.running_mean, module.running_var
        if mean is None or variance is None or len(mean) != len(given.constants):
            return None
        self._check(node, given)
        self._own(given).along.append(str(node.target))
        gain = (variance.double() + module.eps).rsqrt()
        shift = torch.zeros_like(gain)
        if module.affine:
            gain, shift = gain * module.weight.double(), module.bias.double()
        moved = (given.constants - mean.double()) * gain + shift
        return _Value(given.group, shift.where(gain == 0, moved), given.axis)

    def _made(self, node: fx.Node, module: Layer) -> _Value:
        number, name = len(self._groups), str(node.target)
        self._groups.append(_Group(output_channels(module), [name]))
        self._into.append(number)
        if isinstance(module, ConvTransposed) or getattr(module, "groups", 1) > 1:
            self._groups[number].fixed = f"{name} is grouped or transposed"
            constants = torch.full((output_channels(module),), torch.nan, dtype=torch.float64)
        else:
            idle = (module.weight.double().flatten(1) == 0).all(1)
            constants = _bias(module).where(idle, torch.nan)
        value = _Value(number, constants, -1 if isinstance(module, nn.Linear) else 1)
        self._check(node, value)
        return value

    def _sum(self, one: _Value, other: _Value) -> _Value | None:
        first, second = self._own(one), self._own(other)
        if one.axis != other.axis or first.size != second.size:
            return None
        if first is not second:
            number = self._groups.index(first)
            for merged, into in enumerate(self._into):
                if self._groups[into] is second:
                    self._into[merged] = number
            first.makers += second.makers
            first.along += second.along
            first.readers += second.readers
            first.fixed = first.fixed or second.fixed
            if second.unused is not None:
                first.unused = (
                    second.unused if first.unused is None else first.unused & second.unused
                )
        return _Value(one.group, one.constants + other.constants, one.axis)

    def _own(self, value: _Value) -> _Group:
        return self._groups[self._into[value.group]]

    def _check(self, node: fx.Node, value: _Value) -> None:
        """Fix a group where a module on its way cannot be cut."""
        name, module = str(node.target), self._graph.module(node)
        why = "" if self._graph.is_called_once(node) else "it is called more than once"
        if not why and isinstance(module, Layer):
            why = why_fixed(self._model, name)
        if why:
            self._own(value).fixed = f"{name}: {why}"

    def _fix(self, node: fx.Node, why: str) -> None:
        if node in self._values:
            self._own(self._values[node]).fixed = why


def _is_depthwise(module: Layer) -> bool:
    if not isinstance(module, Conv) or isinstance(module, ConvTransposed):
        return False
    return 1 < module.groups == module.in_channels == module.out_channels


def _bias(module: Layer) -> Tensor:
    if module.bias is None:
        return torch.zeros(output_channels(module), dtype=torch.float64)
    return module.bias.double().cpu()


def _cut(model: nn.Module, group: _Group, keep: Tensor) -> None:
    for name in dict.fromkeys(group.makers):
        module = model.get_submodule(name)
        _take(module, ("weight", "bias"), keep)
        setattr(
            module, "out_features" if isinstance(module, nn.Linear) else "out_channels", len(keep)
        )
    for name in dict.fromkeys(group.along):
        module = model.get_submodule(name)
        if isinstance(module, _BatchNorm):
            _take(module, ("weight", "bias", "running_mean", "running_var"), keep)
            module.num_features = len(keep)
        else:
            _take(module, ("weight", "bias"), keep)
            for setting in ("in_channels", "out_channels", "groups"):
                setattr(module, setting, len(keep))
    for name in dict.fromkeys(group.readers):
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            each = module.in_features // group.size
            columns = (keep[:, None] * each + torch.arange(each)).flatten()
            module.in_features = len(columns)
        else:
            columns = keep
            module.in_channels = len(keep)  # type: ignore[assignment]
        _take(module, ("weight",), columns, axis=1)


def _take(module: nn.Module, names: Iterable[str], index: Tensor, axis: int = 0) -> None:
    """Parameters and buffers with some of their rows or columns, in new memory."""
    for name in names:
        value = getattr(module, name, None)
        if not isinstance(value, Tensor):
            continue
        kept = value.detach().index_select(axis, index.to(value.device)).clone()
        if isinstance(value, nn.Parameter):
            kept = nn.Parameter(kept, requires_grad=value.requires_grad)
        setattr(module, name, kept)
