"""Videos as networks: whatever their shape, the file fits its budget and decodes by itself."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dither
from dither.archive import Archive, pack
from dither.core import ArchiveError, BudgetError, SpecError
from dither.recipes import pixel_flow
from dither.recipes.pixel_flow import Codec, Pictures

# A dozen steps of training leave much to be trimmed.
pytestmark = pytest.mark.filterwarnings("ignore:finish.. made steps:UserWarning")

TINY = Codec(width=8, layers=2, motion=4, group=2, features=2)


def moving(frames: int, height: int = 16, width: int = 16) -> Tensor:
    """A soft blob that moves over a gradient."""
    rows = torch.linspace(-1, 1, height)[:, None]
    columns = torch.linspace(-1, 1, width)
    found = []
    for number in range(frames):
        blob = torch.exp(-4 * ((rows - 0.2 * number) ** 2 + (columns - 0.1 * number) ** 2))
        found.append(torch.stack([blob, (rows + columns + 2) / 4, 1 - blob]))
    return (255 * torch.stack(found)).round().to(torch.uint8)


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * torch.log10(((a.float() - b.float()) / 255).square().mean()))


def series(video: Tensor, part: int, *sizes: int, **how: Any) -> list[bytes]:
    """A first file, and files of differences of another size."""
    files: list[bytes] = []
    for frames in video.split(part):
        size = sizes[min(len(files), len(sizes) - 1)]
        files.append(pixel_flow.encode(frames, size, TINY, before=files, **how))
    return files


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    ("frames", "height", "width", "codec"),
    [
        (3, 16, 16, TINY),  # a group that is not full
        (1, 12, 20, replace(TINY, features=0)),  # COIN
        (2, 5, 7, replace(TINY, group=1)),
    ],
)
def test_a_file_fits_its_budget_and_has_the_videos_shape(
    frames: int, height: int, width: int, codec: Codec, trained: bool
) -> None:
    video = moving(frames, height, width)
    content = pixel_flow.encode(video, 1700, codec, steps=12, trained=trained)
    assert len(content) <= 1700
    found = pixel_flow.decode(content)
    assert (found.shape, found.dtype) == (video.shape, torch.uint8)
    with Archive.from_bytes(content) as archive:
        assert archive.nbytes == len(content)


def test_a_fresh_process_decodes_the_same_from_the_files_alone(tmp_path: Path) -> None:
    files = series(moving(3), 2, 1700, 900, steps=12)
    for number, content in enumerate(files):
        (tmp_path / f"{number}.dither").write_bytes(content)
    program = (
        "import numpy\nfrom dither.recipes import pixel_flow\n"
        "numpy.save('0.npy', pixel_flow.decode('0.dither').numpy())\n"
        "numpy.save('1.npy', pixel_flow.decode('1.dither', ['0.dither']).numpy())"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    import numpy as np

    for number, content in enumerate(files):
        found = torch.from_numpy(np.load(tmp_path / f"{number}.npy"))
        assert torch.equal(found, pixel_flow.decode(content, files[:number]))


def test_training_as_integers_keeps_more_than_rounding_afterwards() -> None:
    video, codec = moving(2), replace(TINY, width=16)  # about four bits for each weight
    found = [
        psnr(pixel_flow.decode(pixel_flow.encode(video, 900, codec, steps=300, trained=t)), video)
        for t in (False, True)
    ]
    assert found[1] > found[0] + 2


def test_a_later_frame_needs_the_frames_before_it_alone() -> None:
    torch.manual_seed(0)
    model = Pictures(replace(TINY, group=3), 6)
    points = torch.rand(9, 2) * 2 - 1
    before = [model(points, number).detach() for number in range(6)]
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.startswith(("flows", "residuals")) and name.endswith("bias"):
                value[1] += 1  # of frame 2, the last of the first group
    changed = [not torch.equal(model(points, n), before[n]) for n in range(6)]
    assert changed == [False, False, True, False, False, False]


def test_without_flow_and_residual_a_frame_is_the_one_before_it() -> None:
    model = Pictures(TINY, 2)
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name in ("flows.layers.1.", "residuals.layers.1."):
            values[f"{name}weight"].zero_()
            values[f"{name}bias"].zero_()
    points = torch.rand(5, 2)
    assert torch.equal(model(points, 1), model(points, 0))
    with torch.no_grad():
        values["flows.layers.1.bias"][0] = torch.tensor([1.0, -2.0])
    moved = points + 0.1 * torch.tensor([1.0, -2.0])
    assert torch.allclose(model(points, 1), model(moved, 0), atol=1e-6)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("frames", "part"), [(3, 2), (2, 1)])  # the last part is short, or is not
def test_files_of_differences_fit_their_budgets(frames: int, part: int, trained: bool) -> None:
    video = moving(frames)
    files = series(video, part, 1700, 900, steps=12, trained=trained)
    assert len(files[1]) <= 900
    for number, content in enumerate(files):
        with Archive.from_bytes(content) as archive:
            assert (archive.base is not None) == (number > 0)
    found = [pixel_flow.decode(file, files[:number]) for number, file in enumerate(files)]
    assert torch.cat(found).shape == video.shape


def test_differences_keep_more_than_whole_networks_in_as_many_bytes() -> None:
    video = moving(2)
    files = series(video, 1, 1700, 550, steps=120)
    whole = pixel_flow.encode(video[1:], 550, TINY, steps=240)
    found = [psnr(pixel_flow.decode(*one), video[1:]) for one in ((whole,), (files[1], files[:1]))]
    assert found[1] > found[0] + 1


def test_files_of_differences_say_what_they_lack() -> None:
    files = series(moving(3), 1, 1700, 800, steps=4, trained=False)
    with pytest.raises(ArchiveError, match="give the files before it, in order"):
        pixel_flow.decode(files[2])
    with pytest.raises(ArchiveError, match="differences to"):
        pixel_flow.decode(files[2], files[:1])
    with pytest.raises(ArchiveError, match="give the files before it, in order"):
        pixel_flow.encode(moving(1), 800, before=files[1:])
    whole = pixel_flow.encode(moving(1), 1700, TINY, steps=4, trained=False)
    assert torch.equal(pixel_flow.decode(whole, files), pixel_flow.decode(whole))


def test_differences_are_of_what_is_nearer_to_the_base_than_to_zero() -> None:
    torch.manual_seed(0)
    model, points = Pictures(TINY, 2), torch.rand(5, 2)
    base = {name: value.detach().clone() for name, value in model.named_parameters()}
    far, other = "keys.layers.1.weight", "keys.layers.0.weight"
    base[far], base[other] = -base[far], torch.zeros(1, 3)
    near = "keys.layers.2.bias"
    base[near] = 0.9 * base[near]
    before = [model(points, frame).detach() for frame in range(2)]
    assert model.rest_on(base) == set(base) - {far, other}
    found = dict(model.named_parameters())
    assert torch.allclose(found[near], base[near] / 9, atol=1e-6)
    assert all(torch.allclose(model(points, n), before[n], atol=1e-5) for n in range(2))


@pytest.mark.parametrize("size", [1500, 4000, 20_000])
@pytest.mark.parametrize("group", [1, 4])
def test_networks_are_the_widest_that_fit(size: int, group: int) -> None:
    codec = Codec(group=group).fitted(size, 8)
    wider = replace(codec, width=codec.width + 1, motion=(codec.width + 1) // 2)
    counts = [
        sum(value.numel() for value in Pictures(one, 8, meta=True).parameters())
        for one in (codec, wider)
    ]
    assert counts[0] * 6 / 8 < size < counts[1] * 6 / 8 + 30 * 20
    assert counts[0] < counts[1]


@cache
def small() -> bytes:
    return pixel_flow.encode(moving(2), 1700, TINY, steps=4, trained=False)


def changed(content: bytes, **found: Any) -> bytes:
    with Archive.from_bytes(content) as archive:
        tensors = {name: archive.encoded(name) for name in archive.entries}
        settings = {**archive.metadata["pixel_flow"], **found}
        return pack(tensors, metadata={"pixel_flow": settings}).to_bytes()


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": [1, 2]},
        {"shape": [0, 16, 16]},
        {"shape": [2, 1 << 20, 1 << 20]},
        {"shape": "large"},
        {"codec": {"width": 8, "colour": 1}},
        {"codec": {"width": 0}},
        {"codec": None},
    ],
)
def test_files_that_lie_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArchiveError, match="video"):
        pixel_flow.decode(changed(small(), **wrong))


def test_other_archives_hold_no_video() -> None:
    content = dither.compress({"weight": torch.randn(8, 8)}, 1000).to_bytes()
    with pytest.raises(ArchiveError, match="holds no video"):
        pixel_flow.decode(content)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(SpecError, match="give uint8"):
        pixel_flow.encode(torch.rand(2, 3, 8, 8), 2000)
    with pytest.raises(SpecError, match="give uint8"):
        pixel_flow.encode(moving(1)[:, :2], 2000)
    with pytest.raises(BudgetError, match="400 bytes are too few for 2 frames"):
        pixel_flow.encode(moving(2), 400)
    with pytest.raises(SpecError, match="sizes are 1 or more"):
        Codec(width=0)
