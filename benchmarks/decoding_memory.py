"""What decoding takes at its peak, beside what the reader counts against ``max_nbytes``.

``python -m benchmarks.decoding_memory`` decodes files of a few hundred bytes that stand for vast
tensors of every format, and files of real codes, and measures by how much the process grew. A case
that takes more than was counted, and :data:`BESIDE`, fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.environment import describe
from benchmarks.peak_memory import Peak, restart_for_exact_peaks
from dither import Archive
from dither.archive import ArchiveWriter, CodedPart, CodedTensor, Payload, code
from dither.archive.limits import working_nbytes
from dither.coding import encode_array, encode_codes
from dither.coding.contexts import Contexts
from dither.coding.payload import Head, Window
from dither.coding.tables import Steps
from dither.core import DTYPES, Encoded, Format
from dither.encoders.gptq import GPTQ
from dither.encoders.viterbi import Viterbi
from dither.formats import Affine, Codebook, Factors, Mixed, Product, Raw, Trellis

BESIDE = 16 << 20
"""Bytes that decoding may take beside what is counted."""

SIDE = 1 << 12
REAL = 1 << 11
"""Rows and columns of vast tensors, and of real ones."""

Parts = dict[str, tuple[tuple[int, ...], int | str]]


class Sink:
    """Bytes written."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes, /) -> None:
        """Take all of ``data``."""
        self.data += data


def constant(shape: tuple[int, ...], holds: int | str, value: int) -> CodedPart:
    """A part of equal codes, or of numbers that are 0, in a few bytes whatever its shape."""
    if isinstance(holds, str):
        itemsize = DTYPES[holds].itemsize
        count = min(int(np.prod(shape)), 4096)
        codec, payload = encode_array(np.zeros(count * itemsize, np.uint8), itemsize)
        return CodedPart(codec, shape, None, holds, Payload.of(payload))
    if int(np.prod(shape)) < 64 or holds == 1:
        codec, payload = encode_codes(np.full(shape, value, np.int32), holds)
        return CodedPart(codec, shape, holds, None, Payload.of(payload))
    # Two tables, so that there is a context for each code, and a window, so that it is moved.
    only = np.zeros(1, np.int64)
    table = Steps(only, only, 0, 0, 0, gaps=True)
    contexts = Contexts({len(shape) - 1: np.zeros(1, np.uint8)}, 0, 2)
    head = Head(8, 0, Window(0, value, 1, 0), contexts, [table, table], [("bits", b"")])
    return CodedPart("rans", shape, holds, None, Payload.of(head.write(len(shape), holds)))


def vast(
    fmt: Format, dtype: torch.dtype, shape: tuple[int, ...], parts: Parts, value: int = 0
) -> bytes:
    """An archive of one tensor ``t`` whose parts are constant."""
    coded = {name: constant(sizes, holds, value) for name, (sizes, holds) in parts.items()}
    return archive_of(CodedTensor(fmt, shape, str(dtype).removeprefix("torch."), coded))


def archive_of(tensor: CodedTensor | Encoded) -> bytes:
    """An archive of one tensor ``t``."""
    sink = Sink()
    writer = ArchiveWriter(sink)
    writer.add("t", tensor)
    writer.finish()
    return sink.data


def vast_cases(n: int) -> dict[str, Callable[[], bytes]]:
    """Files of a few hundred bytes, by name; a tensor is ``(n, n)``."""
    short, single = torch.float8_e5m2, torch.float32
    shape, flat = (n, n), (n * n,)
    zero: Parts = {"zero": ((1,), 1 << 23)}
    scale: Parts = {"scale": ((1,), "float32")}
    trellis: Parts = {"levels": (shape, 16), **zero, **scale}
    reach: Parts = {"range": ((1,), "float32")}
    mixed: Parts = {"bits": (flat, 17), "levels1": (flat, 2), **reach}
    group = min(n * n, 1 << 24)
    wide: Parts = {
        "bits": ((n * n // group,), 17),
        "levels1": (flat, 2),
        "range": ((1,), "float32"),
    }
    table: Parts = {"indices": ((1, 4), 4), "centroids": ((4, n * n // 4), 256), **scale}
    book: Parts = {
        "indices": (shape, 2),
        "points": ((2,), "float16"),
        "scale": (flat, "float16"),
        "offset": (flat, "float16"),
    }
    rank = min(n, 256)
    factors: Parts = {"left": ((n, rank), 4), "right": ((rank, n), 4), "zero": ((2,), 1 << 24)}
    level: Parts = {"levels": (shape, 16), "scale": ((1,), "float32")}
    each: Parts = {"levels": (shape, 16), "zero": (flat, 16), "scale": (flat, "float16")}
    buckets = Codebook(2, bucket=1, shift=True, scale_dtype=torch.float16)
    single_group = Affine(4, group=1, grid="asymmetric", scale_dtype=torch.float16)
    return {
        "trellis float8": lambda: vast(Trellis(), short, shape, trellis),
        "trellis float32": lambda: vast(Trellis(), single, shape, trellis),
        "trellis vector": lambda: vast(
            Trellis(axis=0), short, flat,
            {"levels": (flat, 16), **zero, "scale": (flat, "float32")},
        ),
        "trellis wide codes": lambda: vast(
            Trellis(), short, shape, {"levels": (shape, 1 << 23), **zero, **scale}
        ),
        "affine float8": lambda: vast(Affine(4), short, shape, level),
        "affine single": lambda: vast(single_group, single, shape, each),
        "affine endless": lambda: vast(
            Affine(None), single, shape, {"levels": (shape, 300), "zero": ((1,), 1 << 24), **scale}
        ),
        "codebook": lambda: vast(buckets, single, shape, book),
        "product int8": lambda: vast(Product(n * n // 4, 4, torch.int8), short, (1, n * n), table),
        "product small": lambda: vast(
            Product(8), single, shape,
            {"indices": ((n, n // 8), 256), "centroids": ((256, 8), "float16")},
        ),
        "mixed single": lambda: vast(Mixed(1, "symmetric"), short, flat, mixed, 1),
        "mixed one group": lambda: vast(Mixed(group, "symmetric"), single, flat, wide, 1),
        "raw bool": lambda: vast(Raw(), torch.bool, shape, {"values": (shape, "bool")}),
        "raw complex": lambda: vast(
            Raw(), torch.complex128, (n, n // 8), {"values": ((n, n // 8), "complex128")}
        ),
        "raw half": lambda: vast(
            Raw(torch.float16), single, shape, {"values": (shape, "float16")}
        ),
        "factors": lambda: vast(Factors(), short, shape, {**factors, **scale}),
        "factors vector": lambda: vast(
            Factors(), short, flat,
            {"left": ((1, 1), 4), "right": ((1, n * n), 4), "zero": ((2,), 1 << 24), **scale},
        ),
    }  # fmt: skip


def real_cases(n: int) -> dict[str, Callable[[], bytes]]:
    """Files of codes that are not constant; a tensor is ``(n, n)``."""
    noise = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise)

    rows = torch.linspace(0.1, 3, n)[:, None]
    return {
        "real lanes": lambda: archive_of(GPTQ(0.2).encode(weight(n, n))),
        "real contexts": lambda: archive_of(GPTQ(0.2).encode(weight(n, n) * rows)),
        "real low bits": lambda: archive_of(GPTQ(0.001).encode(weight(n, n))),
        "real outliers": lambda: archive_of(GPTQ(0.1).encode(weight(n, n) ** 5)),
        "real trellis": lambda: archive_of(Viterbi(0.3).encode(weight(n // 2, n))),
        "real bits": lambda: archive_of(Affine(5).encode(torch.rand(n, n))),
        "real raw": lambda: archive_of(Raw().encode(weight(n, n))),
        "real small": lambda: archive_of(code(GPTQ(0.2).encode(weight(150, 200)))),
    }


class Measured(NamedTuple):
    """Bytes: of the file, by which the process grew at its peak, and that were counted."""

    file: int
    grew: int
    counted: int


def cases(n: int = SIDE, real: int = REAL) -> dict[str, Callable[[], bytes]]:
    """All of them, by name."""
    return vast_cases(n) | real_cases(real)


def measure(name: str, n: int, real: int) -> Measured:
    """Decode one case, after a small one of its kind."""
    Archive.from_bytes(cases(64, 128)[name]())["t"]
    data = cases(n, real)[name]()
    opened = Archive.from_bytes(data)
    peak = Peak()
    opened["t"]
    return Measured(len(data), peak.grew(), working_nbytes(opened.entries["t"]))


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--real", type=int, default=REAL)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    restart_for_exact_peaks()
    torch.set_num_threads(1)
    rows, worst = {}, 0
    for name in cases(64, 64):
        found = measure(name, arguments.side, arguments.real)
        rows[name] = found._asdict()
        worst = max(worst, found.grew - found.counted)
        beside = (found.grew - found.counted) / 1e6
        print(
            f"{name:20} file {found.file:>9,} B, grew {found.grew / 1e6:7.1f} MB, counted "
            f"{found.counted / 1e6:7.1f} MB, beside {beside:7.1f} MB"
        )
    if arguments.json:
        result = describe() | {"side": arguments.side, "real": arguments.real, "cases": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if worst > BESIDE else 0


if __name__ == "__main__":
    sys.exit(main())
