"""Read archives: the index at once, tensors when they are asked for, everything checked."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from dither.archive.atomic import atomic_write
from dither.archive.base import Base, checked, needed
from dither.archive.layout import Entry
from dither.archive.limits import check_all, check_memory, default_limit, working_nbytes
from dither.archive.picture import notebook
from dither.archive.read_parts import read_encoded, read_payload, span
from dither.archive.source import BytesSource, Source, is_archive, read_index, source_of, unwrapped
from dither.archive.table import table
from dither.checkpoint import read_checkpoint
from dither.compiled import expect
from dither.core import ArchiveError, Encoded, SpecError
from dither.progress import report
from dither.threads import side_by_side

Result = TypeVar("Result")

BaseSource = Base | nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]
"""What an archive may rest on: see :func:`base_of`."""

SECONDS = 5e-9
"""About what plain code takes for each byte that is decoded, in loops that may be compiled."""

_WORTH_THREADS = 4_000_000
"""Bytes of tensors from which on several are decoded at once."""

_COPY_CHUNK = 1 << 20


class Archive(Mapping[str, Tensor]):
    """A ``.dither`` archive, in a file or in memory: a mapping from names to tensors.

    Opening reads only the index; a tensor is read, checked and decoded on request.
    Aliases (tied weights) are names like any other. Reading is safe from several threads, and from
    processes that were forked after opening; copies and pickles open the file anew, by its path.

    >>> import torch, dither
    >>> archive = dither.compress({"w": torch.linspace(-1, 1, 4096).reshape(64, 64)}, size="2kB")
    >>> archive["w"].shape, archive.nbytes <= 2000
    (torch.Size([64, 64]), True)
    """

    def __init__(
        self, source: Source, max_nbytes: int | None = None, base: BaseSource | None = None
    ) -> None:
        self._source = source
        self.nbytes = source.size
        self.max_nbytes = default_limit(source.size) if max_nbytes is None else max_nbytes
        index = read_index(source, self.max_nbytes, is_default=max_nbytes is None)
        self._index, self._base = index, None
        if base is not None:
            try:
                self._base = checked(index.base, lambda: base_of(base))
            except BaseException:
                source.close()
                raise
        self.trials: tuple[object, ...] = ()
        """What was tried to make it (``dither.compress`` with data); not in the file."""
        self._entries = {entry.name: entry for entry in index.entries}

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        max_nbytes: int | None = None,
        base: BaseSource | None = None,
    ) -> Self:
        """Open a file; use it as a context manager, or :meth:`close` it.

        Of a URL, the index is read, and then the bytes of the tensors that are asked for.

        Args:
            path: the file, or a URL of any kind that fsspec knows (``https://``, ``s3://``,
                ``hf://``; needs ``dither[remote]``) on a server that answers requests for ranges.
            max_nbytes: most memory, in bytes, that decoded tensors, their codes and the index may
                take, beside some 64 MB whatever the file; by default 4 GiB or 256 times the file's
                size, whichever is more. It also bounds the multiplications of ``Factors``, to
                :data:`MULTIPLICATIONS` for each byte.
            base: the weights on which its tensors rest, where it stores differences: a model,
                tensors by name, or a path. Without, such a file can be looked at only.

        Raises:
            ArchiveError: the file is no archive or is damaged, or the base is another.
            CheckpointError: the base cannot be read.
            OSError: the file cannot be read.
        """
        return cls(source_of(path), max_nbytes, base)

    @classmethod
    def from_bytes(
        cls,
        data: bytes | memoryview,
        max_nbytes: int | None = None,
        base: BaseSource | None = None,
    ) -> Self:
        """The archive that ``data`` holds; the rest as for :meth:`open`."""
        return cls(unwrapped(BytesSource(data)), max_nbytes, base)

    def close(self) -> None:
        """Close the file; tensors that were read stay."""
        self._source.close()

    def __enter__(self) -> Self:
        """Return the archive itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What is stored of each tensor, by name; aliases are not among them."""
        return MappingProxyType(self._entries)

    @property
    def aliases(self) -> Mapping[str, str]:
        """Second names of tensors: ``{alias: name}``."""
        return MappingProxyType(dict(self._index.aliases))

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The user's own JSON values."""
        return MappingProxyType(dict(self._index.metadata))

    @property
    def sites(self) -> Mapping[str, Any]:
        """Encodings of activations by site, as JSON: see ``dither.activations.apply``."""
        return MappingProxyType(dict(self._index.sites))

    @property
    def base(self) -> str | None:
        """The hash of the weights on which tensors rest; None where all are stored whole."""
        return self._index.base

    @property
    def original_nbytes(self) -> int:
        """Bytes of all tensors once decoded, each tied weight counted once."""
        return sum(entry.decoded_nbytes for entry in self._entries.values())

    def __getitem__(self, name: str) -> Tensor:
        """Read, check and decode one tensor."""
        entry = self._entry(name)
        base = needed(self._base, self.base, [entry])
        values = self.stored(name)
        if base is not None:
            return base.value(entry, values)
        assert values is not None  # noqa: S101 - all that rests on no base is stored
        return values

    def __iter__(self) -> Iterator[str]:
        """Names of tensors, then of aliases, as stored."""
        yield from self._entries
        yield from self._index.aliases

    def __len__(self) -> int:
        """Number of names, aliases included."""
        return len(self._entries) + len(self._index.aliases)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor or alias of this name; reads nothing."""
        return name in self._entries or name in self._index.aliases

    def encoded(self, name: str) -> Encoded:
        """One tensor's codes and parameters.

        Raises:
            KeyError: there is no such tensor.
            ArchiveError: a part is damaged, the tensor would take more than ``max_nbytes``, or it
                rests on a base and has no codes of its own.
        """
        entry = self._entry(name)
        if entry.on_base:
            raise ArchiveError(f"tensor {name!r} rests on the base {self.base}: read its values")
        check_memory([entry], self.max_nbytes)
        return read_encoded(self._source, entry)

    def stored(self, name: str) -> Tensor | None:
        """Values that the file has: of the tensor, or of its difference to the base's, if any.

        Raises:
            KeyError: there is no such tensor.
            ArchiveError: a part is damaged, or the tensor would take more than ``max_nbytes``.
        """
        entry = self._entry(name)
        check_memory([entry], self.max_nbytes)
        if entry.on_base and not entry.parts:
            return None
        encoded = read_encoded(self._source, entry)
        try:
            return encoded.decode()
        except (ValueError, RuntimeError, IndexError, OverflowError) as error:
            raise ArchiveError(f"tensor {name!r} cannot be decoded: {error}") from error

    def _entry(self, name: str) -> Entry:
        entry = self._entries.get(self._index.aliases.get(name, name))
        if entry is None:
            raise KeyError(f"the archive has no tensor {name!r}")
        return entry

    def state_dict(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """All tensors; aliases share the memory of what they stand for.

        Beside them, as many tensors as torch has threads are in memory at most, as they are decoded
        and with their codes.

        Args:
            dtype: what floating-point tensors are converted to, one by one; None keeps the type of
                each.
            device: where tensors go, one by one; None is the CPU.

        Raises:
            SpecError: ``dtype`` is no floating-point type.
            ArchiveError: a part is damaged, or all would take more than ``max_nbytes``.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise SpecError(
                f"dtype={dtype} is no floating-point type, such as torch.bfloat16; tensors of "
                "other types keep theirs"
            )

        def placed(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None)

        entries = self._entries.values()
        needed(self._base, self.base, entries)
        check_memory(entries, self.max_nbytes)
        expect(sum(entry.decoded_nbytes for entry in entries) * SECONDS)
        count = self._side_by_side(entries)
        keys = list(self._entries)
        tensors = dict(zip(keys, self._mapped(lambda n: placed(self[n]), keys, count), strict=True))
        return tensors | {alias: tensors[name] for alias, name in self._index.aliases.items()}

    def each(self, use: Callable[[str], None], names: Sequence[str]) -> None:
        """Call ``use`` with each name, which reads its tensor and keeps no memory of the archive's.

        As many run side by side as torch has threads and ``max_nbytes`` has room for, so that as
        many tensors are in memory at once, and with one thread one. The first error in the order
        of names is raised; what had begun by then is finished, and nothing else begins.

        Args:
            use: may be called in any order, and in any thread.
            names: of tensors or aliases.
        """
        entries = self._behind(names)
        expect(sum(entry.decoded_nbytes for entry in entries) * SECONDS)
        for _ in self._mapped(use, names, self._side_by_side(entries, is_kept=False)):
            pass

    def _mapped(
        self, function: Callable[[str], Result], names: Sequence[str], count: int
    ) -> Iterator[Result]:
        """Results in the order of names, ``count`` of which are worked at side by side."""
        done, total = 0, sum(entry.decoded_nbytes for entry in self._behind(names)) or 1
        for some in self._together(names):
            bringing = self._source.bringing(*span(self._behind(some)))
            with bringing, side_by_side(function, some, count) as results:
                for entry, result in zip(self._behind(some), results, strict=True):
                    done += entry.decoded_nbytes
                    report("decoding", done / total, entry.name)
                    yield result

    def _together(self, names: Sequence[str]) -> Iterator[Sequence[str]]:
        """Names whose bytes are worth asking for at once; all of them where that costs nothing."""
        ahead, some = self._source.ahead, list(names if not self._source.ahead else ())
        for name in names if ahead else ():
            begin, end = span(self._behind([*some, name]))
            if some and end - begin > ahead:
                yield some
                some = []
            some.append(name)
        yield some

    def _behind(self, names: Collection[str]) -> list[Entry]:
        """What is stored by each name."""
        return [self._entries[self._index.aliases.get(name, name)] for name in names]

    def check(self, names: Collection[str]) -> None:
        """Read what is stored of some tensors, and decode nothing; not over a network.

        Raises:
            ArchiveError: a checksum does not hold, a tensor would take more than ``max_nbytes``, or
                a base is needed.
        """
        needed(self._base, self.base, self._behind(names))
        for entry in self._behind(names if not self._source.ahead else ()):
            check_memory([entry], self.max_nbytes)
            for part in entry.parts:
                read_payload(self._source, entry, part)

    def _side_by_side(self, entries: Collection[Entry], *, is_kept: bool = True) -> int:
        """How many tensors to decode at once: as many as there are threads, and memory for them."""
        whole = sum(entry.decoded_nbytes for entry in entries)
        if whole < _WORTH_THREADS:
            return 1
        kept = whole if is_kept else 0
        beside = sorted(
            (working_nbytes(e) - e.decoded_nbytes * is_kept for e in entries), reverse=True
        )
        count = min(torch.get_num_threads(), len(beside))
        while count > 1 and kept + sum(beside[:count]) > self.max_nbytes:
            count -= 1
        return count

    def check_total(self) -> None:
        """Refuse to read all tensors, one after the other, where that could take hours.

        A small file may say that it holds many vast tensors. All together may take ``max_nbytes``,
        or what is usual for a file of that size.

        Raises:
            ArchiveError: they take more.
        """
        check_all(self._entries.values(), self.max_nbytes, self.nbytes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the archive, byte for byte, to a file which appears whole or not at all."""
        with atomic_write(path) as file:
            chunk = max(_COPY_CHUNK, self._source.ahead)
            for start in range(0, self.nbytes, chunk):
                file.write(self._source.read(start, min(chunk, self.nbytes - start)))

    def to_bytes(self) -> bytes:
        """The archive as it stands in its file."""
        return self._source.read(0, self.nbytes)

    def __eq__(self, other: object) -> bool:
        """Archives are equal when they are the same object: compare their tensors."""
        return self is other

    __hash__ = object.__hash__

    def __reduce__(self) -> tuple[object, ...]:
        """Copies and pickles read for themselves; of a file they take the path, not the bytes."""
        made = (self._source, self.max_nbytes, self._base)
        return type(self), made, {"trials": self.trials}

    def __copy__(self) -> Self:
        """A copy with a descriptor of its own, which is closed by itself."""
        return copy.deepcopy(self)

    def __str__(self) -> str:
        """A table: one line for each tensor and the sums."""
        return table(list(self._entries.values()), self.aliases, self.nbytes)

    def _repr_html_(self) -> str:
        """What a notebook shows: a map of the bytes, and a table of the largest tensors."""
        return notebook(list(self._entries.values()), self.aliases, self.nbytes)

    def __repr__(self) -> str:
        """A short description."""
        return f"<Archive of {len(self._entries)} tensors in {self.nbytes} bytes>"


def base_of(source: BaseSource) -> Base:
    """What an archive may rest on.

    Args:
        source: a model, tensors by name (an open archive is that, too), or the path of an archive
            or any other checkpoint.

    Raises:
        ArchiveError: the file is an archive that rests on another.
    """
    if isinstance(source, Base):
        return source
    if isinstance(source, Archive):
        source.check_total()
        return Base.of(source.state_dict(), is_own=True)
    if not isinstance(source, str | os.PathLike):
        return Base.of(source)
    if not is_archive(source):
        return Base.of(read_checkpoint(source), is_own=True)
    with Archive.open(source) as archive:
        if archive.base is not None:
            raise ArchiveError(
                f"the base {os.fspath(source)!r} rests on another, {archive.base}: open it with "
                "that, dither.open(path, base=...), and give what is open; or decompress it first"
            )
        return base_of(archive)
