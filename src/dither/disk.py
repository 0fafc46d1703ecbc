"""Tensors in files without names, which the system may move out of memory at any time.

A model whose parameters are there runs as any other does, with the same numbers; what is done with
it keeps there what is as large as the model: copies of it, and statistics of its weights. The files
are gone with the process, however that ends.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

ROOM = 1 << 28
"""Bytes of files that may be in memory, about, beside those of the module that is called."""

_PAGE, _TRIM = 4096, 1.0
_LEAST, _SHARE = 1 << 24, 4
"""Files are of so many bytes at least, and of a share of all there are."""

_C: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
"""The library of C that is at work here."""

_DISKS: weakref.WeakSet[Disk] = weakref.WeakSet()


class Disk:
    """A folder, and the tensors that are in files there.

    Memory of a tensor that is gone is used for the next of its size; files go with the last tensor
    and the disk itself. Nothing is there before the first tensor.

    Args:
        folder: on a disk with room.
        room: bytes that may be in memory before they are given back, about.

    Attributes:
        folder: the same.
        nbytes: of all files.
        peak: most bytes that were in use between two times that memory was given back, as far as
            :meth:`use` was told.

    >>> disk = Disk(Path(tempfile.gettempdir()))
    >>> kept = disk.copy(torch.arange(6).reshape(2, 3).T)
    >>> kept.tolist(), kept.stride(), disk_of(kept) is disk, disk_of(torch.ones(1))
    ([[0, 3], [1, 4], [2, 5]], (1, 3), True, None)
    """

    def __init__(self, folder: str | os.PathLike[str], room: int = ROOM) -> None:
        self.folder, self.room = Path(folder), room
        self.nbytes, self.peak = 0, 0
        self._used, self._trimmed = 0, 0.0
        self._files: dict[int, mmap.mmap] = {}
        self._free: dict[int, list[tuple[int, int]]] = {}
        self._end, self._last = 0, 0  # of what is taken of the last file, and where that begins
        self._lock = threading.RLock()
        _DISKS.add(self)

    def __deepcopy__(self, memo: object) -> Self:
        """There is but one: copies of a module stand on the same disk."""
        return self

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor there, of any values.

        Raises:
            OSError: the disk is full.
        """
        size = max(math.prod(shape) * dtype.itemsize, 1)
        flat = torch.frombuffer(self.memory(size), dtype=torch.uint8)
        return flat[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor there, of zeros."""
        self.use(math.prod(shape) * dtype.itemsize)
        return self.empty(shape, dtype).zero_()

    @torch.no_grad()
    def copy(self, value: Tensor) -> Tensor:
        """A copy there, with the same strides."""
        value = value.detach()
        self.use(2 * value.nbytes)
        extents = [(n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True)]
        span = sum(extents) + 1 if value.numel() else 0
        whole = value.as_strided((span,), (1,))
        made = self.empty((span,), value.dtype).copy_(whole)
        return made.as_strided(value.shape, value.stride(), 0)

    def use(self, nbytes: int) -> None:
        """So many bytes are going to be touched; what was before goes, if that is too much."""
        with self._lock:
            if self._used + nbytes > self.room:
                self.release()
            self._used += nbytes
            self.peak = max(self.peak, self._used)

    def release(self) -> None:
        """Give the memory back to the system, which keeps the values in the files.

        Where the system does not know how, it has to find out by itself what is not in use.
        """
        with self._lock:
            if hasattr(_C, "malloc_trim") and time.monotonic() > self._trimmed + _TRIM:
                _C.malloc_trim(0)  # what is free between tensors goes back to the system, too
                self._trimmed = time.monotonic()
            self._used = 0
            for memory in self._files.values() if sys.platform == "linux" else ():
                memory.madvise(mmap.MADV_DONTNEED)

    def holds(self, place: int) -> bool:
        """Whether an address is in a file of this disk."""
        return any(start <= place < start + len(file) for start, file in list(self._files.items()))

    def memory(self, nbytes: int) -> memoryview:
        """So many bytes there, of any values, for as long as something shows them.

        Raises:
            OSError: the disk is full.
        """
        size = -(-nbytes // _PAGE) * _PAGE
        with self._lock:
            free = self._free.get(size)
            start, offset = free.pop() if free else self._taken(size)
            view = memoryview(self._files[start])[offset : offset + nbytes]
        # Torch holds the view for as long as there is a tensor on it.
        weakref.finalize(view, self._give_back, size, (start, offset)).atexit = False
        return view

    def _taken(self, size: int) -> tuple[int, int]:
        if self._last not in self._files or self._end + size > len(self._files[self._last]):
            self._last, self._end = self._grown(max(size, _LEAST, self.nbytes // _SHARE)), 0
        self._end += size
        return self._last, self._end - size

    def _grown(self, size: int) -> int:
        """Another file; where it begins in memory."""
        size = -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        with tempfile.TemporaryFile(dir=self.folder, prefix="dither-") as file:
            file.truncate(size)
            _reserve(file.fileno(), size)
            memory = mmap.mmap(file.fileno(), size)
        start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        self._files[start] = memory
        self.nbytes += size
        return start

    def _give_back(self, size: int, place: tuple[int, int]) -> None:
        with self._lock:
            self._free.setdefault(size, []).append(place)


def _reserve(descriptor: int, size: int) -> None:
    """Take a file's room on its disk now, where the system can: later, a full disk is no error.

    Raises:
        OSError: the disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def disk_of(value: Tensor) -> Disk | None:
    """The disk on which a tensor is; None if it is in memory, or on another device."""
    if not _DISKS or value.device.type != "cpu" or value.layout != torch.strided:
        return None
    place = value.untyped_storage().data_ptr()
    return next((disk for disk in list(_DISKS) if disk.holds(place)), None)


def home_of(model: nn.Module) -> Disk | None:
    """The disk on which a model is; None if it is in memory."""
    found = (disk_of(parameter) for parameter in model.parameters())
    return next((disk for disk in found if disk is not None), None) if _DISKS else None


def copied(value: Tensor) -> Tensor:
    """A copy with memory of its own, where the tensor itself is: in memory or on its disk."""
    disk = disk_of(value)
    return value.detach().clone() if disk is None else disk.copy(value)


def kept(value: Tensor, like: Tensor) -> Tensor:
    """The same on the disk of another tensor, if that is on one."""
    disk = disk_of(like)
    return value if disk is None else disk.copy(value)


def copies_on_disk(model: nn.Module) -> dict[int, Any]:
    """Copies of all parameters that are on a disk, by identity: a memo for ``copy.deepcopy``."""
    return {
        id(p): type(p)(copied(p), requires_grad=p.requires_grad)
        for p in (model.parameters() if _DISKS else ())
        if disk_of(p) is not None
    }


def touched(value: Tensor) -> None:
    """A tensor is going to be read or written as a whole."""
    if (disk := disk_of(value)) is not None:
        disk.use(value.nbytes)


def memory_nbytes() -> int:
    """Bytes of memory that this process may have, as far as the system says; else very many."""
    found = [1 << 62]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
        found.append(int(text))
    return min(found)


@contextmanager
def on_disk(
    folder: str | os.PathLike[str], room: int = ROOM, after: Callable[[], None] | None = None
) -> Iterator[Disk]:
    """Models that are built meanwhile, in this thread, have their parameters on a disk.

    Each is moved as it is placed in its module; buffers, which are small, stay in memory. Such a
    model runs as any other and gives the same. Each module tells the disk when it is called, so
    that no more is in memory than ``room`` and what that module uses. It takes as much of the disk
    as it would take of memory, and some seven times that while it is compressed with data.

    Args:
        folder: on a disk with room.
        room: bytes that may be in memory, about, beside the parameters of the module at hand.
        after: is called after each parameter that was moved.

    Yields:
        The disk.

    >>> with on_disk(tempfile.gettempdir()):
    ...     layer = nn.Linear(3, 2)
    >>> disk_of(layer.weight) is not None, layer(torch.ones(1, 3)).shape
    (True, torch.Size([1, 2]))
    """
    disk, here = Disk(folder, room), threading.get_ident()

    def place(module: nn.Module, _: str, parameter: object) -> None:
        if threading.get_ident() != here or not isinstance(parameter, nn.Parameter):
            return
        if not parameter.is_meta and disk_of(parameter) is None:
            parameter.data = disk.copy(parameter)
            if after is not None:
                after()
        if not any(isinstance(hook, Use) for hook in module._forward_pre_hooks.values()):  # noqa: SLF001
            module.register_forward_pre_hook(Use(disk), prepend=True)

    handle: Any = register_module_parameter_registration_hook(place)
    try:
        yield disk
    finally:
        handle.remove()


class Use:
    """Tells a disk that a module's parameters are going to be read."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def __call__(self, module: nn.Module, _: object) -> None:
        own = module._parameters.values()  # noqa: SLF001 - without those of modules in it
        self._disk.use(sum(p.nbytes for p in own if p is not None and not p.is_meta))
