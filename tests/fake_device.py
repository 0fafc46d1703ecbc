"""A pretend accelerator: tensors in ordinary memory that behave as if they were elsewhere.

Each wraps a tensor of the CPU, says that its device is ``pretend:0``, and does what torch does with
a real one: it takes no part in operations with tensors of the CPU, other than single numbers and
index tensors, draws from generators of its own device only, and cannot be read by NumPy. Factories
and ``to`` make them; autograd, modules and optimizers work on them, but for LSTM and GRU, of which
torch asks kernels that a CPU has not got.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn, Self, cast
from weakref import WeakValueDictionary

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
MOVES = {"_to_copy", "copy_"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Operations whose index tensors may also be on the CPU."""


class PretendTensor(torch.Tensor):
    """A tensor that is elsewhere; ``held`` are its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[Self], held: Tensor) -> Self:
        where, strides, start = torch.device(NAME, 0), held.stride(), held.storage_offset()
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides,
            start,
            dtype=held.dtype,
            device=where,
            dispatch_sizes_strides_policy="sizes",
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        op: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        return _run(op, *args, **(kwargs or {}))

    def numpy(self, *, force: bool = False) -> NoReturn:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy; use Tensor.cpu()")

    def tolist(self) -> list[float]:
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"elsewhere {self.held!r}"

    def __deepcopy__(self, memo: dict[int, object]) -> object:
        return memo.setdefault(id(self), _made(self.held.clone(), *_kind(self)))

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return _made, (self.held, *_kind(self))


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return isinstance(tensor, torch.nn.Parameter), tensor.requires_grad


def _made(held: Tensor, is_parameter: bool, requires_grad: bool) -> Tensor:
    made = PretendTensor(held)
    return torch.nn.Parameter(made, requires_grad) if is_parameter else made


class PretendGenerator(torch._C.Generator):
    """In place of ``torch.Generator``, one that may say that it is of the pretend device.

    Its numbers are the CPU's, but only the device's own tensors take them.
    """

    def __new__(cls, device: torch.device | str = "cpu") -> Self:
        made: Self = super().__new__(cls, "cpu")  # type: ignore[call-arg]
        if torch.device(device).type == NAME:
            AWAY[cast(Any, made)._cdata] = (
                made  # operations are handed another object of the same address
            )
        return made


AWAY: WeakValueDictionary[int, torch.Generator] = WeakValueDictionary()
"""Generators of the pretend device by their address."""


def _run(op: torch._ops.OpOverload, *args: object, **kwargs: object) -> object:
    """An operation that reads pretend tensors, or makes some."""
    leaves = tree_leaves((args, kwargs))
    ours = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, PretendTensor)}
    name = op.overloadpacket.__name__
    if ours and name not in MOVES:
        _refuse_mixtures(op, args, leaves)
    is_away = bool(ours) if name != "copy_" else isinstance(args[0], PretendTensor)
    if kwargs.get("device") is not None:
        is_away = NAME in str(kwargs["device"])
        kwargs["device"] = torch.device("cpu")
    generator = kwargs.get("generator")
    if (
        isinstance(generator, torch._C.Generator)
        and (cast(Any, generator)._cdata in AWAY) != is_away
    ):
        raise RuntimeError(f"Expected a generator of the device of the tensor (in {op})")
    kwargs.pop("pin_memory", None)
    args, kwargs = tree_map_only(PretendTensor, lambda tensor: tensor.held, (args, kwargs))
    found = op(*args, **kwargs)
    if not is_away:
        return found
    return tree_map_only(Tensor, lambda made: ours.get(id(made), PretendTensor(made)), found)


def _refuse_mixtures(
    op: torch._ops.OpOverload, args: Sequence[object], leaves: Iterable[object]
) -> None:
    name = op.overloadpacket.__name__
    here = [leaf for leaf in leaves if type(leaf) is not PretendTensor and torch.is_tensor(leaf)]
    is_indexed = name in INDEXED and isinstance(args[0], PretendTensor)
    is_written = name.endswith("_") and any(args[0] is tensor for tensor in here)
    mixed = [tuple(tensor.shape) for tensor in here if tensor.ndim and not is_indexed]
    if mixed or is_written:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu "
            f"(in {op}, with shapes {mixed})"
        )


MODULE = SimpleNamespace(
    is_available=lambda: False,  # as an accelerator of its own accord; we ask for it by name
    device_count=lambda: 1,
    current_device=lambda: 0,
    get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
    _is_in_bad_fork=lambda: False,
    manual_seed_all=lambda seed: None,
)
"""What torch asks of ``torch.pretend``."""


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return False

    def has_primary_context(self, index: int) -> bool:
        return False

    def is_built(self) -> bool:
        return True


def _register() -> object:
    """Once in a process: torch has room for one such device and does not give it back."""
    _setup_privateuseone_for_python_backend(NAME, MODULE, _Hooks())
    every, one = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(_run, "PrivateUse1")  # factories: no argument of theirs is ours
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    copy = torch.ops.aten.copy_.default  # torch.tensor calls it past __torch_dispatch__
    one.impl("copy_", partial(_run, copy), "PrivateUse1")
    return every, one


_KEPT = _register()  # on import: the first backward pass of a process counts the devices there are


def pretend(patch: pytest.MonkeyPatch) -> torch.device:
    """The device, where ``torch.Generator`` is taught to know it."""
    patch.setattr(torch, "Generator", PretendGenerator)
    return torch.device(NAME)
