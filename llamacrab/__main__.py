"""Run the command line, or say which package is missing."""

from __future__ import annotations

import sys

from llamacrab._support.extras import require
from llamacrab.errors import LlamaError


def main() -> None:
    """Run `llamacrab ...` and exit: 0 done, 1 failed, 2 wrong usage."""
    try:
        require("click", extra="cli")
        from llamacrab.cli import run
    except LlamaError as error:
        sys.exit(f"llamacrab: {error}")
    sys.exit(run())


if __name__ == "__main__":
    main()
