"""Two archives on one page: both sizes, every tensor of either, errors of both."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import dither
from dither.archive import pack
from dither.cli import app
from dither.formats import Raw
from dither.report import contents, pair_page, save_pair
from tests.report.test_page import Reader, state


def test_both_files_are_on_one_page(tmp_path: Path) -> None:
    small, large = dither.compress(state(), "8kB"), dither.compress(state(), "12kB")
    found = save_pair(tmp_path / "p.html", (small, large), ("small", "large"), ("all", state()))
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    read = Reader(text)
    for archive in (small, large):
        assert f"{archive.nbytes:,}" in read.text
        for name, entry in archive.entries.items():
            assert name in read.text
            assert f"{entry.nbytes:,}" in read.text
    assert f"{100 * (large.nbytes / small.nbytes - 1):+.1f} %" in read.text
    assert text.count('class="map"') == 2
    one, other = found
    assert one.sqnr is not None
    assert other.sqnr is not None
    assert one.sqnr < other.sqnr
    assert f"{one.sqnr:.1f} dB" in read.text
    assert f"{other.sqnr:.1f} dB" in read.text
    assert not read.tags & {"script", "link", "img", "iframe", "object", "form", "base"}


def test_what_only_one_has_and_odd_names_are_shown() -> None:
    left = pack({"<b>a</b>": Raw().encode(torch.ones(9)), "both": Raw().encode(torch.ones(3))})
    right = pack({"both": Raw().encode(torch.ones(3)), "new": Raw().encode(torch.ones(0))})
    read = Reader(pair_page((contents(left, '"<i>x'), contents(right, "y"))))
    assert read.text.count("not there") == 2
    assert "<i>x" in read.text
    assert "<b>a</b>" in read.text
    empty = pack({})
    assert "0" in Reader(pair_page((contents(empty, "a"), contents(empty, "b")))).text


def test_the_command(tmp_path: Path) -> None:
    save_file({"w": torch.randn(64, 64)}, tmp_path / "m.safetensors")
    for size in ("2kB", "3kB"):
        archive = dither.compress(tmp_path / "m.safetensors", size)
        archive.save(tmp_path / f"{size}.dither")
    paths = [str(tmp_path / name) for name in ("2kB.dither", "3kB.dither", "m.safetensors")]
    given = ["report", paths[0], "--beside", paths[1], "--against", paths[2]]
    result = CliRunner().invoke(app, [*given, "-o", str(tmp_path / "p.html"), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [side["file"] for side in told["files"]] == paths[:2]
    assert told["files"][0]["sqnr_db"] < told["files"][1]["sqnr_db"]
    result = CliRunner().invoke(app, [*given, "-o", paths[1]])
    assert result.exit_code == 2
    assert "is no HTML page" in " ".join(result.output.split())
    assert dither.verify(paths[1]) == []
