"""Memory for decoded tensors."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

_PAGE = 1 << 21
"""Bytes of a large page, on most machines."""


def new_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor whose values are yet to be written, as ``torch.empty`` makes it.

    Linux is asked for large pages, where they are whole: it gives one in a fifth of the time that
    as many bytes in pages of 4 kB take, and that is as long as decoding the numbers in them.
    """
    nbytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < _PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, nbytes + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _PAGE
        memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes // _PAGE * _PAGE)
    except OSError:  # a kernel without such pages, or a limit that torch has words for
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=start).view(shape)
