"""Tensors in files without names: the same values as in memory, and nothing is left behind."""

from __future__ import annotations

import copy
import errno
import os
import platform
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dither import disk as module
from dither.calibrate import collect_together
from dither.data import Data
from dither.disk import Disk, copied, disk_of, home_of, on_disk
from dither.model import duplicate
from dither.team import ALONE
from dither.testing import same_bits


def layers(count: int = 6, width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(24).reshape(4, 6),
        torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).T,
        torch.arange(60.0).reshape(3, 4, 5)[1:, ::2, 1:4],
        torch.ones(3, 1).expand(3, 9),
        torch.tensor(3.5, dtype=torch.bfloat16),
        torch.empty(0, 4),
        torch.tensor([True, False]),
        torch.complex(torch.ones(2), torch.zeros(2)),
    ],
    ids=lambda value: f"{value.dtype} {tuple(value.shape)} {value.stride()}",
)
def test_a_copy_has_the_same_values_and_strides(value: Tensor, tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    made = disk.copy(value)
    disk.release()
    assert same_bits(made, value)
    assert made.stride() == value.stride()
    assert disk_of(made) is disk
    assert disk_of(copied(made)) is disk
    assert not made.numel() or copied(made).data_ptr() != made.data_ptr()
    assert disk_of(value) is disk_of(copied(value)) is None


def test_memory_of_what_is_gone_is_used_again(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    for _ in range(20):
        made = [disk.copy(torch.full((1 << 17,), n)) for n in range(4)]
        assert [int(value[-1]) for value in made] == [0, 1, 2, 3]
        made_nbytes = made[0].nbytes
        del made
    assert disk.nbytes <= 16 << 20 < 80 * made_nbytes


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of this library of C")
def test_what_is_free_between_tensors_is_given_back(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) << 12

    held = [torch.ones(25_000) for _ in range(1000)]  # too small to be memory of their own
    del held[:-1]
    held += [torch.ones(10) for _ in range(10)]
    before = resident()
    Disk(tmp_path).release()
    assert resident() < before - (60 << 20)


def test_files_have_no_names_and_go_with_the_last_tensor(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0
    view = disk.copy(torch.arange(10.0))[2:5]
    assert not list(tmp_path.iterdir())
    del disk
    assert view.tolist() == [2, 3, 4]
    del view
    if before:
        assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot tell before")
def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(number: int) -> None:
        def refuse(*_: int) -> None:
            raise OSError(number, "no room")

        monkeypatch.setattr(os, "posix_fallocate", refuse)

    refusing(errno.ENOSPC)
    with pytest.raises(OSError, match="no room"):
        Disk(tmp_path).empty((4,), torch.float32)
    refusing(errno.EOPNOTSUPP)  # of file systems that do not know how
    assert Disk(tmp_path).zeros(4, dtype=torch.float32).tolist() == [0, 0, 0, 0]


def test_a_model_is_built_there_and_nowhere_else(tmp_path: Path) -> None:
    with on_disk(tmp_path, room=10_000) as disk:
        made = layers()
        tied = nn.ModuleList([nn.Embedding(9, 8), nn.Linear(8, 9)])
        tied[1].weight = tied[0].weight
    plain, values = layers(), torch.randn(3, 32)
    assert all(disk_of(p) is disk for p in [*made.parameters(), *tied.parameters()])
    assert tied[1].weight is tied[0].weight
    assert home_of(plain) is None
    assert same_bits(made(values), plain(values))
    disk.peak = 0
    made(values)
    assert 4 * 32 * 33 <= disk.peak <= 10_000 < 6 * 4 * 32 * 33
    for other in (copy.deepcopy(made), duplicate(made)):
        assert same_bits(other(values), plain(values))
    other = duplicate(made)
    assert all(disk_of(p) is disk for p in other.parameters())
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert same_bits(made(values), plain(values))


def test_gradients_and_moments_are_those_of_memory(tmp_path: Path) -> None:
    batches = [torch.randn(5, 32, generator=torch.Generator().manual_seed(n)) for n in range(3)]

    def loss(output: Tensor, _: object, __: int) -> Tensor:
        return output.relu().square().sum()

    with on_disk(tmp_path, room=10_000):
        made = layers()
    data = Data(batches)
    found = collect_together(made, data, ALONE, loss)
    wanted = collect_together(layers(), data, ALONE, loss)
    assert list(found) == list(wanted)
    for name, stats in wanted.items():
        one, other = stats.importance, found[name].importance
        assert one is not None
        assert other is not None
        assert same_bits(one, other)
        if stats.gram is not None:
            gram = found[name].gram
            assert gram is not None
            assert same_bits(stats.gram, gram)
            assert disk_of(gram) is not None
    assert all(p.grad is None and p.requires_grad for p in made.parameters())
    made[0].weight.grad = kept = torch.ones(32, 32)
    made[1].weight.requires_grad_(False)
    collect_together(made, data, ALONE, loss)
    assert made[0].weight.grad is kept
    assert not made[1].weight.requires_grad


def test_what_the_backward_pass_needs_leaves_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[int] = []
    plain = Disk.copy

    def noted(self: Disk, value: Tensor) -> Tensor:
        copies.append(value.nbytes)
        return plain(self, value)

    with on_disk(tmp_path, room=1 << 18):
        made = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(8)))
    monkeypatch.setattr(Disk, "copy", noted)
    data = Data([torch.randn(512, 64)])
    collect_together(made, data, ALONE, lambda output, _, __: output.square().sum())
    big = [n for n in copies if n == 512 * 64 * 4]
    assert len(big) >= 10  # of 16 and some that were made, two fit


def test_memory_is_what_the_system_says() -> None:
    assert 1 << 26 < module.memory_nbytes() < 1 << 62
