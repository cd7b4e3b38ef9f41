"""The command `tl-lenses`."""

from tl_lenses.cli.commands import app, main

__all__ = ["app", "main"]
