"""How large the decoder in one Python file is, for budgets that the decoder counts against.

``python -m benchmarks.decoder_size`` prints its lines of code and its bytes: as it stands, without
comments, docstrings and annotations and with one space for each level (names are kept, so that it
is the same module), and both compressed.
"""

from __future__ import annotations

import ast
import lzma
import re
import zlib
from pathlib import Path

from benchmarks.lines import code_lines

DECODER = Path(__file__).parents[1] / "packages" / "python" / "dither_decode.py"
RAW_LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 3, "pb": 0}]


class _Bare(ast.NodeTransformer):
    """Takes out what does not change what a module does when it is run."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        if node.value is None:  # a field of a class: what it is annotated with is not read
            node.annotation = ast.Constant(0)
            return node
        return ast.copy_location(ast.Assign([node.target], node.value), node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.returns = None
        return node


def minified(text: str) -> str:
    r"""The same module without comments, docstrings and annotations.

    >>> minified('def f(x: int) -> int:\n    "Doc."\n    return x + 1  # more')
    'def f(x):\n return x + 1'
    """
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and len(body) > 1:
            node.body = [s for s in body if not _is_text(s)]  # type: ignore[attr-defined]
    bare = ast.unparse(ast.fix_missing_locations(_Bare().visit(tree)))
    return re.sub(r"^( {4})+", lambda m: " " * (len(m[0]) // 4), bare, flags=re.MULTILINE)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def sizes(text: str) -> dict[str, int]:
    """Bytes of a module, by how it is packed."""
    small = minified(text)
    return {
        "lines of code": code_lines(text),
        "as it stands": len(text.encode()),
        "as it stands, zlib": len(zlib.compress(text.encode(), 9)),
        "minified": len(small.encode()),
        "minified, zlib": len(zlib.compress(small.encode(), 9)),
        "minified, lzma": len(lzma.compress(small.encode(), lzma.FORMAT_RAW, filters=RAW_LZMA)),
    }


def main() -> None:
    """Run from the command line."""
    for name, count in sizes(DECODER.read_text(encoding="utf-8")).items():
        print(f"{count:8,}  {name}")


if __name__ == "__main__":
    main()
