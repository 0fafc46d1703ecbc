"""What stands at the top of the package: each name is its room's, found once, and documented."""

import importlib
import re
from pathlib import Path

import pytest

import dither
from dither import encoders, train
from dither.formats import FORMATS
from dither.train.method import METHODS

ROOT = Path(__file__).parents[1]
INTERNAL = {
    "__init__",
    "__main__",
    "cli",
    "coding",
    "demo",
    "model",
    "terminal",
    "compiled",
    "threads",
}
"""Rooms that users do not import from."""


def documented() -> dict[str, str]:
    """Names in the table of the reference's first page, with their rooms."""
    text = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| (.*) \| \[(\w+)\]\(\w+\.md\) \|$", text, flags=re.MULTILINE)
    return {name: room for names, room in rows for name in re.findall(r"`(\w+)`", names)}


@pytest.mark.parametrize("name", dither.__all__)
def test_a_name_is_its_rooms_and_is_kept(name: str) -> None:
    vars(dither).pop(name, None)
    found = getattr(dither, name)
    room = importlib.import_module(f"dither.{documented()[name]}")
    expected = room.Archive.open if name == "open" else getattr(room, name)
    assert found == expected
    assert vars(dither)[name] is found


def test_the_reference_begins_with_the_front_door() -> None:
    assert sorted(documented()) == sorted(dither.__all__)
    assert set(dither.__all__) < set(dir(dither))


def by_task() -> dict[str, list[str]]:
    """Names on the page of ``dither``, by the heading that they stand under."""
    text = (ROOT / "docs" / "api" / "dither.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    tables = r"^\.\. autosummary::\n\n((?:   [\w.]+\n)+)"
    return {
        section.partition("\n")[0]: "".join(re.findall(tables, section, re.MULTILINE)).split()
        for section in sections
    }


def test_the_page_of_the_front_door_has_each_name_under_one_task() -> None:
    named = [name for names in by_task().values() for name in names]
    assert sorted(name for name in named if "." not in name) == sorted(dither.__all__)
    assert len(named) == len(set(named))
    assert [task for task, names in by_task().items() if not names] == []


@pytest.mark.parametrize("task", by_task())
def test_a_name_under_a_task_is_public_and_documented(task: str) -> None:
    for name in by_task()[task]:
        room, _, own = f"dither.{name}".rpartition(".")
        if not room.endswith(("transformers", "lightning", "peft")):  # these import their host
            module = importlib.import_module(room)
            assert own in getattr(module, "__all__", vars(module))
            assert len((getattr(module, own).__doc__ or "").split()) > 4


def test_a_plan_finds_every_format_encoder_and_method() -> None:
    methods = {kind.__name__ for kind in METHODS.values()} & set(train.__all__)
    formats = {kind.__name__ for kind in FORMATS.values()}
    assert (formats | set(encoders.__all__) | methods) - set(dither.__all__) == set()


def test_what_is_not_there_is_looked_for_in_the_rooms() -> None:
    with pytest.raises(AttributeError, match=r"'Kurtosis'.*its modules.*dither\.train"):
        _ = dither.Kurtosis


def test_every_room_has_a_page_in_the_reference() -> None:
    package = ROOT / "src" / "dither"
    rooms = {path.stem for path in package.glob("*.py")}
    rooms |= {path.parent.name for path in package.glob("*/__init__.py")}
    pages = {path.stem for path in (ROOT / "docs" / "api").glob("*.md")} - {"index", "dither"}
    assert rooms - INTERNAL == pages
    index = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^(\w+)$", index, flags=re.MULTILINE)) == pages | {"dither"}
