"""The page: it shows what the file holds, needs nothing else, and hostile names do nothing."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner, Result

import dither
from dither.archive import Archive, pack, write
from dither.archive.treemap import squarified
from dither.cli import app
from dither.core import ArchiveError
from dither.formats import Affine, Raw
from dither.report import contents, page, save_page
from dither.report.contents import BINS, HISTOGRAMS, histogram_of
from dither.report.page import MOST_ROWS
from dither.report.signal_noise import Noise

VOID = {"meta", "br", "wbr"}


def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer.{i}.weight": torch.randn(48, 32 + i, generator=generator) for i in range(8)}
    return {
        **tensors,
        "layer.bias": torch.randn(48, generator=generator),
        "mask": torch.tensor([0.0, -math.inf, math.nan]),
        "steps": torch.tensor(7),
    }


def archive(**metadata: object) -> Archive:
    return dither.compress(state(), size="9kB", metadata=metadata)


class Reader(HTMLParser):
    """Checks that tags are closed in order; gathers text, tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_it_needs_nothing_else() -> None:
    text = page(contents(archive(), "m.dither", ("model", state())))
    read = Reader(text)
    assert not read.tags & {"script", "link", "img", "iframe", "object", "form", "base"}
    assert not {name for name in read.attributes if name in {"src", "href"} or name[:2] == "on"}
    for part in ("http:", "https:", "url(", "@import", "//"):
        assert part not in text


def test_it_shows_every_tensor_and_the_bytes_add_up() -> None:
    held = archive(budget=9000, author="someone")
    found = contents(held, "m.dither", ("model", state()))
    text = Reader(page(found)).text
    assert found.overhead + sum(t.nbytes for t in found.tensors) == held.nbytes
    for tensor in found.tensors:
        assert tensor.name in text
        assert f"{tensor.nbytes:,}" in text
    assert f"{held.nbytes:,}" in text
    assert f"{100 * held.nbytes / 9000:.1f} % of the budget of 9,000" in text
    assert "someone" in text


def test_errors_are_those_of_the_decoded_tensors() -> None:
    held, original = archive(), state()
    found = contents(held, "m.dither", ("model", original))
    for tensor in found.tensors:
        noise = Noise()
        noise.add(original[tensor.name], held[tensor.name])
        assert tensor.sqnr == noise.decibels
    by_name = {tensor.name: tensor for tensor in found.tensors}
    before, after = original["layer.0.weight"].double(), held["layer.0.weight"].double()
    wanted = 10 * math.log10(float(before.square().sum() / (before - after).square().sum()))
    assert by_name["layer.0.weight"].sqnr == pytest.approx(wanted)
    assert by_name["mask"].sqnr == by_name["steps"].sqnr == math.inf
    assert 5 < (found.sqnr or 0) < 60


def test_without_a_checkpoint_there_are_no_errors() -> None:
    found = contents(archive(), "m.dither")
    assert found.sqnr is None
    assert all(tensor.sqnr is None for tensor in found.tensors)
    assert sum(tensor.histogram is not None for tensor in found.tensors) == HISTOGRAMS
    assert "SQNR" not in Reader(page(found)).text


def test_another_checkpoint_is_said_to_be_one() -> None:
    other = {"layer.0.weight": state()["layer.0.weight"], "layer.1.weight": torch.randn(3)}
    found = contents(archive(), "m.dither", ("other", other))
    assert "layer.1.weight" in found.lacking
    assert "layer.0.weight" not in found.lacking
    assert "of another shape" in Reader(page(found)).text


def test_sensitivities_of_the_metadata() -> None:
    found = contents(archive(sensitivity={"layer.0.weight": 0.125, "layer.1.weight": "much"}), "m")
    assert {t.name: t.sensitivity for t in found.tensors if t.sensitivity is not None} == {
        "layer.0.weight": 0.125
    }
    assert "sensitivity" in Reader(page(found)).text
    assert "sensitivity" not in found.metadata


def test_hostile_names_do_nothing(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=y>\x1b[2J\u202e\ud800"
    tensors = {evil: Raw().encode(torch.randn(40, 40))}
    write(tmp_path / "m.dither", tensors, {f"{evil}2": evil}, {evil: evil, "budget": evil})
    save_page(tmp_path / "m.html", tmp_path / "m.dither", title=evil)
    text = (tmp_path / "m.html").read_text("utf-8")
    read = Reader(text)
    assert not read.tags & {"script", "img"}
    assert not read.attributes & {"onerror", "src"}
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_the_same_file_gives_the_same_page(tmp_path: Path) -> None:
    archive().save(tmp_path / "m.dither")
    for name in "ab":
        save_page(tmp_path / name, tmp_path / "m.dither", against=state())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_damaged_file_leaves_no_page(tmp_path: Path) -> None:
    data = bytearray(archive().to_bytes())
    data[len(data) // 3] ^= 1
    with pytest.raises(ArchiveError):
        save_page(tmp_path / "m.html", Archive.from_bytes(bytes(data)), against=state())
    assert list(tmp_path.iterdir()) == []


def test_files_with_nothing_and_with_very_much(tmp_path: Path) -> None:
    write(tmp_path / "none.dither", {})
    write(tmp_path / "zero.dither", {"empty": Raw().encode(torch.zeros(0, 4))})
    many = {f"bias.{i}": Raw().encode(torch.randn(3)) for i in range(MOST_ROWS + 5)}
    write(tmp_path / "many.dither", many)
    for name in ("none", "zero", "many"):
        save_page(tmp_path / "a.html", tmp_path / f"{name}.dither")
        text = Reader((tmp_path / "a.html").read_text("utf-8")).text
        assert ("And 5 smaller ones." in text) == (name == "many")


def test_a_histogram_counts_what_is_there() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    values[:20] = 50.0
    coarse = Affine(3).encode(values.clamp(-4, 4)).decode()
    found = histogram_of(coarse, values)
    assert found is not None
    assert found.before is not None
    assert found.outside == pytest.approx(20 / 10_000)
    assert sum(found.before) == pytest.approx(1 - 20 / 10_000, abs=1e-5)
    assert sum(found.after) == pytest.approx(1, abs=1e-5)
    assert len(found.after) == BINS
    assert sum(share > 0 for share in found.after) == len(coarse.unique())
    assert histogram_of(torch.ones(5), None) is None
    assert histogram_of(torch.tensor([math.nan]), None) is None


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=60), st.integers(1, 2000))
def test_boxes_fill_the_map_without_overlap(values: list[int], width: int) -> None:
    ranked = sorted(values, reverse=True)
    boxes = squarified(ranked, width, 448)
    whole = width * 448
    for value, (left, top, wide, high) in zip(ranked, boxes, strict=True):
        assert wide * high == pytest.approx(whole * value / sum(ranked), rel=1e-6)
        assert left >= 0
        assert top >= 0
        assert left + wide <= width * (1 + 1e-6)
        assert top + high <= 448 * (1 + 1e-6)
    for i, (left, top, wide, high) in enumerate(boxes):
        for other_left, other_top, other_wide, other_high in boxes[:i]:
            across = min(left + wide, other_left + other_wide) - max(left, other_left)
            down = min(top + high, other_top + other_high) - max(top, other_top)
            assert min(across / width, down / 448) < 1e-6


# --- the command ---------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    held = {name: value for name, value in state().items() if name != "mask"}
    save_file(held, "model.safetensors")
    dither.compress(held, size="9kB").save("m.dither")
    return tmp_path


def test_the_command_writes_the_page(folder: Path) -> None:
    result = run("m.dither", "--against", "model.safetensors", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    text = Reader((folder / document["output"]).read_text("utf-8")).text
    assert document["nbytes"] == (folder / "m.dither").stat().st_size
    assert f"{document['sqnr_db']:.1f} dB" in text
    assert "Compared with model.safetensors." in text
    again = run("m.dither")  # a page may be written anew
    assert again.exit_code == 0
    assert "wrote m.html" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["m.dither", "-o", "m.dither"], "the source itself"),
        (["m.dither", "--against", "model.safetensors", "-o", "model.safetensors"], "the source"),
        (["m.dither", "-o", "notes.txt"], "no HTML page"),
        (["m.dither", "-o", "notes.txt/a.html"], "no folder"),
        (["model.safetensors"], "dither"),
        (["nothing.dither"], "nothing.dither"),
    ],
)
def test_what_the_command_refuses(folder: Path, arguments: list[str], wanted: str) -> None:
    (folder / "notes.txt").write_text("dear diary")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert wanted in result.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_exact_integers_do_not_drown_the_noise_of_weights() -> None:
    tensors = {"weight": torch.randn(64, 64), "positions": 1000 * torch.arange(200)}
    coarse = dither.compress(tensors, size="4kB")
    found = contents(coarse, "x", ("source", tensors))
    noise = Noise()
    noise.add(tensors["weight"], coarse["weight"])
    assert found.sqnr == noise.decibels < 40
    assert {tensor.name: tensor.sqnr for tensor in found.tensors}["positions"] == math.inf


@pytest.mark.parametrize("bits", ["eight", [8], None, True, 1.5, -3, 10**30, {}])
def test_a_site_may_say_anything_of_its_bits(bits: object) -> None:
    made = pack({"t": Raw().encode(torch.zeros(3))}, sites={"a@in": {"bits": bits}})
    found = contents(made, "m")
    assert found.sites == {"a@in": None}
    assert "a@in: \u2013 bits" in Reader(page(found)).text


@pytest.mark.parametrize("value", [10**400, -(10**400), "1", None, [1], True])
def test_a_sensitivity_may_be_anything(value: object) -> None:
    metadata = {"sensitivity": {"t": value}, "budget": value}
    made = pack({"t": Raw().encode(torch.zeros(3))}, metadata=metadata)
    found = contents(made, "m")
    assert found.tensors[0].sensitivity is None
    Reader(page(found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("unit", [1.0, 3e38, 1e-44, 1e-38])
def test_values_may_be_as_great_or_small_as_they_can_be(dtype: torch.dtype, unit: float) -> None:
    values = (torch.linspace(-1, 1, 500, dtype=torch.float64) * unit).to(dtype)
    histogram = histogram_of(values, values)
    if histogram is None:
        assert not values.float().any()
        return
    assert histogram.low <= float(values.min()) < float(values.max()) <= histogram.high
    assert sum(histogram.after) == pytest.approx(1)
    made = pack({"t": Raw().encode(values)})
    Reader(page(contents(made, "m", ("before", {"t": values * 0.5}))))


def test_metadata_may_be_nested_deeply() -> None:
    deep: list[object] = []
    for _ in range(600):
        deep = [deep]
    Reader(page(contents(pack({}, metadata={"deep": deep}), "m")))
