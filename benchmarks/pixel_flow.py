"""Videos and images as networks: decibels at equal bytes of files, each decoded by a fresh process.

``python -m benchmarks.pixel_flow`` encodes the first frames of Big Buck Bunny, reduced, with a
network for each frame or with flows and residuals in groups of six, and four Kodak images as they
are, as COIN and with positional features; rounded after training, or trained as integers to the
budget. A series is 24 frames in several files, each whole or as differences to the one before.
JPEG, WebP and AVIF (Pillow) stand beside them. Rows that are in the results are not made again;
``--only`` names others by a pattern, such as ``"bunny, flow*, 8000"``.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from benchmarks.environment import describe
from benchmarks.pixel_flow_plot import draw, tables
from benchmarks.tasks import data_path
from dither.recipes import pixel_flow
from dither.recipes.pixel_flow import Codec

RESULTS = Path(__file__).parent / "results"
VIDEO = (96, 54)
FRAMES = 12
LONG = 24
KODAK = ("04", "07", "15", "23")
BITS = 6.0
"""Of a weight, for which networks are chosen."""
KINDS = {
    "COIN": Codec(features=0, group=1),
    "features": Codec(group=1),
    "fresh": Codec(group=1),
    "flow": Codec(group=6),
    "one file": Codec(group=6),
}
WAYS = ("rounded", "trained")
PARTS = {"groups": (6, 4), "frames": (1, 12)}
"""Of a series: frames of a file, and how many files."""
SIZES = {"groups": (8000, 16000), "frames": (16000, 24000)}
"""Of a series. Smaller files of one frame are impossible: names and shapes fill them."""
FIRST = 2
"""Where files hold differences, the first gets so many times the bytes of each other."""


@dataclass(frozen=True)
class Job:
    """A row that can be made.

    Attributes:
        source: of what.
        way: how.
        size: of all files together, in bytes.
        make: its files for a number of steps and a seed.
        width: of the networks.
    """

    source: str
    way: str
    size: int
    make: Callable[[int, int], list[bytes]]
    width: int

    def row(self, video: Tensor, steps: int, seed: int) -> dict[str, Any]:
        """The files, and what a fresh process makes of them."""
        start = time.process_time()
        files = self.make(steps, seed)
        seconds = round(time.process_time() - start)
        nbytes = [len(content) for content in files]
        found = row(video, sum(nbytes), fresh(files))
        more = {"files": nbytes} if len(files) > 1 else {}
        return {"width": self.width, "seconds": seconds} | found | more


def frames(count: int) -> Tensor:
    """The first of Big Buck Bunny, reduced by means of boxes: uint8, ``(count, 3, 54, 96)``."""
    found = []
    for number in range(count):
        with Image.open(data_path(f"bunny/{number:03d}.png")) as image:
            small = image.convert("RGB").resize(VIDEO, Image.Resampling.BOX)
            found.append(torch.from_numpy(np.array(small)).permute(2, 0, 1))
    return torch.stack(found)


def kodak(number: str) -> Tensor:
    """A whole image: uint8, ``(1, 3, height, width)``."""
    with Image.open(data_path(f"kodak/{number}.png")) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]


def sources() -> dict[str, Callable[[], Tensor]]:
    """What is encoded, ``(frames, 3, height, width)``."""
    found: dict[str, Callable[[], Tensor]] = {"bunny": partial(frames, FRAMES)}
    found["bunny, series"] = partial(frames, LONG)
    return found | {f"kodim{number}": partial(kodak, number) for number in KODAK}


def jobs() -> Iterator[Job]:
    """All rows of ours, each for a seed and so many steps."""
    for size, kind, way in product((4000, 8000), ("fresh", "flow"), WAYS):
        yield whole("bunny", kind, way, size)
    for number in KODAK:
        for size in (4000, 8000, 16000):
            yield whole(f"kodim{number}", "features", "trained", size)
        yield whole(f"kodim{number}", "features", "rounded", 8000)
        yield whole(f"kodim{number}", "COIN", "trained", 8000)
    yield whole("bunny, series", "one file", "trained", 8000)
    for name in PARTS:
        for size in SIZES[name]:
            yield from series(name, size)


def whole(source: str, kind: str, way: str, size: int) -> Job:
    """One file."""
    fitted = KINDS[kind].fitted(size, len(sources()[source]()), BITS)

    def make(steps: int, seed: int) -> list[bytes]:
        video, trained = sources()[source](), way == "trained"
        return [pixel_flow.encode(video, size, fitted, trained=trained, steps=steps, seed=seed)]

    return Job(source, f"{kind}, {way}", size, make, fitted.width)


def series(name: str, size: int) -> Iterator[Job]:
    """Files of some frames each: whole, whole with twice the steps, and as differences.

    Steps are of all files together; those of a file that are differences begin at the weights of
    the one before, as if they had been trained for longer, hence the second.
    """
    part, count = PARTS[name]
    each = size // count
    apart = Codec(group=part).fitted(each, part, BITS)
    rest = size // (count - 1 + FIRST)
    first = size - rest * (count - 1)
    resting = Codec(group=part).fitted(first, part, BITS)

    def files(way: tuple[Codec, int, int, bool], steps: int, seed: int) -> list[bytes]:
        codec, begin, factor, rests = way
        found: list[bytes] = []
        for some in frames(part * count).split(part):
            bound = rest if found and rests else begin
            before = found if rests else ()
            found.append(
                pixel_flow.encode(
                    some, bound, codec, before=before, steps=factor * steps // count, seed=seed
                )
            )
        return found

    source = "bunny, series" if part * count == LONG else "bunny"
    ways = {
        "whole": (apart, each, 1, False),
        "whole, twice the steps": (apart, each, 2, False),
        "differences": (resting, first, 1, True),
    }
    for way, how in ways.items():
        yield Job(source, f"{name}, {way}", size, partial(files, how), how[0].width)


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Decibels of the mean squared error over all frames."""
    error = ((found.double() - wanted.double()) / 255).square().mean()
    return round(float(-10 * torch.log10(error)), 2)


def fresh(files: Sequence[bytes]) -> Tensor:
    """What another process decodes from files alone, each given those before it."""
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{number}.dither" for number in range(len(files))]
        for name, content in zip(names, files, strict=True):
            (Path(folder) / name).write_bytes(content)
        program = (
            "import sys, numpy\nfrom dither.recipes import pixel_flow\nnames = sys.argv[1:]\n"
            "found = [pixel_flow.decode(name, names[:n]).numpy() for n, name in enumerate(names)]\n"
            "numpy.save('out.npy', numpy.concatenate(found))"
        )
        subprocess.run([sys.executable, "-c", program, *names], cwd=folder, check=True)
        return torch.from_numpy(np.load(Path(folder) / "out.npy"))


def row(video: Tensor, nbytes: int, found: Tensor) -> dict[str, Any]:
    """Bytes, bits for each pixel, decibels."""
    pixels = len(video) * video.shape[2] * video.shape[3]
    return {"nbytes": nbytes, "bpp": round(8 * nbytes / pixels, 4), "psnr": psnr(found, video)}


def codecs(video: Tensor) -> Iterator[dict[str, Any]]:
    """Usual codecs, at several qualities: each frame a file of its own, or AVIF of all frames."""
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in video]
    ways: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
        "JPEG": ((1, 5, 10, 20, 40, 60), {"optimize": True}),
        "WebP": ((0, 10, 25, 50, 75), {"method": 6}),
        "AVIF": ((5, 15, 30, 45, 60), {"speed": 4}),
    }
    for kind, (qualities, how) in ways.items():
        for quality in qualities:
            files = [_stored(image, kind, quality=quality, **how) for image in images]
            yield _row(kind, quality, files, video)
    for quality in (5, 15, 30, 45, 60) if len(images) > 1 else ():
        more = {"save_all": True, "append_images": images[1:], "speed": 4}
        files = [_stored(images[0], "AVIF", quality=quality, **more)]
        yield _row("AVIF, all frames", quality, files, video)


def _stored(image: Image.Image, kind: str, **how: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **how)
    return stream.getvalue()


def _row(way: str, quality: int, files: list[bytes], video: Tensor) -> dict[str, Any]:
    found = []
    for content in files:
        with Image.open(io.BytesIO(content)) as image:
            arrays = [np.array(one.convert("RGB")) for one in ImageSequence.Iterator(image)]
        found += [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    nbytes = sum(map(len, files))
    return {"way": way, "quality": quality} | row(video, nbytes, torch.stack(found))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=RESULTS / "pixel_flow.json")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--only", nargs="*", default=["*"], help="source, way, size: patterns")
    parser.add_argument("--plot", action="store_true", help="no rows: the plot, and tables")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path: Path = arguments.json
    result = json.loads(path.read_text("utf-8")) if path.exists() else {"runs": [], "rows": []}
    if arguments.plot:
        print(tables(result["rows"]))
        draw(result["rows"], RESULTS / "plots" / "pixel_flow")
        return
    result["runs"].append(describe())

    def keep(found: dict[str, Any]) -> None:
        result["rows"].append(found | {"run": len(result["runs"]) - 1})
        print(found, flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    def wanted(about: dict[str, Any], name: str) -> bool:
        known = any(about.items() <= one.items() for one in result["rows"])
        return not known and any(fnmatchcase(name, some) for some in arguments.only)

    for name, video in sources().items():
        if wanted({"source": name, "way": "JPEG"}, f"{name}, codecs"):
            for found in codecs(video()):
                keep({"source": name} | found)
    for seed, job in product(arguments.seeds, jobs()):
        about = {"source": job.source, "way": job.way, "size": job.size}
        about |= {"steps": arguments.steps, "seed": seed}
        if wanted(about, f"{job.source}, {job.way}, {job.size}"):
            keep(about | job.row(sources()[job.source](), arguments.steps, seed))


if __name__ == "__main__":
    main()
