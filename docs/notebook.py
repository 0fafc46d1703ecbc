"""The tutorial as a notebook: `python docs/notebook.py` writes tutorial.ipynb from tutorial.md.

The page is the source, so that its words stand once; a test holds that the notebook is up to date,
and runs its cells. What the page shows below a block becomes the output of the cell.
"""

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("tutorial.md")
FENCE = re.compile(r"^```(python|console|text)[^\n]*\n(.*?)^```\n", flags=re.MULTILINE | re.DOTALL)


def lines(text: str) -> list[str]:
    """As notebooks hold text: a list of lines, which keep their ends but for the last."""
    return text.strip("\n").splitlines(keepends=True)


def notebook(page: str) -> dict[str, Any]:
    """The cells of a page, in the form of Jupyter's notebooks, version 4.5."""
    cells: list[dict[str, Any]] = []

    def words(text: str) -> None:
        if text.strip():
            cells.append({"cell_type": "markdown", "metadata": {}, "source": lines(text)})

    end = 0
    for block in FENCE.finditer(page):
        words(page[end : block.start()])
        end, code = block.end(), block[2]
        if block[1] == "text":
            shown = [*lines(code)[:-1], lines(code)[-1] + "\n"]
            cells[-1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": shown}]
            continue
        code = re.sub(r"^\$ ", "!", code, flags=re.MULTILINE)
        empty: dict[str, Any] = {"execution_count": None, "metadata": {}, "outputs": []}
        cells.append({"cell_type": "code", "source": lines(code), **empty})
    words(page[end:])
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def main() -> None:
    cells = notebook(PAGE.read_text(encoding="utf-8"))
    text = json.dumps(cells, indent=1, ensure_ascii=False) + "\n"
    PAGE.with_suffix(".ipynb").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
