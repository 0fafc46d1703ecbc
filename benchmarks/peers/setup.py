"""Make the environments of peers. It needs the standard library only.

    python -m benchmarks.peers.setup NAME... --into FOLDER

For each name, or for all peers, this makes ``FOLDER/NAME`` as ``python -m venv`` does and installs
what ``environments.toml`` pins. On Linux, add ``--torch-index https://download.pytorch.org/whl/cpu``:
the default index gives a torch with gigabytes of CUDA packages. An environment that is complete is
left as it is; ``--list`` shows the names.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("environments.toml")


def read() -> dict[str, Any]:
    """The pinned environments: ``python``, ``torch``, ``common`` and a table for each peer."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def name_of(requirement: str) -> str:
    """The distribution that a requirement such as ``"numpy==2.4.6"`` asks for."""
    for mark in ("==", "@", ">", "<"):
        requirement = requirement.partition(mark)[0]
    return requirement.strip().lower().replace("_", "-")


def requirements(environments: dict[str, Any], peer: str) -> list[str]:
    """What to install with dependencies, after torch: the peer's pins win over the common ones."""
    chosen = {name_of(r): r for r in environments["common"]}
    chosen |= {name_of(r): r for r in environments["peers"][peer]["requires"]}
    return [chosen[name] for name in sorted(chosen)]


def commands(environments: dict[str, Any], peer: str, torch_index: str | None) -> list[list[str]]:
    """Arguments of pip, call by call; ``{torch}`` stands for a file that holds torch fixed."""
    first = ["install", environments["torch"]]
    if torch_index:
        first += ["--index-url", torch_index]
    found = [first, ["install", "-c", "{torch}", *requirements(environments, peer)]]
    if bare := environments["peers"][peer].get("bare"):
        found.append(["install", "--no-deps", "--no-build-isolation", *bare])
    return found


def clone(about: dict[str, Any], folder: Path) -> None:
    """Check out the ``paths`` of the ``commit`` of a peer's ``repository``, if it names one."""
    if repository := about.get("repository"):
        git = ["git", "-C", str(folder)]
        first = ["git", "clone", "--quiet", "--filter=blob:none", "--no-checkout"]
        subprocess.run([*first, repository, str(folder)], check=True)
        subprocess.run([*git, "checkout", about["commit"], "--", *about["paths"]], check=True)


def make(environments: dict[str, Any], peer: str, folder: Path, torch_index: str | None) -> None:
    """Make one environment; ``subprocess.CalledProcessError`` if pip fails."""
    done = folder / ".complete"
    if done.exists():
        print(f"{peer}: {folder} is complete")
        return
    venv.create(folder, with_pip=True, clear=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    with tempfile.TemporaryDirectory() as scratch:
        fixed = Path(scratch) / "torch.txt"
        fixed.write_text(environments["torch"] + "\n", encoding="utf-8")
        for command in commands(environments, peer, torch_index):
            given = [str(fixed) if part == "{torch}" else part for part in command]
            print(f"{peer}: pip {' '.join(command)}", flush=True)
            subprocess.run([str(python), "-m", "pip", "--quiet", *given], check=True)
    clone(environments["peers"][peer], folder / "source")
    done.touch()
    print(f"{peer}: {python}")


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; the exit status counts the environments that failed."""
    environments = read()
    parser = argparse.ArgumentParser(description="Make the environments of peers.")
    parser.add_argument("names", nargs="*", help="all, if none is given")
    parser.add_argument("--into", type=Path, help="folder of the environments")
    parser.add_argument("--torch-index", help="where to find torch; PyPI by default")
    parser.add_argument("--list", action="store_true", help="print the names of peers")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(environments["peers"]))
        return 0
    names = options.names or list(environments["peers"])
    if unknown := [name for name in names if name not in environments["peers"]]:
        parser.error(f"no peer is named {', '.join(unknown)}; see --list")
    if options.into is None:
        parser.error("--into FOLDER is needed: where should the environments lie?")
    failed = 0
    for name in names:
        try:
            make(environments, name, options.into / name, options.torch_index)
        except subprocess.CalledProcessError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed += 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
