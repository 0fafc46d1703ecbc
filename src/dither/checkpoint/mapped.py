"""Files of weights as memory: read where they are touched, given back on request."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux, which Python's mmap does not name in all versions

_MAPS: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()
"""Mapped files by their first address, for as long as a tensor shows one."""


def mapped_file(path: Path) -> mmap.mmap:
    """A file that is not empty as memory; what is written there stays within this process.

    On Linux no memory is set aside for that, so that the file may be larger than there is.
    """
    with path.open("rb") as file:
        if sys.platform == "linux":
            flags = mmap.MAP_PRIVATE | _NO_RESERVE
            memory = mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        else:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    _MAPS[torch.frombuffer(memory, dtype=torch.uint8).data_ptr()] = memory
    return memory


def shown(memory: mmap.mmap, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor in a mapped file, or a copy of it where it does not begin at a whole number.

    Raises:
        ValueError: the file is too short.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if not nbytes:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=offset)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).reshape(shape)


@dataclass(frozen=True)
class Pages:
    """The memory of mapped files, as far as they were touched."""

    maps: tuple[mmap.mmap, ...] = ()

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Pages:
        """The files that some tensors show."""
        places = {tensor.data_ptr() for tensor in tensors}
        return cls(
            tuple(
                memory
                for start, memory in sorted(_MAPS.items(), key=lambda item: item[0])
                if any(start <= place < start + len(memory) for place in places)
            )
        )

    def release(self) -> None:
        """Give the memory back to the system: what is touched next is read from the file again.

        Changes to tensors that show these files are lost. Where the system cannot, nothing happens.
        """
        if sys.platform == "linux":
            for memory in self.maps:
                memory.madvise(mmap.MADV_DONTNEED)
