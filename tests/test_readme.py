"""The README and the documentation do what they say: their blocks are executed, in order.

Python blocks of one document share a namespace and a folder; a line ``$ dither ...`` in a console
or bash block runs the command line in that folder. Blocks marked ``python no-run`` are not run, and
those marked ``python needs=PACKAGE`` only where that optional package is installed. A block
``js needs=node`` is run by node, beside a copy of our decoder. A block ``text output`` is what the
block before it prints, but for its numbers, which depend on the machine.

The tutorial is run as the notebook that is made from it.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from docs import notebook

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    line: int
    code: str
    output: str | None = None


def has_packages(words: str) -> bool:
    """Whether what ``needs=`` names is installed."""
    needed = set(re.findall(r"needs=(\w+)", words))
    return (shutil.which("node") is not None or "node" not in needed) and all(
        importlib.util.find_spec(name) is not None for name in needed - {"node"}
    )


def blocks(path: Path) -> list[Block]:
    """The blocks that can be run, with the line on which their code begins and what they print."""
    text = path.read_text(encoding="utf-8")
    found: list[Block] = []
    runs = False
    for match in FENCE.finditer(text):
        language, words, code = match[1], match[2].split(), match[3]
        if (language, words) == ("text", ["output"]):
            found[-1:] = [found[-1]._replace(output=code)] if runs else found[-1:]
            continue
        block = Block(language, text.count("\n", 0, match.start(3)) + 1, code)
        runs = "no-run" not in words and has_packages(match[2])
        runs = runs and (language == "python" or "needs=node" in words or commands(block) != [])
        found += [block] if runs else []
    return found


def cells(path: Path) -> list[Block]:
    """The code cells of a notebook, as blocks; ``line`` is the number of the cell."""
    found = []
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            code = re.sub(r"^!", "$ ", "".join(cell["source"]), flags=re.MULTILINE)
            language = "console" if code.startswith("$") else "python"
            found.append(Block(language, number, code))
    outputs = [block.output for block in blocks(notebook.PAGE)]
    return [block._replace(output=text) for block, text in zip(found, outputs, strict=True)]


def commands(block: Block) -> list[list[str]]:
    """Arguments of each ``$ dither`` line; a backslash at its end continues it."""
    if block.language not in {"console", "bash"}:
        return []
    lines = block.code.replace("\\\n", " ").splitlines()
    return [shlex.split(x, comments=True)[2:] for x in lines if x.startswith("$ dither ")]


def run_python(block: Block, path: Path, namespace: dict[str, Any]) -> str:
    # Empty lines in front make tracebacks name the lines of the document.
    code = compile("\n" * (block.line - 1) + block.code, str(path), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, namespace)
    return printed.getvalue()


def run_javascript(block: Block, path: Path) -> str:
    shutil.copytree(ROOT / "packages" / "js" / "src", "packages/js/src", dirs_exist_ok=True)
    shutil.copy(ROOT / "packages" / "js" / "package.json", "packages/js")  # says: modules
    Path("block.mjs").write_text(block.code, encoding="utf-8")
    result = subprocess.run(
        ["node", "block.mjs"], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, f"{path.name}, line {block.line}: {result.stderr}"
    return result.stdout


def run_commands(block: Block, path: Path) -> str:
    printed = ""
    for arguments in commands(block):
        result = subprocess.run(
            [sys.executable, "-m", "dither", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert result.returncode == 0, (
            f"{path.name}, line {block.line}: dither {shlex.join(arguments)} ended with "
            f"{result.returncode}\n{result.stdout}{result.stderr}"
        )
        printed += result.stdout
    return printed


def without_numbers(text: str) -> list[str]:
    return [" ".join(re.sub(r"\d[\d.,]*", "#", line).split()) for line in text.splitlines()]


PAGES = [p for p in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in p.parts]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
DOCUMENTS = [
    NOTEBOOK if p == notebook.PAGE else p for p in (ROOT / "README.md", *PAGES) if blocks(p)
]


def test_the_notebook_is_that_of_the_page() -> None:
    page = notebook.PAGE.read_text(encoding="utf-8")
    made = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert made == notebook.notebook(page), "run python docs/notebook.py"
    assert [block.code.strip() for block in blocks(notebook.PAGE)] == [
        block.code for block in cells(NOTEBOOK)
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(path) if path.suffix == ".md" else cells(path):
        if block.language == "python":
            printed = run_python(block, path, namespace)
        elif block.language == "js":
            printed = run_javascript(block, path)
        else:
            printed = run_commands(block, path)
        assert block.output is None or without_numbers(printed) == without_numbers(block.output)


def test_what_a_page_shows_as_output_is_compared_but_for_numbers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint('a', 1.5)\n```\n\n```text output\na 2\n```\n")
    (block,) = blocks(page)
    assert without_numbers(run_python(block, page, {})) == without_numbers(str(block.output))
    assert without_numbers("b 2") != without_numbers(str(block.output))
    page.write_text("```python needs=no_such_package\nx\n```\n\n```text output\na 2\n```\n")
    assert blocks(page) == []


def test_the_readme_shows_python_and_the_command_line() -> None:
    languages = [block.language for block in blocks(ROOT / "README.md")]
    assert "python" in languages
    assert "console" in languages
