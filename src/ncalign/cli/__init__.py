"""The command line."""

from ncalign.cli.app import main

__all__ = ["main"]
