"""The command line: parses, calls, prints."""

from dither.cli.commands import app, main
from dither.cli.demo_command import demo
from dither.cli.export_command import export

__all__ = ["app", "demo", "export", "main"]
