"""`dither inspect --tree`: bytes by modules, whatever names there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dither
from dither.archive import pack
from dither.cli import app
from dither.formats import Raw


def tree(path: Path, *names: str) -> list[str]:
    held = {name: torch.ones(i + 1) for i, name in enumerate(names)}
    pack({name: Raw().encode(value) for name, value in held.items()}).save(path / "t.dither")
    result = CliRunner().invoke(app, ["inspect", "--tree", str(path / "t.dither")])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()[1:]


def test_modules_have_the_bytes_of_what_is_in_them(tmp_path: Path) -> None:
    layers = [f"model.layers.{i}.{part}.weight" for i in range(2) for part in ("a", "b")]
    *lines, _ = tree(
        tmp_path, "model.embed.weight", *layers, "model.layers.1.a.bias", "head.weight"
    )
    shown = [re.match(r"( *)(\S+)", line) for line in lines]
    assert [(len(m[1]) // 2, m[2]) for m in shown if m] == [
        (0, "model"),
        (1, "embed.weight"),
        (1, "layers"),
        (2, "0"),
        (3, "a.weight"),
        (3, "b.weight"),
        (2, "1"),
        (3, "a"),
        (4, "weight"),
        (4, "bias"),
        (3, "b.weight"),
        (0, "head.weight"),
        (0, "names,"),
    ]
    found = [re.findall(r" ([\d,]+) +[\d.]* *[\d.]+ %", line)[0] for line in lines]
    nbytes = [int(text.replace(",", "")) for text in found]
    with dither.open(tmp_path / "t.dither") as archive:
        assert nbytes[0] + nbytes[-2] + nbytes[-1] == archive.nbytes
        assert nbytes[0] == sum(e.nbytes for n, e in archive.entries.items() if "model" in n)
    assert nbytes[2] == nbytes[3] + nbytes[6]
    assert nbytes[7] == nbytes[8] + nbytes[9]


def test_chains_of_modules_share_a_line(tmp_path: Path) -> None:
    *lines, _ = tree(tmp_path, "a.b.c.weight", "a.b.c.bias")
    assert [line.split()[0] for line in lines[:3]] == ["a.b.c", "weight", "bias"]


@pytest.mark.parametrize(
    "names",
    [
        ("a", "a.b"),
        ("", ".", "..", "a", "a.", "a.."),
        ("a." * 3000 + "x", "a." * 3000 + "y"),
        ("\x1b[31m.x", "\x1b[31m.y"),
        (),
    ],
)
def test_odd_names_are_lines_like_others(names: tuple[str, ...], tmp_path: Path) -> None:
    lines = tree(tmp_path, *names)
    assert len(lines) >= len(names) + 2
    assert "\x1b" not in "".join(lines)
