"""Move the fragments of this folder into the newest version of ``CHANGELOG.md``."""

import argparse
from pathlib import Path

FOLDER = Path(__file__).parent
CHANGELOG = FOLDER.parent / "CHANGELOG.md"
SECTIONS = {
    "feature": "Added",
    "change": "Changed",
    "bugfix": "Fixed",
    "removal": "Removed",
    "doc": "Documentation",
}
"""Where fragments of each kind go."""


def fragments() -> list[Path]:
    return sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md")


def fold(changelog: str, kind: str, text: str) -> str:
    """The changelog with one entry more, the last in its section of the newest version."""
    head, mark, newest = changelog.partition("\n## [")
    newest, older_mark, older = newest.partition("\n## [")
    heading = f"\n### {SECTIONS[kind]}\n"
    if heading not in newest:
        newest = f"{newest.rstrip()}\n{heading}"
    before, _, after = newest.partition(heading)
    section, next_mark, rest = after.partition("\n### ")
    section = section.rstrip("\n") + "\n- " + text.strip().replace("\n", "\n  ") + "\n"
    return head + mark + before + heading + section + next_mark + rest + older_mark + older


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    changelog = CHANGELOG.read_text(encoding="utf-8")
    for path in fragments():
        changelog = fold(changelog, path.suffixes[0][1:], path.read_text(encoding="utf-8"))
    CHANGELOG.write_text(changelog, encoding="utf-8")
    for path in fragments():
        path.unlink()


if __name__ == "__main__":
    main()
