"""Integrations whose hosts are not installed cannot be imported, for their examples, either."""

from importlib.util import find_spec
from pathlib import Path

INTEGRATIONS = Path(__file__).parent / "src" / "dither" / "integrations"
HOSTS = ("lightning", "peft", "transformers")

collect_ignore = [str(INTEGRATIONS / f"{host}.py") for host in HOSTS if find_spec(host) is None]
