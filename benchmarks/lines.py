"""Lines of code in ``src``, by room: of the working tree, and beside it of a commit.

A line of code is one that holds code: blank lines, comments and strings that stand alone
(docstrings) are not counted.

    python -m benchmarks.lines f3b725a
"""

import argparse
import ast
import io
import subprocess
import tokenize
from collections import Counter
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
SILENT = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}


def code_lines(text: str) -> int:
    """Lines on which something stands other than comments and docstrings."""
    lines = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def by_room(commit: str | None = None) -> Counter[str]:
    """Lines of code of each room: a folder of the package, or a file beside the folders."""
    rooms = Counter[str]()
    for path, text in sorted((_files_of(commit) if commit else _files_here()).items()):
        rooms[PurePosixPath(path).parts[2].removesuffix(".py")] += code_lines(text)
    return rooms


def _files_here() -> dict[str, str]:
    paths = (ROOT / "src" / "dither").rglob("*.py")
    return {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in paths}


def _files_of(commit: str) -> dict[str, str]:
    names = _git("ls-tree", "-r", "--name-only", commit, "src/dither").splitlines()
    return {name: _git("show", f"{commit}:{name}") for name in names if name.endswith(".py")}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commit", nargs="?", help="to compare with")
    commit = parser.parse_args().commit
    now, before = by_room(), by_room(commit) if commit else Counter[str]()
    print(f"| room | {f'{commit} | ' if commit else ''}here |")
    print("| --- |" + " --- |" * (2 if commit else 1))
    for room in [*sorted({*now, *before}), "all"]:
        counts = [c.total() if room == "all" else c[room] for c in (before, now)]
        print(f"| {room} | " + " | ".join(f"{n:,}" for n in counts[0 if commit else 1 :]) + " |")


if __name__ == "__main__":
    main()
