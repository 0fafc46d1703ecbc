"""What a forward pass holds while it waits, out of memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dither.disk import Disk, disk_of

_SMALL = 1 << 14
"""Bytes of memory that are not worth a place on a disk."""


class Tracked(TorchFunctionMode):
    """Knows all tensors that are made under it, and puts those that still live on a disk.

    They are the same tensors as before, with the same values and strides; their memory is that of
    a file. Tensors that share memory with one that is not known, which a module made outside torch
    or a function of torch keeps in itself, stay where they are.

    Args:
        disk: where they go.

    Attributes:
        nbytes: of what lives and is in memory, when it was last counted.
        most: bytes that lived at once, in memory or on the disk, whenever they were counted.
    """

    def __init__(self, disk: Disk) -> None:
        super().__init__()
        self._disk, self.nbytes, self.most = disk, 0, 0
        self._known: dict[int, weakref.ref[Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 - as torch gives it
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Call it, and note the tensors that it gives."""
        made = func(*args, **(kwargs or {}))
        for part in made if isinstance(made, tuple | list) else (made,):
            if type(part) is Tensor:
                self._known[id(part)] = weakref.ref(part)
        return made

    def count(self) -> None:
        """Look at what lives."""
        groups = self._living()
        sizes = [tensors[0].untyped_storage().nbytes() for tensors in groups]
        self.most = max(self.most, sum(sizes))
        are_there = [disk_of(tensors[0]) is not None for tensors in groups]
        self.nbytes = sum(n for n, there in zip(sizes, are_there, strict=True) if not there)

    def leave_memory(self) -> None:
        """Put all that lives on the disk."""
        self.nbytes = 0
        for tensors in self._living():
            if disk_of(tensors[0]) is not None:
                continue
            storage = tensors[0].untyped_storage()
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._disk.use(2 * len(whole))
            made = self._disk.empty((len(whole),), torch.uint8).copy_(whole)
            for tensor in tensors:
                typed = torch.empty(0, dtype=tensor.dtype).set_(
                    made.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
                )
                tensor.data = typed

    def _living(self) -> list[list[Tensor]]:
        """Living tensors that can leave memory, or have left it; those together that share it."""
        found: dict[int, dict[int, Tensor]] = {}
        known, self._known = self._known, {}
        for key, one in known.items():
            if (tensor := one()) is None:
                continue
            self._known[key] = one
            base = tensor._base  # noqa: SLF001 - no public name
            for each in (tensor,) if base is None else (tensor, base):
                if each.layout == torch.strided and each.device.type == "cpu":
                    place = each.untyped_storage().data_ptr()
                    found.setdefault(place, {})[id(each)] = each
        return [group for each in found.values() if _can_move(group := list(each.values()))]


def _can_move(tensors: list[Tensor]) -> bool:
    """Whether these are all that show some memory, and it is worth a place on a disk."""
    storage = tensors[0].untyped_storage()
    holders = int(torch._C._storage_Use_Count(storage._cdata)) - 1  # noqa: SLF001
    is_plain = holders == len(tensors) and not any(t.requires_grad for t in tensors)
    return is_plain and storage.nbytes() >= _SMALL
