"""The command line."""

from llamacrab.cli.app import main, run

__all__ = ["main", "run"]
