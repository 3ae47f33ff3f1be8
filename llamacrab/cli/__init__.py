"""The command line: a module per command, or per group of similar commands."""

from llamacrab.cli.app import main, run

__all__ = ["main", "run"]
