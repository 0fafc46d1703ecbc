"""Videos and images as networks: decibels at equal bytes of files, each decoded by a fresh process.

``python -m benchmarks.pixel_flow`` encodes the first frames of Big Buck Bunny, reduced, with a
network for each frame or with flows and residuals in groups of six, and one Kodak image, reduced,
as COIN and with positional features; rounded after training, or trained as integers to the budget.
JPEG (Pillow) stands beside them. Rows that are in the results are not made again.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.environment import describe
from benchmarks.tasks import data_path
from dither.recipes import pixel_flow
from dither.recipes.pixel_flow import Codec

RESULTS = Path(__file__).parent / "results"
VIDEO = (96, 54)
IMAGE = (96, 64)
FRAMES = 12
VIDEO_SIZES = (4000, 8000)
IMAGE_SIZES = (1000, 2000)
COIN = Codec(features=0, group=1)


def picture(name: str, size: tuple[int, int]) -> Tensor:
    """uint8 ``(3, height, width)``, reduced by means of boxes."""
    with Image.open(data_path(name)) as image:
        small = image.convert("RGB").resize(size, Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def sources() -> dict[str, Tensor]:
    """What is encoded, ``(frames, 3, height, width)``."""
    bunny = [picture(f"bunny/{number:03d}.png", VIDEO) for number in range(FRAMES)]
    kodak = picture("kodak/23.png", IMAGE)
    return {"bunny": torch.stack(bunny), "kodim23": kodak[None]}


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Decibels of the mean squared error over all frames."""
    error = ((found.double() - wanted.double()) / 255).square().mean()
    return round(float(-10 * torch.log10(error)), 2)


def fresh(content: bytes) -> Tensor:
    """What another process decodes from the file alone."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "file.dither").write_bytes(content)
        program = (
            "import numpy\nfrom dither.recipes import pixel_flow\n"
            "numpy.save('out.npy', pixel_flow.decode('file.dither').numpy())"
        )
        subprocess.run([sys.executable, "-c", program], cwd=folder, check=True)
        return torch.from_numpy(np.load(Path(folder) / "out.npy"))


def ways(name: str) -> dict[str, tuple[Codec, float, bool]]:
    """Networks, bits of a weight that they are chosen for, and whether integers are trained."""
    if name == "bunny":
        fresh_nets, flow = Codec(group=1), Codec(group=6)
        return {
            "fresh, rounded": (fresh_nets, 6, False),
            "fresh, trained": (fresh_nets, 6, True),
            "flow, rounded": (flow, 6, False),
            "flow, trained": (flow, 6, True),
        }
    return {
        "COIN, rounded": (COIN, 6, False),
        "COIN, trained": (COIN, 6, True),
        "features, rounded": (replace(COIN, features=4), 6, False),
        "features, trained": (replace(COIN, features=4), 6, True),
    }


def jpeg(video: Tensor) -> Iterator[dict[str, Any]]:
    """Every frame as a JPEG of its own, at several qualities, without what files share."""
    for quality in (1, 5, 10, 20, 40):
        nbytes, frames = 0, []
        for frame in video:
            stream = io.BytesIO()
            image = Image.fromarray(frame.permute(1, 2, 0).numpy())
            image.save(stream, "JPEG", quality=quality, optimize=True)
            nbytes += stream.tell()
            frames.append(torch.from_numpy(np.array(Image.open(stream))).permute(2, 0, 1))
        yield {"way": "JPEG", "quality": quality} | row(video, nbytes, torch.stack(frames))


def row(video: Tensor, nbytes: int, found: Tensor) -> dict[str, Any]:
    """Bytes, bits for each pixel, decibels."""
    pixels = len(video) * video.shape[2] * video.shape[3]
    return {"nbytes": nbytes, "bpp": round(8 * nbytes / pixels, 4), "psnr": psnr(found, video)}


def encoded(video: Tensor, way: tuple[Codec, float, bool], size: int, **how: int) -> dict[str, Any]:
    """One file, and what a fresh process makes of it."""
    shape, bits, trained = way
    codec = shape.fitted(size, len(video), bits)
    start = time.process_time()
    content = pixel_flow.encode(video, size, codec, trained=trained, **how)
    seconds = round(time.process_time() - start)
    found = fresh(content)
    assert torch.equal(found, pixel_flow.decode(content))
    return {"width": codec.width, "seconds": seconds} | row(video, len(content), found)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=RESULTS / "pixel_flow.json")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--only", nargs="*", default=["bunny", "kodim23"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path: Path = arguments.json
    result = json.loads(path.read_text("utf-8")) if path.exists() else {"rows": []}
    result |= {"environment": describe(), "video": [FRAMES, *VIDEO], "image": IMAGE}

    def keep(found: dict[str, Any]) -> None:
        result["rows"].append(found)
        print(found, flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for name, video in sources().items():
        if name not in arguments.only:
            continue
        sizes = VIDEO_SIZES if name == "bunny" else IMAGE_SIZES
        jobs = [(s, size, way) for s in arguments.seeds for size in sizes for way in ways(name)]
        for seed, size, way in jobs:
            about = {
                "source": name,
                "way": way,
                "size": size,
                "steps": arguments.steps,
                "seed": seed,
            }
            if not any(about.items() <= one.items() for one in result["rows"]):
                found = encoded(video, ways(name)[way], size, steps=arguments.steps, seed=seed)
                keep(about | found)
        if not any(one["source"] == name and one["way"] == "JPEG" for one in result["rows"]):
            for found in jpeg(video):
                keep({"source": name} | found)


if __name__ == "__main__":
    main()
