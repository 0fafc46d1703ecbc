"""Integrations whose hosts are not installed cannot be imported, for their examples, either."""

from importlib.util import find_spec
from pathlib import Path

INTEGRATIONS = Path(__file__).parent / "src" / "dither" / "integrations"
HOSTS = {"flower": "flwr", "lightning": "lightning", "peft": "peft", "transformers": "transformers"}
"""By the name of the file."""

collect_ignore = [
    str(INTEGRATIONS / f"{name}.py") for name, host in HOSTS.items() if find_spec(host) is None
]
