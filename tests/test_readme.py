"""The README and the documentation do what they say: their blocks are executed, in order.

Python blocks of one document share a namespace and a folder; a line ``$ dither ...`` in a console
or bash block runs the command line in that folder. Blocks marked ``python no-run`` are not run, and
those marked ``python needs=PACKAGE`` only where that optional package is installed.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    line: int
    code: str


def has_packages(words: str) -> bool:
    """Whether what ``needs=`` names is installed."""
    needed = re.findall(r"needs=(\w+)", words)
    return all(importlib.util.find_spec(name) is not None for name in needed)


def blocks(path: Path) -> list[Block]:
    """The blocks that can be run, with the line on which their code begins."""
    text = path.read_text(encoding="utf-8")
    found = [
        Block(match[1], text.count("\n", 0, match.start(3)) + 1, match[3])
        for match in FENCE.finditer(text)
        if "no-run" not in match[2].split() and has_packages(match[2])
    ]
    return [block for block in found if block.language == "python" or commands(block)]


def commands(block: Block) -> list[list[str]]:
    """Arguments of each ``$ dither`` line; a backslash at its end continues it."""
    if block.language not in {"console", "bash"}:
        return []
    lines = block.code.replace("\\\n", " ").splitlines()
    return [shlex.split(x, comments=True)[2:] for x in lines if x.startswith("$ dither ")]


def run_python(block: Block, path: Path, namespace: dict[str, Any]) -> None:
    # Empty lines in front make tracebacks name the lines of the document.
    exec(compile("\n" * (block.line - 1) + block.code, str(path), "exec"), namespace)


def run_commands(block: Block, path: Path) -> None:
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


PAGES = [p for p in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in p.parts]
DOCUMENTS = [p for p in (ROOT / "README.md", *PAGES) if blocks(p)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(path):
        if block.language == "python":
            run_python(block, path, namespace)
        else:
            run_commands(block, path)


def test_the_readme_shows_python_and_the_command_line() -> None:
    languages = [block.language for block in blocks(ROOT / "README.md")]
    assert "python" in languages
    assert "console" in languages
