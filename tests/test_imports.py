"""The import law: rooms import what stands to their left, floors what is below them.

And `import dither` stays light.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "dither"

# From left to right. A room may import the rooms of the bars before its own; rooms of one bar are
# strangers. `__init__` is what `import dither` loads.
BARS = """
    terminal, compiled, progress, threads, disk | core, coding
    | formats, model, checkpoint, data, team
    | encoders, calibrate, activations, rewrite, archive | search | train
    | select, run, testing
    | report | __init__ | recipes, integrations, demo | cli | __main__
"""
RANK = {room.strip(): rank for rank, bar in enumerate(BARS.split("|")) for room in bar.split(",")}

# From the ground up: what a file is; how numbers are chosen; how a budget is spent and where the
# result goes. A floor imports its own rooms and those below. `model` and `checkpoint`, which walk
# models and read others' files, serve all three.
FLOORS = (
    {"terminal", "compiled", "progress", "threads", "disk", "core", "coding", "formats", "archive"}
    | {"model", "checkpoint", "data", "team"},
    {"encoders", "calibrate", "activations", "rewrite", "train"},
    {"search", "select", "run", "testing", "report", "__init__", "recipes", "integrations"}
    | {"demo", "cli", "__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Training begins where the search for the same budget ends, and reads sizes as it does. The search
# knows nothing of training: it stands to the left.
UPSTAIRS = {("train", "search")}

# Rooms of the first floor that know no models; one of them, coding, knows no tensors either.
NO_MODELS = {"core", "coding", "formats"}
COUNTING = {"archive", "encoders", "search", "train"}
"""Rooms that know how many bits codes cost; a format knows numbers only."""

REQUIRED = {*sys.stdlib_module_names, "numpy", "safetensors"}
TERMINAL = {"rich", "typer"}  # required, but loaded only where something is shown
SHOWING = {"cli", "demo", "report"}
HOSTED = {"integrations"}  # whose files are imported by name, where their host is installed


def imports(tree: ast.AST, *, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Each imported name, with whether the import stands inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full, from `dither`"
            split = node.module in {"dither", "torch"}
            names = [f".{alias.name}" for alias in node.names] if split else [""]
            yield from ((f"{node.module}{name}", inside) for name in names)
        else:
            deeper = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from imports(node, inside=deeper)


def broken(room: str, name: str, *, inside: bool) -> str | None:
    """How this import breaks the law, if it does."""
    top, _, rest = name.partition(".")
    if top == "dither":
        other = rest.partition(".")[0]
        other = other if other in RANK else "__init__"
        if inside:
            return f"imports {name} inside a function; only optional packages may be"
        if other != room and RANK[other] >= RANK[room]:
            return f"imports {name}, which does not stand to its left"
        if FLOOR[other] > FLOOR[room] and (room, other) not in UPSTAIRS:
            return f"imports {name}, which is on a floor above its own"
        if other == "coding" and room not in COUNTING | {"coding"}:
            return f"imports {name}; only {', '.join(sorted(COUNTING))} may"
    elif name.startswith("torch.nn") and room in NO_MODELS:
        return f"imports {name}; {', '.join(sorted(NO_MODELS))} know no models"
    elif top == "torch" and room == "coding":
        return "imports torch; coding knows arrays"
    elif top in TERMINAL and room not in SHOWING:
        return f"imports {name}; only {', '.join(sorted(SHOWING))} may"
    elif top in REQUIRED and inside:
        return f"imports {name} inside a function; only optional packages may be"
    elif top not in REQUIRED | TERMINAL | {"torch"} and not inside and room not in HOSTED:
        return f"imports the optional package {top} outside a function"
    return None


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_run_one_way(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in RANK, f"{room} is no room of the design: give it a place in BARS"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [e for name, inside in imports(tree) if (e := broken(room, name, inside=inside))] == []


def test_every_room_has_a_floor() -> None:
    assert RANK.keys() == FLOOR.keys()


@pytest.mark.parametrize(
    ("room", "name"),
    [
        ("archive", "dither.encoders"),  # of the same bar
        ("calibrate", "dither.search"),
        ("search", "dither.train"),
        ("recipes", "dither.demo"),
        ("train", "dither.recipes"),
        ("formats", "dither.coding"),
        ("report", "dither.coding.rans"),
        ("formats", "torch.nn"),
        ("coding", "torch"),
        ("archive", "rich"),
        ("train", "scipy"),
    ],
)
def test_the_law_has_teeth(room: str, name: str) -> None:
    assert broken(room, name, inside=False) is not None
    assert broken("search", "dither.calibrate", inside=False) is None
    assert broken("train", "dither.search", inside=False) is None


def test_only_hosts_are_imported_by_their_integrations_at_once() -> None:
    assert broken("integrations", "transformers", inside=False) is None
    assert broken("integrations", "rich", inside=False) is not None
    assert broken("recipes", "transformers", inside=False) is not None
    assert broken("search", "dither.integrations", inside=False) is not None


def test_import_dither_adds_little_to_import_torch() -> None:
    program = (
        "import json, sys, torch\nbefore = set(sys.modules)\nimport dither\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    added = json.loads(result.stdout)
    foreign = [name for name in added if name.partition(".")[0] != "dither"]
    packages = {name.partition(".")[0] for name in foreign} - set(sys.stdlib_module_names)
    assert {name for name in packages if not name.startswith("_")} <= {"safetensors"}
    assert len(foreign) < 60, f"import dither loads {len(foreign)} modules besides torch and itself"


def module_of(path: Path) -> str:
    """The dotted name of a file."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(root: Path) -> dict[str, set[str]]:
    """Which module imports which; imports for type checkers alone and in functions are counted."""
    paths = {module_of(path): path for path in sorted(root.rglob("*.py"))}
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & paths.keys()
            elif isinstance(node, ast.ImportFrom) and node.module in paths:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= {inner if inner in paths else node.module for inner in names}
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, or nothing."""
    done: set[str] = set()

    def search(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if cycle := search(other, [*trail, name]):
                return cycle
        done.add(name)
        return []

    return next((cycle for name in graph if (cycle := search(name, []))), [])


def test_no_module_imports_itself_through_others() -> None:
    assert find_cycle(import_graph(PACKAGE)) == []


def test_a_cycle_would_be_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set[str]()}
    assert find_cycle(graph) == ["b", "c", "b"]
    assert "dither.train.surrogate" in import_graph(PACKAGE)["dither.train.attached"]


@pytest.mark.parametrize("room", ["train", "calibrate"])
def test_rooms_that_are_called_hold_no_import_for_types_alone(room: str) -> None:
    paths = (PACKAGE / room).rglob("*.py")
    assert [p.name for p in paths if "TYPE_CHECKING" in p.read_text(encoding="utf-8")] == []
