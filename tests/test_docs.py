"""The documentation holds together: pages are in the table of contents, links lead somewhere.

``make docs`` builds it; this needs no Sphinx. That its code runs is in ``test_readme.py``.
"""

import ast
import importlib
import re
from pathlib import Path

import pytest

import dither
from dither import recipes

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [p for p in sorted(DOCS.rglob("*.md")) if "_build" not in p.relative_to(DOCS).parts]
LINKING = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *PAGES]

FENCE = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)
TREE = re.compile(r"^```\{toctree\}\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", flags=re.MULTILINE)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def children(page: Path) -> list[Path]:
    """The pages that a page's tables of contents name."""
    lines = [line for tree in TREE.findall(text_of(page)) for line in tree.splitlines()]
    names = [line.strip() for line in lines if line.strip() and not line.startswith(":")]
    return [page.parent / f"{name}.md" for name in names]


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    plain = FENCE.sub("", text_of(path))
    found = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(plain)]
    return {heading.strip().replace(" ", "-") for heading in found}


def test_every_page_is_in_the_table_of_contents() -> None:
    reached, ahead = set[Path](), [DOCS / "index.md"]
    while ahead:
        page = ahead.pop()
        if page not in reached:
            reached.add(page)
            ahead += children(page)
    assert {str(p.relative_to(DOCS)) for p in reached} == {
        str(p.relative_to(DOCS)) for p in PAGES
    }, "name each page, and no other, in a toctree"


@pytest.mark.parametrize("path", LINKING, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    broken = []
    for link in LINK.findall(FENCE.sub("", text_of(path))):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def modules_of(path: Path) -> set[str]:
    """The modules that a file imports, and those that the rooms among them pass on."""
    found = set()
    for node in ast.walk(ast.parse(text_of(path))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dither."):
            room = importlib.import_module(str(node.module))
            found |= {room.__name__}
            found |= {getattr(getattr(room, a.name), "__module__", "") for a in node.names}
            if any(isinstance(getattr(room, a.name), tuple) for a in node.names):
                found |= modules_of(Path(str(room.__file__)))
    return found


def test_the_way_through_the_code_meets_each_file_once() -> None:
    text = text_of(ROOT / "CONTRIBUTING.md").partition("## A way through the code\n")[2]
    way = re.findall(r"`([\w/]+\.py)`", text.partition("\n## ")[0])
    assert len(way) == len(set(way))
    package = ROOT / "src" / "dither"
    search = {str(path.relative_to(package)) for path in package.glob("search/**/*.py")}
    another_door = {"search/outlook.py", "search/compress_to.py", "search/pruned.py"}
    another_door |= {"search/offering.py", "search/proposers/sparse_products.py"}
    another_door |= {n for n in search if n.startswith(("search/joint", "search/policies/"))}
    assert {n for n in search if not n.endswith("__init__.py")} - another_door <= set(way)
    met = set[str]()
    for name in way:
        module = f"dither.{name.removesuffix('.py').replace('/', '.')}"
        assert not met or module in met, f"{name} is not imported by a file before it"
        met |= modules_of(package / name)


def documented_rooms() -> list[str]:
    found = [re.findall(r"automodule:: (\S+)", text_of(p)) for p in (DOCS / "api").glob("*.md")]
    return [name for page in found for name in page]


def test_every_public_name_is_in_the_reference() -> None:
    rooms = [importlib.import_module(name) for name in documented_rooms()]
    public = {name for room in rooms for name in getattr(room, "__all__", vars(room))}
    assert set(dither.__all__) - {"open"} - public == set()


RECIPES = [name for name in recipes.__all__ if name != "Recipe"]


def test_every_recipe_has_a_page_and_a_reference() -> None:
    assert {p.stem for p in (DOCS / "recipes").glob("*.md")} == {*RECIPES, "index"}
    rooms = documented_rooms()
    assert [n for n in RECIPES if f"dither.recipes.{n}" not in rooms] == []


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_the_command_of_our_figures_or_says_that_there_are_none(name: str) -> None:
    ours = text_of(DOCS / "recipes" / f"{name}.md").partition("\n## Ours\n")[2]
    assert re.search(r"\bnot measured\b", ours, flags=re.IGNORECASE)  # of the paper's own tasks
    commands = re.findall(r"python -m benchmarks\.(\w+)", ours)
    assert [c for c in commands if not (ROOT / "benchmarks" / f"{c}.py").exists()] == []
    assert commands or "|" not in ours, "a table of figures needs the command that made it"


@pytest.mark.parametrize("task", ["ptb", "sst2"])
@pytest.mark.parametrize("name", ["quant_noise", "ipq"])
def test_tables_of_the_ordering_are_those_of_the_results(name: str, task: str) -> None:
    results = text_of(ROOT / "benchmarks" / "results" / f"ordering_{task}.md")
    measured = {row.partition(" | ")[2] for row in results.splitlines()}
    page = text_of(DOCS / "recipes" / f"{name}.md")
    shown = re.findall(rf"^\| {task} \| (.*)$", page, flags=re.MULTILINE)
    assert shown
    assert [row for row in shown if row not in measured] == []
