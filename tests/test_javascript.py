"""The decoder in JavaScript: its own tests, where there is node to run them.

That it has the verdicts of the others on hostile files is in ``test_small_decoders.py``.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import dither
from benchmarks.small_decoders import READER

PACKAGE = Path(__file__).parents[1] / "packages" / "js"
SOURCES = sorted((PACKAGE / "src").glob("*.js"))


@pytest.mark.skipif(shutil.which("node") is None, reason="NEEDS NODE: install node 18 or later")
def test_its_own_tests() -> None:
    command = ["node", "--test", "test/"]
    done = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# fail 0" in done.stdout


def test_it_imports_nothing_but_itself() -> None:
    assert READER.exists()
    assert len(SOURCES) > 5
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        imported = re.findall(r'(?:from|import)\s*\(?\s*"([^"]+)"', text)
        assert all((path.parent / name).is_file() for name in imported)
        assert not re.search(r"\b(?:require\(|(?:process|Buffer|document|window)\.)", text)
        assert len(text.splitlines()) <= 400


def test_it_has_the_version_of_the_library() -> None:
    package = (PACKAGE / "package.json").read_text(encoding="utf-8")
    assert f'"version": "{dither.__version__}"' in package
    assert '"dependencies"' not in package
