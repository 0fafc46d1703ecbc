"""What a notebook shows of an archive: bytes and tensors, without scripts, whatever names are."""

from __future__ import annotations

import re

import torch
from torch import nn

import dither
from dither.archive import Archive, pack
from dither.archive.picture import LEAST_BOX, MOST_LINES, gathered
from dither.formats import Affine, Raw
from tests.report.test_page import Reader, archive


def test_a_notebook_shows_where_the_bytes_are() -> None:
    shown = archive()
    read = Reader(shown._repr_html_())
    assert f"{shown.nbytes:,} bytes" in read.text
    for name, entry in shown.entries.items():
        assert name in read.text
        assert f"{entry.nbytes:,}" in read.text
    assert "names, shapes, checksums" in shown._repr_html_()
    assert read.tags <= {"div", "p", "b", "br", "wbr", "table", "tr", "th", "td"}
    assert read.attributes <= {"style", "title"}
    widths = [float(w) for w in re.findall(r";width:([\d.]+)%;height", shown._repr_html_())]
    heights = [float(h) for h in re.findall(r"%;height:([\d.]+)%", shown._repr_html_())]
    area = sum(w * h for w, h in zip(widths, heights, strict=True))
    assert abs(area - 10_000) < 20


def test_many_tensors_ties_and_odd_names_are_shown_shortly() -> None:
    model = nn.Module()
    model.embed, model.head = nn.Embedding(64, 16), nn.Linear(16, 64, bias=False)
    model.head.weight = model.embed.weight
    assert "tied names: 1" in Reader(dither.compress(model, "4x")._repr_html_()).text
    many = pack({f"<script>{i}&": Raw().encode(torch.ones(i + 1)) for i in range(40)})
    read = Reader(many._repr_html_())
    assert "script" not in read.tags
    assert f"smaller tensors: {40 - MOST_LINES}" in read.text
    for held in ({}, {"empty": torch.ones(0)}, {"one": torch.tensor(1.0)}):
        shown: Archive = pack({name: Raw().encode(value) for name, value in held.items()})
        assert "bytes" in Reader(shown._repr_html_()).text


def test_boxes_are_the_whole_file() -> None:
    tensors = {f"t{i}": Affine(4).encode(torch.linspace(-1, 1, 16 * (i + 1))) for i in range(300)}
    shown = pack(tensors)
    entries = shown.entries.values()
    boxes = gathered([(e.name, e.nbytes, e.numel) for e in entries], shown.nbytes)
    assert sum(nbytes for _, nbytes, _ in boxes) == shown.nbytes
    own = [nbytes for name, nbytes, _ in boxes if name.startswith("t")]
    assert all(nbytes >= LEAST_BOX * shown.nbytes for nbytes in own)
    assert any("smaller tensors" in name for name, _, _ in boxes)
