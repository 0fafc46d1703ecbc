"""The project's own rules: sizes that show when a thing has two jobs, one version, its changes."""

import ast
import re
from pathlib import Path

import pytest

import dither
from benchmarks.lines import by_room, code_lines
from changes.fold import SECTIONS, fold, fragments

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_CODE_LINES = 29_850
MAX_PARAMETERS = 8  # `self` and `cls` not counted; options of a command are declarations


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    names += [a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return [name for name in names if name not in {"self", "cls"}]


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return "app.command()" in map(ast.unparse, function.decorator_list)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    too_much = [f"{lines} lines"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                too_much.append(f"{node.name} (line {node.lineno}) has {length} lines")
            if len(parameters(node)) > MAX_PARAMETERS and not is_command(node):
                too_much.append(f"{node.name} (line {node.lineno}) has {parameters(node)}")
    assert too_much == []


def test_the_changelog_begins_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\d[^\]]*)\]", changelog, flags=re.MULTILINE)
    assert versions[0] == dither.__version__


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("CITATION.cff", r"^version: (.*)$"),
        ("docs/limits.md", r"\bVersion (\d+\.\d+)\.$"),
    ],
)
def test_whatever_names_the_version_names_this_one(name: str, pattern: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    (found,) = re.findall(pattern, text, flags=re.MULTILINE)
    assert dither.__version__ == found or dither.__version__.startswith(f"{found}.")


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "src" / "dither" / "py.typed").exists()


def test_the_lines_of_code_stay_within_their_budget() -> None:
    rooms = by_room()
    assert rooms.total() <= MAX_CODE_LINES, (
        f"src has {rooms.total()} lines of code, {MAX_CODE_LINES} are the budget: merge what is "
        f"there twice, or take out what brings nothing ({rooms.most_common()})"
    )


def test_blank_lines_comments_and_docstrings_are_no_lines_of_code() -> None:
    text = '"""Doc.\n\nMore."""\n\nx = [\n    1,  # one\n]\n"""Of x."""\n# no\ny = """a\nb"""\n'
    assert code_lines(text) == 5


def test_fragments_of_the_changelog_have_a_kind_and_one_paragraph() -> None:
    for path in fragments():
        text = path.read_text(encoding="utf-8").strip()
        assert re.fullmatch(rf"[a-z0-9-]+\.({'|'.join(SECTIONS)})\.md", path.name)
        assert re.match(r"[^-#*\s]", text), f"{path.name}: plain words, without a bullet or heading"
        assert "\n\n" not in text, f"{path.name}: one paragraph for one change"


def test_fragments_fold_into_their_sections_of_the_newest_version() -> None:
    older = "## [1]\n\n### Added\n\n- c\n"
    text = f"# Changelog\n\n## [2]\n\n### Added\n\n- a\n\n### Fixed\n\n- b\n\n{older}"
    text = fold(text, "feature", "one\ntwo\n")
    text = fold(text, "doc", "three")
    assert text == (
        "# Changelog\n\n## [2]\n\n### Added\n\n- a\n- one\n  two\n\n### Fixed\n\n- b\n\n"
        f"### Documentation\n\n- three\n\n{older}"
    )
