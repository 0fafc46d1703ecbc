"""The command line: parses, calls, prints."""

from dither.cli.commands import app, main

__all__ = ["app", "main"]
